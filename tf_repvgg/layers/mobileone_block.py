"""MobileOne's block in training form (arXiv:2206.04040), and one that is normalized like QARepVGG's as a control."""

from typing import Any

import numpy as np
import tf_keras as keras

from tf_repvgg.layers.qarepvgg_block import QARepVGGBlock
from tf_repvgg.layers.reparameterized_block import ReparameterizedBlock
from tf_repvgg.layers.repvgg_block import RepVGGBlock

# The paper has four. A file that names the number must not make convolutions without end.
_MOST_BRANCHES = 64


class OverParameterizedBlock(ReparameterizedBlock):
    """Base of MobileOne's blocks, which gives them their convolutions.

    They are `conv1`, `conv2` and so on with the block's kernel size, and where that is above 1, a 1x1 `conv_scale`.

    Args:
      filters: Number of output channels.
      kernel_size: Height and width of the kernel, an odd number: 1 for pointwise blocks.
      conv_branches: Number of convolutions of that size.
      **kwargs: Arguments of `ReparameterizedBlock` and of the normalizations.

    Raises:
      ValueError: If `kernel_size` is even, `conv_branches` is above 64, or a number is not a whole one above 0.

    Example:
      >>> from tf_repvgg.layers import MobileOneBlock, OverParameterizedBlock
      >>> block = MobileOneBlock(4, conv_branches=3)
      >>> isinstance(block, OverParameterizedBlock), list(block.get_convolutions())
      (True, ['conv1', 'conv2', 'conv3', 'conv_scale'])
    """

    def __init__(self, filters: int, kernel_size: int = 3, conv_branches: int = 1, **kwargs: Any) -> None:
        for argument, value in {"kernel_size": kernel_size, "conv_branches": conv_branches}.items():
            if not (isinstance(value, int | np.integer) and value > 0):
                raise ValueError(f"{type(self).__name__}: {argument} is {value!r}; it must be a whole number above 0")
        if conv_branches > _MOST_BRANCHES:
            raise ValueError(
                f"{type(self).__name__}: conv_branches is {conv_branches}; it must be at most {_MOST_BRANCHES}"
            )
        if kernel_size % 2 == 0:
            raise ValueError(
                f"{type(self).__name__}: kernel_size is {kernel_size}, which has no centre; use an odd one"
            )
        sizes = {str(index): int(kernel_size) for index in range(1, conv_branches + 1)}
        if kernel_size > 1:
            sizes["_scale"] = 1
        super().__init__(filters, convolutions=sizes, **kwargs)
        self.conv_branches = int(conv_branches)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "kernel_size": self.kernel_size, "conv_branches": self.conv_branches}


@keras.saving.register_keras_serializable(package="tf_repvgg")
class MobileOneBlock(OverParameterizedBlock, RepVGGBlock):
    """MobileOne's training form (arXiv:2206.04040, figure 3): act(BN(conv(x)) k times + BN(conv1x1(x)) + BN(x)).

    The 1x1 scale branch exists where the kernel size is above 1, the identity branch where the block keeps the shape of
    its input. A depthwise block has groups=filters, a pointwise one kernel_size=1. Normalizations are called `norm1`,
    `norm2` and so on, `norm_scale` and `norm_identity`.

    Args:
      filters: Number of output channels.
      kernel_size: Height and width of the kernel, an odd number.
      conv_branches: Number k of convolutions of that size.
      **kwargs: Arguments of `RepVGGBlock`, OABN included, and of `ReparameterizedBlock`.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.layers import MobileOneBlock
      >>> depthwise = MobileOneBlock(4, groups=4, conv_branches=2, norm="oabn", name="depthwise")
      >>> pointwise = MobileOneBlock(8, kernel_size=1, conv_branches=2, name="pointwise")
      >>> pointwise(depthwise(keras.Input((8, 8, 4)))).shape
      TensorShape([None, 8, 8, 8])
      >>> list(depthwise.branches()), list(pointwise.branches())
      (['conv1', 'conv2', 'conv_scale', 'identity'], ['conv1', 'conv2'])
    """


@keras.saving.register_keras_serializable(package="tf_repvgg")
class QAMobileOneBlock(OverParameterizedBlock, QARepVGGBlock):
    """MobileOne's convolutions with QARepVGG's normalizations: act(BN(BN(conv(x)) k times + conv1x1(x) + x)).

    A control, from no paper: no normalization on the 1x1 scale and identity branches, and one after the sum.

    Args:
      filters: Number of output channels.
      kernel_size: Height and width of the kernel, an odd number.
      conv_branches: Number k of convolutions of that size.
      **kwargs: Arguments of `ReparameterizedBlock`.

    Example:
      >>> import tf_keras as keras
      >>> from tf_repvgg.layers import QAMobileOneBlock
      >>> block = QAMobileOneBlock(4, groups=4, conv_branches=2)
      >>> block(keras.Input((8, 8, 4))).shape, list(block.branches())
      (TensorShape([None, 8, 8, 4]), ['conv1', 'conv2', 'conv_scale', 'identity'])
    """
