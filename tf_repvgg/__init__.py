"""Train RepVGG networks that survive low-bit integer deployment.

Importing this package selects Keras 2 (``tf_keras``), which tensorflow-model-optimization needs, and registers layers
and models, so that saved models load without ``custom_objects``.

Example:
  >>> import tf_repvgg
  >>> model = tf_repvgg.models.build_repvgg("digits", (8, 8, 1), num_classes=10, norm="oabn")
  >>> fused = tf_repvgg.fusion.fuse(model)
  >>> [layer.name for layer in tf_repvgg.outliers.report(fused)][:2]
  ['stem', 'stage1_block1']
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from tf_repvgg import autograph, interruption, native_output

# The imports below take seconds.
if interruption.is_in_program():
    interruption.end_at_signals()

# The one place that selects Keras 2: TensorFlow reads this when ``tf.keras`` is first touched.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
# Errors only, unless the user asks for more. Of workers that are lost, for which TensorFlow has long messages, programs
# tell in one line.
os.environ.setdefault(
    "TF_CPP_MIN_LOG_LEVEL", "3" if interruption.is_in_program() and "TF_CONFIG" in os.environ else "2"
)

with native_output.hide():
    import tensorflow as tf
    import tf_keras

    # Looks for GPUs now, so that TensorFlow's messages about missing drivers are hidden too.
    tf.config.list_physical_devices()

if tf.keras.layers.Layer is not tf_keras.layers.Layer:
    raise ImportError(
        f"tf_repvgg needs Keras 2, but tf.keras is already Keras {tf.keras.__version__} in this process. "
        "Import tf_repvgg before anything that touches tf.keras, or set TF_USE_LEGACY_KERAS=1 in the environment."
    )

# These register their layers and models.
from tf_repvgg import fusion, layers, quantization
from tf_repvgg.version import __version__

autograph.leave_out(__name__)

if TYPE_CHECKING:
    from tf_repvgg import checkpoints, data, models, outliers, report, tflite

__all__ = [
    "__version__",
    "checkpoints",
    "data",
    "fusion",
    "layers",
    "models",
    "outliers",
    "quantization",
    "report",
    "tflite",
]


def __getattr__(name: str) -> Any:
    """Imports a part of the package when it is first used: some parts take long to import."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
