"""Functions on tensors whose graph all layers of a training step share, in place of a copy of it per layer.

Copies cost memory: as Python objects, in TensorFlow's optimizer of graphs and in its executor. With 4 states per
tensor, training the CIFAR model took 1.19 times the memory of plain fine-tuning with copies
(benchmarks/cluster_step.py says what it takes now).
"""

import functools

import tensorflow as tf


@functools.cache
def shared_graph(function, *shapes):
    """The function as one graph for tensors of these shapes, each a tuple, with None where sizes differ by layer.

    None alone is any shape. Arguments after the tensors have graphs of their own, value by value.
    """
    graph = tf.function(function, experimental_attributes={"_noinline": True})

    def call(*arguments):
        tensors = [tf.convert_to_tensor(value) for value in arguments[: len(shapes)]]
        specs = [tf.TensorSpec(shape, tensor.dtype) for shape, tensor in zip(shapes, tensors, strict=True)]
        return graph.get_concrete_function(*specs, *arguments[len(shapes) :])(*tensors)

    return call
