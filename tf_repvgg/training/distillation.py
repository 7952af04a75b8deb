"""Knowledge distillation: a network learns from the logits of a larger one (arXiv:1503.02531)."""

from pathlib import Path
from typing import Any

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.data import ClassificationData
from tf_repvgg.training import finished_runs
from tf_repvgg.training.optimization import balance_replicas


def load_teacher(path: str | Path, data: ClassificationData, trust_model: bool = False) -> keras.Model:
    """Loads the model of a finished run as a teacher: fused, in float32, for images of any height and width.

    Args:
      path: Folder of the run, or its model file.
      data: Data on which the student is trained.
      trust_model: Whether the model file may run code; see `runs.load_model`.

    Raises:
      FileNotFoundError: If there is no finished run.
      ValueError: If the teacher expects other images or knows other classes, or its weights are not finite.
    """
    teacher = finished_runs.load_matching(path, data, "teacher", trust_model)
    any_size = keras.models.clone_model(teacher, keras.Input((None, None, data.channels)))
    any_size.set_weights(teacher.get_weights())
    return finished_runs.fuse_if_needed(any_size, path, "teacher")


class Distiller(keras.Model):
    """A student in training: the layers and weights of the student, and a loss that depends on a teacher too.

        loss = (1 - weight) * hard + weight * T^2 * KL(softmax(teacher / T) || softmax(student / T))

    with the teacher's logits for the same augmented images, and the temperature T; T^2 keeps the gradients of the
    second term as large as those of the first for every T (section 2.1 of the paper). `hard` is the compiled loss, so
    compile the model with `loss_weights=1 - weight`. Evaluation leaves the teacher out. The weights of the teacher are
    not weights of this model.

    Args:
      student: Functional model, image [batch, height, width, channels] -> logits [batch, classes].
      teacher: Model with the same inputs and outputs.
      weight: Weight of the teacher's term, from 0 to 1.
      temperature: Temperature T, above 0.

    Raises:
      ValueError: If the weight or the temperature is out of range.

    Example:
      >>> from tf_repvgg.models import build_repvgg
      >>> from tf_repvgg.training import distillation
      >>> student, teacher = (build_repvgg("digits", (8, 8, 1), 10) for _ in range(2))
      >>> trainer = distillation.Distiller(student, teacher, weight=0.5)
      >>> trainer.compile("sgd", "sparse_categorical_crossentropy", loss_weights=0.5)
      >>> len(trainer.weights) == len(student.weights)
      True
    """

    def __init__(
        self, student: keras.Model, teacher: keras.Model, weight: float = 0.5, temperature: float = 4.0
    ) -> None:
        super().__init__(student.inputs, student.outputs, name=student.name)
        if not 0 <= weight <= 1:
            raise ValueError(f"the weight of distillation is {weight:g}; it must be from 0 to 1")
        if not temperature > 0:
            raise ValueError(f"the temperature of distillation is {temperature:g}; it must be above 0")
        self._weight = weight
        self._temperature = temperature
        # In a function, where Keras does not look for weights.
        self._teacher_logits = lambda images: teacher(images, training=False)

    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, Any]:
        """Trains on one batch (images, labels); Keras calls it."""
        images, labels = data
        teacher_logits = self._teacher_logits(images)
        with tf.GradientTape() as tape:
            logits = self(images, training=True)
            soft = self._weight * distillation_loss(teacher_logits, logits, self._temperature)
            soft = balance_replicas(soft, logits)
            loss = self.compiled_loss(labels, logits, regularization_losses=[*self.losses, soft])
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        return self.compute_metrics(images, labels, logits, None)


def distillation_loss(teacher_logits: tf.Tensor, student_logits: tf.Tensor, temperature: float) -> tf.Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch.

    Args:
      teacher_logits: Float tensor [batch, classes].
      student_logits: Float tensor [batch, classes].
      temperature: Temperature T, above 0.

    Returns:
      Scalar tensor.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.training import distillation
      >>> logits = np.array([[1.0, 2.0, 3.0]], np.float32)
      >>> float(distillation.distillation_loss(logits, logits, temperature=4.0))
      0.0
    """
    teacher = tf.nn.log_softmax(teacher_logits / temperature)
    student = tf.nn.log_softmax(student_logits / temperature)
    divergence = tf.reduce_sum(tf.exp(teacher) * (teacher - student), axis=-1)
    return temperature**2 * tf.reduce_mean(divergence)
