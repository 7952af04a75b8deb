"""SGD with the schedule and the weight decay that RepVGG is trained with."""

import tensorflow as tf
import tf_keras as keras


def make_optimizer(learning_rate, steps, warmup_steps, momentum=0.9, weight_decay=0.0, nesterov=True):
    """SGD, with Nesterov's momentum or the plain one; linear warm-up to `learning_rate`, then cosine to 0 at `steps`.

    Weight decay is decoupled from the gradient, and leaves normalization parameters and biases alone. With momentum m
    it acts about like an L2 penalty of (1 - m) * weight_decay in PyTorch's SGD.
    """
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        max(steps - warmup_steps, 1),
        warmup_target=learning_rate,
        # Keras starts to count the decay after the warm-up.
        warmup_steps=max(warmup_steps, 1),
    )
    optimizer = keras.optimizers.SGD(
        schedule, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay or None
    )
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return optimizer


class CrossEntropy(keras.losses.Loss):
    """Softmax cross-entropy of integer labels [batch] and logits [batch, classes], with label smoothing."""

    def __init__(self, num_classes, label_smoothing=0.0):
        super().__init__(name="cross_entropy")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing

    def call(self, labels, logits):
        labels = tf.one_hot(tf.cast(tf.reshape(labels, [-1]), tf.int32), self.num_classes)
        return keras.losses.categorical_crossentropy(
            labels, logits, from_logits=True, label_smoothing=self.label_smoothing
        )
