"""How far two networks, or two groups of them, differ on the same images."""

from collections.abc import Sequence

import numpy as np

from harness.low_bit.fine_tunings import Result

_TWO_SIDED_95 = 1.96


def estimate_drop(references: Sequence[Result], results: Sequence[Result]) -> tuple[float, float]:
    """Drop in accuracy from references to results, and half the paired 95 % interval over the images.

    Args:
      references: One result per model.
      results: As many, of the same models, on the same images.

    Returns:
      Mean drop over the models and half the width of its interval, both in points.
    """
    lost = np.mean([r.is_right.astype(float) - q.is_right for r, q in zip(references, results, strict=True)], axis=0)
    return 100 * float(np.mean(lost)), 100 * _TWO_SIDED_95 * float(np.std(lost) / np.sqrt(len(lost)))
