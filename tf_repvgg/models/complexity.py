"""Parameters and multiply-accumulates of a model, in training form and in deploy form."""

import dataclasses

import tf_keras as keras
from tabulate import tabulate

from tf_repvgg.layers import ReparameterizedBlock


@dataclasses.dataclass(frozen=True)
class Complexity:
    """Counts of one layer or one model. MACs are per image; normalizations and activations count nothing."""

    training_parameters: int = 0
    deploy_parameters: int = 0
    training_macs: int = 0
    deploy_macs: int = 0

    def __add__(self, other):
        return Complexity(
            *(mine + its for mine, its in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )


def _pixels(layer, shape=None):
    """Of its output, or of images of another shape [batch, height, width, channels]."""
    _, height, width, _ = shape or layer.output_shape
    if height is None or width is None:
        raise ValueError(f"MACs of {layer.name!r} need a fixed image size; build the model with input_shape=(H, W, C)")
    return height * width


def _squeeze_excite_complexity(layer) -> Complexity:
    """What a block's squeeze-and-excite adds: its parameters in training form are among the block's already."""
    macs = sum(int(conv.kernel.shape.num_elements()) for conv in (layer.reduce, layer.expand))
    return Complexity(0, layer.count_params(), macs, macs)


def _layer_complexity(layer) -> Complexity:
    parameters = layer.count_params()
    if isinstance(layer, keras.Model):
        return complexity(layer)
    if isinstance(layer, ReparameterizedBlock):
        conv3x3, conv1x1 = layer.conv3x3.count_params(), layer.conv1x1.count_params()
        pixels = _pixels(layer)
        merged = Complexity(parameters, conv3x3 + layer.filters, pixels * (conv3x3 + conv1x1), pixels * conv3x3)
        return merged if layer.squeeze_excite is None else merged + _squeeze_excite_complexity(layer.squeeze_excite)
    macs = 0
    if isinstance(layer, keras.layers.Conv2DTranspose):  # a Conv2D to Keras, but it is the input that is walked over
        macs = _pixels(layer, layer.input_shape) * int(layer.kernel.shape.num_elements())
    elif isinstance(layer, keras.layers.Conv2D):
        macs = _pixels(layer) * int(layer.kernel.shape.num_elements())
    elif isinstance(layer, keras.layers.DepthwiseConv2D):
        macs = _pixels(layer) * int(layer.depthwise_kernel.shape.num_elements())
    elif isinstance(layer, keras.layers.Dense):
        macs = int(layer.kernel.shape.num_elements())
    return Complexity(parameters, parameters, macs, macs)


def complexity(model: keras.Model) -> Complexity:
    """Counts of a functional model with a fixed input size; blocks count in both forms, other layers alike in both."""
    return sum((_layer_complexity(layer) for layer in model.layers), Complexity())


def summary(model: keras.Model, print_fn=print) -> None:
    """Prints parameters and MACs of both forms, layer by layer and in total."""
    rows = []
    for layer in model.layers:
        counts = _layer_complexity(layer)
        if counts.deploy_parameters:
            shape = "x".join(str(size) for size in layer.output_shape[1:])
            rows.append([layer.name, shape, *dataclasses.astuple(counts)])
    rows.append(["total", "", *dataclasses.astuple(complexity(model))])
    headers = ["layer", "output", "parameters, training", "deploy", "MACs, training", "deploy"]
    print_fn(tabulate(rows, headers, intfmt=","))
