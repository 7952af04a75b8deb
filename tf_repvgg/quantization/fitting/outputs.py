"""The damage that quantized kernels do to the outputs of a float network, on images without labels."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.ptq.calibration import Calibration
from tf_repvgg.quantization.ptq.walk import NodeRunner
from tf_repvgg.quantization.quantized_layers import kernel_name, kernel_of, restore_kernel
from tf_repvgg.quantization.uniform import QuantizedKernel


class OutputError:
    """Measures how far a network's outputs move if some of its layers get other kernels; the network stays as it is.

    The error is the mean over images of |q - f|^2 / (|f|^2 + m), where f are the float network's outputs for an image
    less their mean over images, q those of the changed network, and m the median of |f|^2: so no image decides alone.

    Args:
      model: Float functional model without nested models, such as `ptq.Network.float`.
      calibration: Images.
    """

    def __init__(self, model: keras.Model, calibration: Calibration) -> None:
        self._model, self._calibration = model, calibration
        self._inputs = calibration.split_inputs(model)
        reference = self._flatten(calibration.compute(model, model.outputs))
        energy = np.sum(np.square(reference - reference.mean(axis=0)), axis=1)
        self._reference, self._energy = reference, energy + (np.median(energy) or 1.0)

    def measure(self, kernels: Mapping[str, QuantizedKernel]) -> float:
        """The error with some kernels in place of the network's own.

        Args:
          kernels: {layer name: kernel}.
        """
        with _restore_afterwards([self._model.get_layer(name) for name in kernels]):
            for name, kernel in kernels.items():
                _set_kernel(self._model.get_layer(name), kernel)
            return self._compare(self._calibration.compute(self._model, self._model.outputs))

    def measure_each(self, name: str, kernels: Sequence[QuantizedKernel]) -> list[float]:
        """The error with each of several kernels of one layer; layers before it run once for all of them.

        Args:
          name: Name of the layer.
          kernels: Kernels to try.
        """
        layer, nodes = self._model.get_layer(name), graph.nodes(self._model)
        start = next(number for number, node in enumerate(nodes) if node.layer is layer)
        before, after = nodes[:start], nodes[start:]
        outputs = [str(id(tensor)) for tensor in self._model.outputs]
        inputs = [str(id(tensor)) for tensor in self._model.inputs]
        made = {key for node in after for key in node.flat_output_ids}
        frontier = sorted({key for node in after for key in node.flat_input_ids}.union(outputs) - made)
        run_before, run_after = (_make_run(*part) for part in ((before, inputs, frontier), (after, frontier, outputs)))
        parts: list[list[list[np.ndarray]]] = [[] for _ in kernels]
        with _restore_afterwards([layer]):
            for batch in zip(*self._inputs, strict=True):
                values = run_before([tf.constant(array) for array in batch])
                for part, kernel in zip(parts, kernels, strict=True):
                    _set_kernel(layer, kernel)
                    part.append([output.numpy() for output in run_after(values)])
        return [self._compare([np.concatenate(batches) for batches in zip(*part, strict=True)]) for part in parts]

    def _compare(self, outputs):
        squares = np.sum(np.square(self._flatten(outputs) - self._reference), axis=1)
        return float(np.mean(squares / self._energy))

    def _flatten(self, outputs):
        return np.concatenate([array.reshape(len(array), -1) for array in outputs], axis=1, dtype=np.float64)


def _make_run(nodes, read, kept):
    """A function from the tensors that nodes read to those that are kept."""
    runner = NodeRunner(autocast=False)

    @tf.function
    def run(values):
        return runner(dict(zip(read, values, strict=True)), nodes=nodes, kept=kept, training=False)

    return run


@contextlib.contextmanager
def _restore_afterwards(layers: Iterable[keras.layers.Layer]) -> Iterator[None]:
    """A context that gives layers their kernels back."""
    kernels = [(layer, kernel_of(layer)) for layer in layers]
    try:
        yield
    finally:
        for layer, kernel in kernels:
            _assign(layer, kernel)


def _set_kernel(layer, kernel):
    _assign(layer, kernel.dequantize())


def _assign(layer, kernel):
    getattr(layer, kernel_name(layer)).assign(restore_kernel(layer, kernel))
