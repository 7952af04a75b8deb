"""The ways to an integer file: each quantizes a fused float model, and some need a further step before they convert."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tf_keras as keras

from tf_repvgg.quantization import (
    cluster_quantize,
    learned_step_quantize,
    ptq,
    strip_cluster_quantize,
    strip_learned_step,
)

CONVERT = "convert"


class Way(NamedTuple):
    """A way to an integer file.

    Attributes:
      quantize: Function (fused model, calibration) -> quantized model, before it is stripped.
      strip: Function that strips training's wrappers from it.
      weight_bits: Bits that the weights are worth, for the bound of the error; a uniform grid from the smallest to the
        largest weight has that many.
      largest_code: Largest magnitude of a weight's code in the file; None for no limit.
      most_codes: Largest number of codes of a tensor; None for no limit.
      activation_bits: Bits of an activation.
    """

    quantize: Callable[[keras.Model, Any], keras.Model]
    strip: Callable[[keras.Model], keras.Model] = lambda model: model
    weight_bits: float = 8
    largest_code: int | None = None
    most_codes: int | None = None
    activation_bits: int = 8


def _quantize_after_training(method, **options):
    return lambda model, calibration: ptq.quantize(model, method, calibration=calibration, **options)


WAYS: dict[str, Way] = {
    # A float model goes straight to `tf_repvgg.tflite.convert`.
    CONVERT: Way(lambda model, calibration: model),
    "min_max": Way(_quantize_after_training("min_max")),
    "min_max, 4 bit per channel": Way(
        _quantize_after_training("min_max", weight_bits=4, per_channel=True), weight_bits=4, largest_code=7
    ),
    "mse": Way(_quantize_after_training("mse", per_channel=True)),
    "equalize": Way(_quantize_after_training("equalize")),
    "dfq": Way(_quantize_after_training("dfq")),
    "min_max, int16 activations": Way(
        _quantize_after_training("min_max", per_channel=True, activation_bits=16), activation_bits=16
    ),
    "ClusterQAT, 64 clusters": Way(
        lambda model, calibration: cluster_quantize(model, 64, calibration=calibration),
        strip_cluster_quantize,
        weight_bits=6,
        most_codes=64,
    ),
    # The initial steps of the paper, 2 / sqrt(127) of the mean magnitude, leave 5.6 codes to weights of one magnitude.
    "LSQ, 8 bit": Way(
        lambda model, calibration: learned_step_quantize(model, 8, calibration=calibration),
        strip_learned_step,
        weight_bits=3.7,
    ),
}


def choose_ways(seed: int, count: int) -> list[str]:
    """Names of the ways that the model of a seed takes: some of them, drawn from the seed.

    Args:
      seed: Seed of the model.
      count: Number of ways.
    """
    names = sorted(WAYS)
    return [names[index] for index in np.random.default_rng([seed, len(names)]).permutation(len(names))[:count]]
