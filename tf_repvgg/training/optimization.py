"""Optimizers with the schedule and the weight decay that RepVGG is trained with; losses and their metric."""

import functools

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers import ReparameterizedBlock

OPTIMIZERS = ("sgd", "adamw")


def make_optimizer(learning_rate, steps, warmup_steps, momentum=0.9, weight_decay=0.0, nesterov=True, optimizer="sgd"):
    """SGD or AdamW (arXiv:1711.05101); linear warm-up to `learning_rate`, then cosine to 0 at `steps`.

    Weight decay is decoupled from the gradient, and leaves normalization parameters, biases, codebooks and learned
    steps alone: kernels shrink by `weight_decay` times the learning rate in each step. With SGD and momentum m it acts
    about like an L2 penalty of (1 - m) * weight_decay in PyTorch's SGD.

    Args:
      learning_rate: peak of the schedule; SGD is used to about 0.1, AdamW to about 0.001.
      steps, warmup_steps: of the whole run, and of the warm-up in it.
      momentum, nesterov: of SGD, with Nesterov's momentum or the plain one; AdamW has Keras's moments, 0.9 and 0.999.
      weight_decay: see above.
      optimizer: one of `OPTIMIZERS`.

    Raises:
      ValueError: if `optimizer` is unknown.
    """
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        max(steps - warmup_steps, 1),
        warmup_target=learning_rate,
        # Keras starts to count the decay after the warm-up.
        warmup_steps=max(warmup_steps, 1),
    )
    if optimizer == "sgd":
        made = keras.optimizers.SGD(
            schedule, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay or None
        )
    elif optimizer == "adamw":
        made = keras.optimizers.AdamW(schedule, weight_decay=weight_decay)
    else:
        raise ValueError(f"optimizer is {optimizer!r}; known: {', '.join(OPTIMIZERS)}")
    made.exclude_from_weight_decay(var_names=["gamma", "beta", "bias", "cluster_centroids", "step"])
    return made


def penalize_merged_kernels(model, weight):
    """Adds weight / 2 * sum(K^2) over the merged kernels K of all blocks to the model's loss.

    Decay of the branches' own kernels leaves K alone, since normalization undoes it: a channel whose input varies
    little gets a large gamma / sigma, and its K spans the grid that all channels share. This penalty moves scale from
    such channels to the next layer's kernel, which costs nothing, before a range has to be chosen.

    The running variances count as constants in its gradient, so that it pulls on a channel that has died with up to
    weight * gamma^2 / epsilon: with the usual epsilon of 1e-5, SGD can diverge there, and 1e-3 keeps it stable.
    """
    for block in model.layers:
        if isinstance(block, ReparameterizedBlock):
            model.add_loss(functools.partial(_half_squares, block, weight))


def _half_squares(block, weight):
    kernel, _ = block.equivalent_kernel_and_bias()
    return weight * tf.nn.l2_loss(kernel)


class CrossEntropy(keras.losses.Loss):
    """Softmax cross-entropy of logits [batch, classes], with label smoothing.

    Labels are integers [batch], or probabilities [batch, classes] where mixup has mixed them.
    """

    def __init__(self, num_classes, label_smoothing=0.0):
        super().__init__(name="cross_entropy")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing

    def call(self, labels, logits):
        if not _are_probabilities(labels, logits):
            labels = tf.one_hot(tf.cast(tf.reshape(labels, [-1]), tf.int32), self.num_classes)
        return keras.losses.categorical_crossentropy(
            labels, logits, from_logits=True, label_smoothing=self.label_smoothing
        )


def top1(name="top1"):
    """Metric: share of images whose largest logit is that of their label; of mixed images, of their likelier label."""
    return keras.metrics.MeanMetricWrapper(_is_top1, name=name)


def _is_top1(labels, logits):
    if _are_probabilities(labels, logits):
        labels = tf.argmax(labels, axis=-1)
    labels = tf.cast(tf.reshape(labels, [-1]), tf.int64)
    return tf.cast(labels == tf.argmax(logits, axis=-1), tf.float32)


def _are_probabilities(labels, logits):
    return len(labels.shape) == 2 and labels.shape[-1] == logits.shape[-1]
