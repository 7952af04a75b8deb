"""Knowledge distillation: a network learns from a larger one's logits (arXiv:1503.02531)."""

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.training import finished_runs


def load_teacher(path, data) -> keras.Model:
    """The model of a finished run as a teacher: fused, in float32, for images of any height and width.

    Args:
      path: workdir of the run, or its model.keras.
      data: what the student is trained on, `tf_repvgg.data.ClassificationData`.

    Raises:
      FileNotFoundError: if there is no finished run.
      ValueError: if the teacher expects other images, knows other classes, or has weights that are not finite.
    """
    teacher = finished_runs.load_matching(path, data, "teacher")
    any_size = keras.models.clone_model(teacher, keras.Input((None, None, data.channels)))
    any_size.set_weights(teacher.get_weights())
    return finished_runs.fused(any_size, path, "teacher")


class Distilled(keras.Model):
    """A student in training: the same layers and weights, and a loss that a teacher has a part in.

        loss = (1 - weight) * hard + weight * T^2 * KL(softmax(teacher / T) || softmax(student / T))

    with the teacher's logits on the same augmented images, and T the temperature; T^2 keeps the gradients of the
    second term as large as those of the first whatever T is (section 2.1 of the paper). `hard` is the compiled loss,
    which is to be compiled with `loss_weights=1 - weight`. Evaluation leaves the teacher out. The teacher's weights
    are none of this model's.

    Args:
      student: functional model, image [batch, height, width, channels] -> logits [batch, classes].
      teacher: model of the same inputs and outputs.
      weight: of the teacher's term, from 0 to 1.
      temperature: T, above 0.

    Raises:
      ValueError: if weight or temperature is out of range.
    """

    def __init__(self, student, teacher, weight=0.5, temperature=4.0):
        super().__init__(student.inputs, student.outputs, name=student.name)
        if not 0 <= weight <= 1:
            raise ValueError(f"the weight of distillation is {weight:g}; it must be from 0 to 1")
        if not temperature > 0:
            raise ValueError(f"the temperature of distillation is {temperature:g}; it must be above 0")
        self._weight = weight
        self._temperature = temperature
        # In a function, where Keras does not look for weights.
        self._teacher_logits = lambda images: teacher(images, training=False)

    def train_step(self, data):
        images, labels = data
        teacher_logits = self._teacher_logits(images)
        with tf.GradientTape() as tape:
            logits = self(images, training=True)
            soft = self._weight * distillation_loss(teacher_logits, logits, self._temperature)
            loss = self.compiled_loss(labels, logits, regularization_losses=[*self.losses, soft])
        self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
        return self.compute_metrics(images, labels, logits, None)


def distillation_loss(teacher_logits, student_logits, temperature):
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over logits [batch, classes]."""
    teacher = tf.nn.log_softmax(teacher_logits / temperature)
    student = tf.nn.log_softmax(student_logits / temperature)
    divergence = tf.reduce_sum(tf.exp(teacher) * (teacher - student), axis=-1)
    return temperature**2 * tf.reduce_mean(divergence)
