"""Walking a network once, layer by layer, on all calibration images, for methods that quantize one layer after another.

Running a model up to each of its layers anew takes time that grows with the square of its depth; keeping the outputs of
all layers takes memory that few machines have. A walk keeps the frontier: tensors that layers ahead still read.
"""

import collections
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.ptq.calibration import Calibration


class Walk:
    """Values of tensors of a model on all calibration images; each layer runs once, when a tensor first needs it.

    A layer runs with the weights that it has then. So a method that goes through the layers in execution order, reads
    the inputs of a layer, and then sets its weights, sees each layer after the final form of all layers before it.

    Args:
      calibration: Calibration images.
      model: Functional model without nested models, such as both forms of a `Network`.
      tensors: Keras tensors of the model that will be read, as often as they are listed.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization.ptq.calibration import Calibration
      >>> from tf_repvgg.quantization.ptq.walk import Walk
      >>> model = keras.Sequential([keras.Input([2]), keras.layers.ReLU(), keras.layers.ReLU(1.0)])
      >>> walk = Walk(Calibration(np.float32([[-1, 4]])), model, [layer.output for layer in model.layers])
      >>> [walk.compute(layer.output).tolist() for layer in model.layers]
      [[[0.0, 4.0]], [[0.0, 1.0]]]
    """

    def __init__(self, calibration: Calibration, model: keras.Model, tensors: Collection[Any]) -> None:
        keys = [str(id(tensor)) for tensor in tensors]
        self._pending = _find_sources(graph.nodes(model), keys)
        self._uses = collections.Counter(keys)  # times that a tensor will be read, by its key
        for node in self._pending:
            self._uses.update(set(node.flat_input_ids))
        inputs = calibration.split_inputs(model)
        self._frontier: dict[str, list[Any]] = {
            str(id(tensor)): batches for tensor, batches in zip(model.inputs, inputs, strict=True)
        }
        self._batches, self._count = len(inputs[0]), calibration.count
        self._runner = NodeRunner(autocast=False)

    def compute(self, tensor: Any) -> np.ndarray:
        """Values [count, ...] of a tensor.

        Args:
          tensor: One of the tensors that were announced; it can be read as often as it was listed.

        Raises:
          KeyError: If the tensor was not announced, or has been read already.
        """
        key, batches = str(id(tensor)), self._read(tensor)
        if len(batches) == 1:
            return batches[0]
        values = np.concatenate(batches)
        if key in self._frontier:  # parts of the array replace the batches, which would double the memory
            self._frontier[key] = np.split(values, np.cumsum([len(batch) for batch in batches])[:-1])
        return values

    def compute_mean(self, tensor: Any) -> np.ndarray:
        """Mean [1, ...] of a tensor over all images; see `compute`."""
        return sum(np.sum(batch, axis=0, keepdims=True) for batch in self._read(tensor)) / self._count

    def _read(self, tensor):
        """The batches of a tensor, which is forgotten unless it will be read again."""
        key = str(id(tensor))
        if self._uses[key] < 1:
            raise KeyError(f"tensor {tensor.name!r} was not announced, or has been read already")
        self._advance(key)
        self._uses[key] -= 1
        return self._frontier[key] if self._uses[key] else self._frontier.pop(key)

    def _advance(self, key):
        """Runs the layers that a tensor still needs, and forgets what no layer ahead reads."""
        nodes = _find_sources(self._pending, [key])
        if not nodes:
            return
        self._pending = [node for node in self._pending if node not in nodes]
        reads = collections.Counter(read for node in nodes for read in set(node.flat_input_ids))
        self._uses.subtract(reads)
        kept = [output for node in nodes for output in node.flat_output_ids if self._uses[output] > 0]
        used = [read for read in reads if read in self._frontier]
        batches: dict[str, list] = {output: [] for output in kept}
        for index in range(self._batches):
            tensors = {read: tf.constant(self._frontier[read][index]) for read in used}
            outputs = self._runner(tensors, nodes=nodes, kept=kept, training=False)
            for output, values in zip(kept, outputs, strict=True):
                batches[output].append(values.numpy())
            for read in used:
                if self._uses[read] == 0:
                    self._frontier[read][index] = None
        for read in used:
            if self._uses[read] == 0:
                del self._frontier[read]
        self._frontier |= batches


class NodeRunner(keras.layers.Layer):
    """Runs nodes of a functional model. A Keras layer, so that the layers inside of user's layers do not train either.

    Its weights are those of the nodes' layers, which it does not own.
    """

    def call(self, tensors: dict[str, Any], nodes: Sequence[Any], kept: Sequence[str], training: bool = False) -> list:
        values = dict(tensors)
        for node in nodes:
            # `map_arguments` takes one element off the list per use.
            arguments, keywords = node.map_arguments(
                {key: [values[key]] * node.flat_input_ids.count(key) for key in node.flat_input_ids}
            )
            outputs = tf.nest.flatten(node.layer(*arguments, **keywords))
            values.update(zip(node.flat_output_ids, outputs, strict=True))
        return [values[key] for key in kept]


def _find_sources(nodes: Sequence[Any], keys: Collection[str]) -> list[Any]:
    """The nodes, of these in execution order, that tensors need, in the same order."""
    needed, sources = set(keys), []
    for node in reversed(nodes):
        if needed.intersection(node.flat_output_ids):
            needed.update(node.flat_input_ids)
            sources.append(node)
    return sources[::-1]
