"""Settings of post-training quantization beside the method, bits and granularity."""

import dataclasses
import math
from collections.abc import Mapping

from tf_repvgg.quantization.activation_quantizer import ACTIVATION_BITS


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the methods beside bits and granularity.

    Attributes:
      percentile: Share of the values inside a range, in percent, for the method `percentile`: above 50, at most 100.
      iterations: Optimizer steps for each layer, for methods that learn; bias tuning takes a quarter as many.
      number_of_clusters: Number of clusters of each codebook, from 2 to 256, or numbers by layer name like bits; None
        for 2^bits.
      activation_bits: Width of activations, 8 or 16.
      input_range: Lowest and highest value of an image, for methods without calibration images. The default is that of
        pixels from 0 to 255 normalized to [-1, 1).
      seed: Seed of all random draws.
      progress: Whether long methods show a progress bar.

    Raises:
      ValueError: If a value is out of range.

    Example:
      >>> from tf_repvgg.quantization import ptq
      >>> ptq.Options(iterations=100).activation_bits
      8
    """

    percentile: float = 99.99
    iterations: int = 500
    number_of_clusters: int | str | Mapping[str, int] | None = None
    activation_bits: int = 8
    input_range: tuple[float, float] = (-1.0, 127 / 128)
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        low, high = self.input_range
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"input_range is {self.input_range!r}; it must be (lowest, highest) of an image")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile!r}; it must be above 50, and at most 100")
        if self.activation_bits not in ACTIVATION_BITS:
            known = ", ".join(map(str, ACTIVATION_BITS))
            raise ValueError(f"activation bits are {self.activation_bits!r}; known: {known}")
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations!r}; it must be 1 or more")
