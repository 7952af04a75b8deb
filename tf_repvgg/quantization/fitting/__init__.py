"""The best network that fits: levels of weights for each layer, chosen for a budget of bytes, memory and time.

`fit` chooses once; a `Fitter` keeps what it has measured, for several budgets. docs/fitting.md describes the method.
"""

from collections.abc import Collection
from typing import Any

import tf_keras as keras

from tf_repvgg.quantization.fitting.assignment import Assignment, FittedLayer, Level
from tf_repvgg.quantization.fitting.budget import Budget, BudgetError
from tf_repvgg.quantization.fitting.costs import FIT_TARGETS
from tf_repvgg.quantization.fitting.fitter import Fitted, Fitter
from tf_repvgg.quantization.fitting.settings import FIT_METHODS
from tf_repvgg.quantization.uniform import GRANULARITIES

__all__ = [
    "FIT_METHODS",
    "FIT_TARGETS",
    "Assignment",
    "Budget",
    "BudgetError",
    "Fitted",
    "FittedLayer",
    "Fitter",
    "Level",
    "fit",
]


def fit(
    model: keras.Model,
    budget: str | Budget,
    target: str = "tflm_lut",
    calibration: Any = None,
    method: str = "codebook",
    granularities: Collection[str] = tuple(GRANULARITIES),
    **options: Any,
) -> Assignment:
    """Chooses for each layer the number of clusters or bits with which the network serves best within a budget.

    The file is quantized by `method`, written for the target and measured; the assignment holds the costs.

    Args:
      model: Fused functional model (see `tf_repvgg.fusion.fuse`).
      budget: Largest costs, as text such as "weights:256kB,arena:64kB,time:5ms"; see `Budget.parse`.
      target: Name in `FIT_TARGETS`.
      calibration: Images without labels, in any form that `tf_repvgg.quantization.samples.read_samples` takes.
      method: Name in `FIT_METHODS`, by which the file is quantized; it decides between codebooks and uniform grids.
      granularities: Names of the granularities to choose from.
      **options: Keyword arguments of `Fitter`, and fields of `tf_repvgg.quantization.ptq.Options`.

    Returns:
      The assignment, for `ptq.quantize`, `cluster_quantize` and `learned_step_quantize`.

    Raises:
      BudgetError: If no choice is within the budget; names the smallest that can be met.
      ValueError: If the budget, the target or the method is unknown or they do not go together, and as `ptq.quantize`.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import quantization
      >>> layers = [keras.layers.Conv2D(8, 3, name="conv"), keras.layers.Flatten(), keras.layers.Dense(4, name="fc")]
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), *layers])
      >>> images = np.random.default_rng(0).uniform(-1, 1, [16, 8, 8, 3])
      >>> assignment = quantization.fit(model, "weights:3kB", "litert_int4", images, method="mse")
      >>> assignment.measured["file_bytes"] <= 3000, dict(assignment)
      (True, {'conv': 8, 'fc': 4})
    """
    fitter = Fitter(model, target, calibration, method, granularities, **options)
    return fitter.fit(budget).assignment
