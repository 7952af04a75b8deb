"""The variants of RepVGG (arXiv:2101.03697, tables 2 and 3), a family for small images, and their builder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import tf_keras as keras

from tf_repvgg import by_name
from tf_repvgg.layers import QARepVGGBlock, RepVGGBlock
from tf_repvgg.layers.clip_limit import parse_clip_limits

BLOCKS = ("repvgg", "qarepvgg")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Shape of a RepVGG network: a stem of one block, then stages of blocks.

    Attributes:
      stem_width: Number of output channels of the stem.
      widths: Number of output channels of each stage.
      depths: Number of blocks of each stage.
      stem_stride: Stride of the stem: 2 as published, 1 for small images.
      strides: Stride of the first block of each stage.
      groups: Number of groups of every second block, counted through all stages: the second after the stem, the fourth
        and so on. All other blocks have one group.
      se_reduction: Reduction of the squeeze-and-excite in every block, the stem included; None for no such layer.

    Raises:
      ValueError: If `widths`, `depths` and `strides` differ in length.

    Example:
      >>> from tf_repvgg.models import VARIANTS, Variant
      >>> VARIANTS["digits"] == Variant(16, widths=(16, 32, 64), depths=(2, 2, 2), stem_stride=1, strides=(1, 2, 2))
      True
    """

    stem_width: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stem_stride: int = 2
    strides: tuple[int, ...] = (2, 2, 2, 2)
    groups: int = 1
    se_reduction: int | None = None

    def __post_init__(self) -> None:
        if not len(self.widths) == len(self.depths) == len(self.strides):
            raise ValueError(
                f"widths {self.widths}, depths {self.depths} and strides {self.strides} of a Variant differ in length; "
                "give one of each for every stage"
            )


def _scale(depths, a, b, **options):
    """A variant of the paper's widths: 64, 128 and 256 times a, 512 times b; the stem has at most 64 channels."""
    return Variant(min(64, int(64 * a)), (int(64 * a), int(128 * a), int(256 * a), int(512 * b)), depths, **options)


_DEPTHS_A = (2, 4, 14, 1)
_DEPTHS_B = (4, 6, 16, 1)

VARIANTS = {
    "A0": _scale(_DEPTHS_A, 0.75, 2.5),
    "A1": _scale(_DEPTHS_A, 1.0, 2.5),
    "A2": _scale(_DEPTHS_A, 1.5, 2.75),
    "B0": _scale(_DEPTHS_B, 1.0, 2.5),
    "B1": _scale(_DEPTHS_B, 2.0, 4.0),
    "B1g2": _scale(_DEPTHS_B, 2.0, 4.0, groups=2),
    "B1g4": _scale(_DEPTHS_B, 2.0, 4.0, groups=4),
    "B2": _scale(_DEPTHS_B, 2.5, 5.0),
    "B2g2": _scale(_DEPTHS_B, 2.5, 5.0, groups=2),
    "B2g4": _scale(_DEPTHS_B, 2.5, 5.0, groups=4),
    "B3": _scale(_DEPTHS_B, 3.0, 5.0),
    "B3g2": _scale(_DEPTHS_B, 3.0, 5.0, groups=2),
    "B3g4": _scale(_DEPTHS_B, 3.0, 5.0, groups=4),
    # Not in the paper: from its authors' repository, github.com/DingXiaoH/RepVGG.
    "D2se": _scale((8, 14, 24, 1), 2.5, 5.0, se_reduction=16),
    "digits": Variant(16, (16, 32, 64), (2, 2, 2), stem_stride=1, strides=(1, 2, 2)),
    "cifar-s": Variant(32, (64, 128, 256), (2, 3, 2), stem_stride=1, strides=(2, 2, 2)),
    "cifar-m": Variant(32, (64, 128, 256), (3, 6, 3), stem_stride=1, strides=(2, 2, 2)),
    # A0 for images of 32x32: published widths, depths and strides, except the stem's stride.
    "cifar-a0": _scale(_DEPTHS_A, 0.75, 2.5, stem_stride=1),
    "cifar-l": Variant(32, (64, 128, 256, 512), (2, 4, 6, 1), stem_stride=1, strides=(1, 2, 2, 2)),
}


