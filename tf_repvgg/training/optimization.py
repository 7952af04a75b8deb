"""Optimizers with the schedule and the weight decay that RepVGG is trained with, the losses, and their metric."""

import functools
from typing import Any

import tensorflow as tf
import tf_keras as keras

from tf_repvgg.layers import ReparameterizedBlock

OPTIMIZERS = ("sgd", "adamw")


def make_optimizer(
    learning_rate: float,
    steps: int,
    warmup_steps: int,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    optimizer: str = "sgd",
) -> keras.optimizers.Optimizer:
    """SGD or AdamW (arXiv:1711.05101) with linear warm-up to `learning_rate`, then a cosine to 0 at `steps`.

    Weight decay is decoupled from the gradient: in each step, kernels shrink by `weight_decay` times the learning rate.
    Normalization parameters, biases, codebooks and learned steps do not decay. With SGD of momentum m, weight decay
    acts about like an L2 penalty of (1 - m) * weight_decay in PyTorch's SGD.

    Args:
      learning_rate: Peak of the schedule; about 0.1 suits SGD, about 0.001 suits AdamW.
      steps: Number of steps of the whole run.
      warmup_steps: Number of those steps in which the rate rises.
      momentum: Momentum of SGD; AdamW has Keras's decay rates, 0.9 and 0.999.
      weight_decay: Decay of kernels.
      nesterov: Whether SGD uses Nesterov's momentum.
      optimizer: One of `OPTIMIZERS`.

    Raises:
      ValueError: If the optimizer is unknown.

    Example:
      >>> from tf_repvgg.training import optimization
      >>> optimizer = optimization.make_optimizer(0.1, steps=100, warmup_steps=10)
      >>> type(optimizer).__name__, round(float(optimizer.learning_rate), 3)
      ('SGD', 0.0)
    """
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        max(steps - warmup_steps, 1),
        warmup_target=learning_rate,
        # Keras counts the steps of the decay from the end of the warm-up.
        warmup_steps=max(warmup_steps, 1),
    )
    if optimizer == "sgd":
        result = keras.optimizers.SGD(
            schedule, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay or None
        )
    elif optimizer == "adamw":
        result = keras.optimizers.AdamW(schedule, weight_decay=weight_decay)
    else:
        raise ValueError(f"optimizer is {optimizer!r}; known: {', '.join(OPTIMIZERS)}")
    result.exclude_from_weight_decay(var_names=["gamma", "beta", "bias", "cluster_centroids", "step"])
    return result


def penalize_merged_kernels(model: keras.Model, weight: float) -> None:
    """Adds weight / 2 * sum(K^2), over the merged kernels K of all blocks, to the loss of a model.

    Decay of the branches' own kernels does not limit K, since normalization undoes it: a channel whose input varies
    little gets a large gamma / sigma, and its K widens the grid that all channels share. The penalty moves scale from
    such channels to the kernel of the next layer, which costs no accuracy, before a range has to be chosen.

    Its gradient takes the running variances as constants, so that it pulls on a dead channel with up to
    weight * gamma^2 / epsilon. With the usual epsilon of 1e-5 this can make SGD diverge; 1e-3 keeps it stable.

    Args:
      model: Model in training form; its loss is changed.
      weight: Weight of the penalty.

    Example:
      >>> from tf_repvgg.models import build_repvgg
      >>> from tf_repvgg.training import optimization
      >>> model = build_repvgg("digits", (8, 8, 1), 10)
      >>> optimization.penalize_merged_kernels(model, weight=1e-4)
      >>> len(model.losses)  # one per block
      7
    """
    for block in model.layers:
        if isinstance(block, ReparameterizedBlock):
            model.add_loss(functools.partial(_kernel_penalty, block, weight))


def _kernel_penalty(block, weight):
    kernel, _ = block.equivalent_kernel_and_bias()
    return weight * tf.nn.l2_loss(kernel)


class CrossEntropy(keras.losses.Loss):
    """Softmax cross-entropy of logits, with label smoothing.

    Labels are integers [batch], or probabilities [batch, classes] where mixup has mixed them; logits are
    [batch, classes].

    Args:
      num_classes: Number of classes.
      label_smoothing: Probability that is spread over all classes, from 0 to 1.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.training import optimization
      >>> loss = optimization.CrossEntropy(num_classes=2)
      >>> round(float(loss(np.array([1, 0]), np.zeros([2, 2], np.float32))), 3)
      0.693
    """

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__(name="cross_entropy")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing

    def call(self, labels: Any, logits: Any) -> tf.Tensor:
        """The loss of each image, [batch]."""
        if not _are_probabilities(labels, logits):
            labels = tf.one_hot(tf.cast(tf.reshape(labels, [-1]), tf.int32), self.num_classes)
        losses = keras.losses.categorical_crossentropy(
            labels, logits, from_logits=True, label_smoothing=self.label_smoothing
        )
        return balance_replicas(losses, logits)


def balance_replicas(losses: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Losses whose gradient has the weight of the images of this replica among those of all.

    A strategy takes the mean over replicas of their mean gradients. In the last batch of an epoch one replica may have
    an image more than another; with this weight the result is the mean over all images.

    Args:
      losses: Losses of any shape.
      outputs: Tensor whose first dimension is the number of images. If that is known while a graph is built, all
        replicas have the same, and nothing is changed.

    Returns:
      The same values, whose gradient is scaled.
    """
    replica = tf.distribute.get_replica_context()
    if outputs.shape[0] is not None or replica is None or replica.num_replicas_in_sync == 1:
        return losses
    count = tf.cast(tf.shape(outputs)[0], tf.float32)
    weight = count * replica.num_replicas_in_sync / replica.all_reduce("SUM", count)
    return weight * losses + tf.stop_gradient((1 - weight) * losses)


def make_top1(name: str = "top1") -> keras.metrics.Metric:
    """Metric: share of images whose largest logit is that of their label, or of their likelier label if mixed.

    Args:
      name: Name of the metric.

    Example:
      >>> import numpy as np
      >>> from tf_repvgg.training import optimization
      >>> metric = optimization.make_top1()
      >>> metric.update_state(np.array([0, 1]), np.array([[2.0, 1.0], [2.0, 1.0]])) is not None
      True
      >>> float(metric.result())
      0.5
    """
    return keras.metrics.MeanMetricWrapper(_is_top1, name=name)


def _is_top1(labels, logits):
    if _are_probabilities(labels, logits):
        labels = tf.argmax(labels, axis=-1)
    labels = tf.cast(tf.reshape(labels, [-1]), tf.int64)
    return tf.cast(labels == tf.argmax(logits, axis=-1), tf.float32)


def _are_probabilities(labels, logits):
    return len(labels.shape) == 2 and labels.shape[-1] == logits.shape[-1]
