"""Functions on tensors whose graph all layers of a training step share, instead of one copy per layer.

Copies cost memory: as Python objects, in TensorFlow's optimizer of graphs and in its executor. With 4 clusters per
tensor, training the CIFAR model with copies took 1.19 times the memory of plain fine-tuning
(benchmarks/cluster_step.py reports the current ratio).
"""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf


@functools.cache
def share_graph(function: Callable, *shapes: tuple[int | None, ...] | None) -> Callable:
    """Makes a function on tensors run as one graph, wherever it is called.

    Args:
      function: Function of one tensor per shape, and of further arguments after them; at module level, since graphs are
        kept by function. Each combination of values of the further arguments has its own graph.
      *shapes: Shape of each tensor, with None for sizes that differ by layer; None alone for a tensor of any shape.

    Returns:
      A callable with the arguments and results of `function`.

    Example:
      >>> import tensorflow as tf
      >>> from tf_repvgg.quantization.shared_graphs import share_graph
      >>> share_graph(tf.reduce_sum, (None, None))(tf.ones([2, 3])).numpy().item()
      6.0
    """
    graph = tf.function(function, experimental_attributes={"_noinline": True})

    def call(*arguments: Any) -> Any:
        tensors = [tf.convert_to_tensor(value) for value in arguments[: len(shapes)]]
        specs = [tf.TensorSpec(shape, tensor.dtype) for shape, tensor in zip(shapes, tensors, strict=True)]
        return graph.get_concrete_function(*specs, *arguments[len(shapes) :])(*tensors)

    return call