def build_repvgg(
    variant: str | Variant,
    input_shape: tuple[int | None, int | None, int],
    num_classes: int,
    norm: str = "bn",
    block: str = "repvgg",
    identity: str = "norm",
    oabn_k: float | str | Mapping[str, float | str] = 0.1,
    oabn_branches: str = "identity",
    clip_mode: str = "project",
    identity_gain: float = 0.1,
    padding: str = "same",
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> keras.Model:
    """Builds a training-form classifier that ends in logits.

    Args:
      variant: Name in `VARIANTS`, in upper or lower case, or a `Variant`.
      input_shape: Height, width and channels of the images; height and width may be None.
      num_classes: Number of logits.
      norm: Normalization of the branches, "bn" or "oabn" (RepVGG blocks only).
      block: Kind of blocks, "repvgg" or "qarepvgg".
      identity: Identity branch: "norm", or one of the controls "none" and "constant" (RepVGG blocks only).
      oabn_k: Limit k of OABN, or a mapping {pattern of block names: k}, first match wins; "6std" makes it relative.
      oabn_branches: Branches with OABN, see `RepVGGBlock`.
      clip_mode: Gradient of OABN's clip, see `RepVGGBlock`.
      identity_gain: Gain of a constant identity branch, see `RepVGGBlock`.
      padding: Padding of the blocks: "same", or "symmetric" for weights trained in PyTorch.
      momentum: Momentum of the running statistics of every batch normalization.
      epsilon: Epsilon of every batch normalization.

    Returns:
      A functional model from images [batch, height, width, channels] to float32 logits [batch, num_classes]. Its
      blocks are named "stem", "stage1_block1", "stage1_block2" and so on.

    Raises:
      ValueError: If a choice is unknown, or options do not go together.

    Example:
      >>> from tf_repvgg.models import build_repvgg
      >>> model = build_repvgg("digits", (8, 8, 1), num_classes=10, norm="oabn", oabn_k=0.1)
      >>> [layer.name for layer in model.layers][:3], model.output_shape
      (['image', 'stem', 'stage1_block1'], (None, 10))
    """
    if isinstance(variant, str):
        variant = find_variant(variant)
    if block not in BLOCKS:
        raise ValueError(f"block is {block!r}; known: {', '.join(BLOCKS)}")
    if block == "qarepvgg" and (norm, identity) != ("bn", "norm"):
        raise ValueError(
            f"block='qarepvgg' has no normalization on its identity branch, but norm is {norm!r} and identity is "
            f"{identity!r}; use norm='bn' and identity='norm'"
        )
    options: dict[str, Any] = {
        "padding": padding,
        "momentum": momentum,
        "epsilon": epsilon,
        "se_reduction": variant.se_reduction,
    }
    if block == "repvgg":
        options |= {"norm": norm, "oabn_branches": oabn_branches, "clip_mode": clip_mode}
        options |= {"identity": identity, "identity_gain": identity_gain}
    shapes = _block_shapes(variant)
    limits = by_name.resolve(parse_clip_limits(oabn_k), shapes, "k")
    inputs = features = keras.Input(input_shape, name="image")
    for name, shape in shapes.items():
        if block == "repvgg":
            features = RepVGGBlock(name=name, oabn_k=limits[name], **shape, **options)(features)
        else:
            features = QARepVGGBlock(name=name, **shape, **options)(features)
    features = keras.layers.GlobalAveragePooling2D(name="pool")(features)
    # Logits stay float32 under a mixed policy: in bfloat16, softmax would lose small differences.
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(features)
    return keras.Model(inputs, logits, name="repvgg")


def find_variant(name: str) -> Variant:
    """Looks a variant up by name, in upper or lower case.

    Raises:
      ValueError: If there is no such variant. Lists the names.

    Example:
      >>> from tf_repvgg.models import find_variant
      >>> find_variant("a0").widths
      (48, 96, 192, 1280)
    """
    variants = {known.lower(): variant for known, variant in VARIANTS.items()}
    if name.lower() not in variants:
        raise ValueError(f"variant is {name!r}; known: {', '.join(VARIANTS)}")
    return variants[name.lower()]


def _block_shapes(variant) -> dict[str, dict[str, Any]]:
    """{name of a block: its filters, strides and groups} in order of execution."""
    shapes = {"stem": {"filters": variant.stem_width, "strides": variant.stem_stride, "groups": 1}}
    for stage, (width, depth, stride) in enumerate(
        zip(variant.widths, variant.depths, variant.strides, strict=True), start=1
    ):
        for index in range(1, depth + 1):
            groups = variant.groups if len(shapes) % 2 == 0 else 1
            shapes[f"stage{stage}_block{index}"] = {
                "filters": width,
                "strides": stride if index == 1 else 1,
                "groups": groups,
            }
    return shapes
