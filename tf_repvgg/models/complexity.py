"""Parameters and multiply-accumulates of a model, in training form and in deploy form."""

import dataclasses
from collections.abc import Callable

import tf_keras as keras
from tabulate import tabulate

from tf_repvgg.layers import ReparameterizedBlock


@dataclasses.dataclass(frozen=True)
class Complexity:
    """Counts of a layer or a model; `+` adds them up. Normalizations and activations have no MACs.

    Attributes:
      training_parameters: Number of parameters in training form, running statistics included.
      deploy_parameters: Number of parameters in deploy form.
      training_macs: Number of multiply-accumulates per image in training form.
      deploy_macs: Number of multiply-accumulates per image in deploy form.

    Example:
      >>> from tf_repvgg.models import Complexity
      >>> Complexity(training_parameters=3) + Complexity(training_parameters=4, deploy_macs=5)
      Complexity(training_parameters=7, deploy_parameters=0, training_macs=0, deploy_macs=5)
    """

    training_parameters: int = 0
    deploy_parameters: int = 0
    training_macs: int = 0
    deploy_macs: int = 0

    def __add__(self, other: "Complexity") -> "Complexity":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Complexity(*(first + second for first, second in pairs))


def _count_pixels(layer, shape=None):
    """Pixels of a layer's output, or of images of another shape [batch, height, width, channels]."""
    _, height, width, _ = shape or layer.output_shape
    if height is None or width is None:
        raise ValueError(
            f"the MACs of {layer.name!r} need a fixed image size; build the model with input_shape=(height, width, "
            "channels)"
        )
    return height * width


def _squeeze_excite_complexity(layer) -> Complexity:
    """Counts of a block's squeeze-and-excite; in training form the block's parameters already include it."""
    macs = sum(int(conv.kernel.shape.num_elements()) for conv in (layer.reduce, layer.expand))
    return Complexity(0, layer.count_params(), macs, macs)


def _layer_complexity(layer) -> Complexity:
    parameters = layer.count_params()
    if isinstance(layer, keras.Model):
        return complexity(layer)
    if isinstance(layer, ReparameterizedBlock):
        largest, *others = (conv.count_params() for conv in layer.get_convolutions().values())
        pixels = _count_pixels(layer)
        merged = Complexity(parameters, largest + layer.filters, pixels * (largest + sum(others)), pixels * largest)
        return merged if layer.squeeze_excite is None else merged + _squeeze_excite_complexity(layer.squeeze_excite)
    macs = 0
    if isinstance(layer, keras.layers.Conv2DTranspose):  # a Conv2D to Keras, but its kernel moves over the input
        macs = _count_pixels(layer, layer.input_shape) * int(layer.kernel.shape.num_elements())
    elif isinstance(layer, keras.layers.Conv2D):
        macs = _count_pixels(layer) * int(layer.kernel.shape.num_elements())
    elif isinstance(layer, keras.layers.DepthwiseConv2D):
        macs = _count_pixels(layer) * int(layer.depthwise_kernel.shape.num_elements())
    elif isinstance(layer, keras.layers.Dense):
        macs = int(layer.kernel.shape.num_elements())
    return Complexity(parameters, parameters, macs, macs)


def complexity(model: keras.Model) -> Complexity:
    """Counts of a functional model with a fixed input size. Blocks differ between the two forms, other layers do not.

    Raises:
      ValueError: If the height or width of a layer's output is not fixed.

    Example:
      >>> from tf_repvgg.models import build_repvgg, complexity
      >>> counts = complexity(build_repvgg("digits", (8, 8, 1), num_classes=10))
      >>> counts.training_parameters, counts.deploy_parameters
      (85162, 74762)
    """
    return sum((_layer_complexity(layer) for layer in model.layers), Complexity())


def summary(model: keras.Model, print_fn: Callable[[str], object] = print) -> None:
    """Prints parameters and MACs of both forms, layer by layer and in total.

    Args:
      model: Functional model with a fixed input size.
      print_fn: Function that receives the table.

    Example:
      >>> from tf_repvgg.models import Variant, build_repvgg, summary
      >>> summary(build_repvgg(Variant(4, widths=(8,), depths=(1,), strides=(2,)), (8, 8, 3), num_classes=2))
      layer          output      parameters, training    deploy    MACs, training    deploy
      -------------  --------  ----------------------  --------  ----------------  --------
      stem           4x4x4                        152       112             1,920     1,728
      stage1_block1  2x2x8                        384       296             1,280     1,152
      logits         2                             18        18                16        16
      total                                       554       426             3,216     2,896
    """
    rows = []
    for layer in model.layers:
        counts = _layer_complexity(layer)
        if counts.deploy_parameters:
            shape = "x".join(str(size) for size in layer.output_shape[1:])
            rows.append([layer.name, shape, *dataclasses.astuple(counts)])
    rows.append(["total", "", *dataclasses.astuple(complexity(model))])
    headers = ["layer", "output", "parameters, training", "deploy", "MACs, training", "deploy"]
    print_fn(tabulate(rows, headers, intfmt=","))
