"""AutoGraph, with which TensorFlow rewrites Python functions so that they may branch on tensors; none here does."""

import contextlib


def leave_out(package: str) -> None:
    """Lets AutoGraph leave the functions of a package as they are, as it leaves those of Keras.

    Rewriting took a fifth of the time that a short training or an export takes, and left a temporary file for each
    function. A function that does branch on a tensor raises an error when it is traced.

    Args:
      package: Name of the package.
    """
    # TensorFlow has no public name for this. Where it has moved, everything works as before, but starts more slowly.
    with contextlib.suppress(ImportError, AttributeError):
        from tensorflow.python.autograph.core import config

        config.CONVERSION_RULES = (config.DoNotConvert(package), *config.CONVERSION_RULES)
