"""The variants of RepVGG (arXiv:2101.03697, tables 2 and 3), a family for small images, and their builder."""

import dataclasses
from collections.abc import Mapping

import tf_keras as keras

from tf_repvgg import by_name
from tf_repvgg.layers import QARepVGGBlock, RepVGGBlock
from tf_repvgg.layers.clip_limit import parse_clip_limits

BLOCKS = ("repvgg", "qarepvgg")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Shape of a RepVGG network: a stem of one block, then stages of blocks.

    Attributes:
      stem_width: output channels of the stem.
      widths: output channels of each stage.
      depths: number of blocks of each stage.
      stem_stride: 2 as published; 1 for small images.
      strides: stride of each stage's first block.
      groups: of every second block, counted through all stages from the stem's 0: of the second, fourth and so on.
      se_reduction: reduction of the squeeze-and-excite in every block, the stem included; None for none.
    """

    stem_width: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stem_stride: int = 2
    strides: tuple[int, ...] = (2, 2, 2, 2)
    groups: int = 1
    se_reduction: int | None = None


def _published(depths, a, b, **options):
    """Widths of the paper: 64, 128 and 256 times a, 512 times b; the stem has at most 64 channels."""
    return Variant(min(64, int(64 * a)), (int(64 * a), int(128 * a), int(256 * a), int(512 * b)), depths, **options)


_DEPTHS_A = (2, 4, 14, 1)
_DEPTHS_B = (4, 6, 16, 1)

VARIANTS = {
    "A0": _published(_DEPTHS_A, 0.75, 2.5),
    "A1": _published(_DEPTHS_A, 1.0, 2.5),
    "A2": _published(_DEPTHS_A, 1.5, 2.75),
    "B0": _published(_DEPTHS_B, 1.0, 2.5),
    "B1": _published(_DEPTHS_B, 2.0, 4.0),
    "B1g2": _published(_DEPTHS_B, 2.0, 4.0, groups=2),
    "B1g4": _published(_DEPTHS_B, 2.0, 4.0, groups=4),
    "B2": _published(_DEPTHS_B, 2.5, 5.0),
    "B2g2": _published(_DEPTHS_B, 2.5, 5.0, groups=2),
    "B2g4": _published(_DEPTHS_B, 2.5, 5.0, groups=4),
    "B3": _published(_DEPTHS_B, 3.0, 5.0),
    "B3g2": _published(_DEPTHS_B, 3.0, 5.0, groups=2),
    "B3g4": _published(_DEPTHS_B, 3.0, 5.0, groups=4),
    # Not in the paper: from its authors' repository, github.com/DingXiaoH/RepVGG.
    "D2se": _published((8, 14, 24, 1), 2.5, 5.0, se_reduction=16),
    "digits": Variant(16, (16, 32, 64), (2, 2, 2), stem_stride=1, strides=(1, 2, 2)),
    "cifar-s": Variant(32, (64, 128, 256), (2, 3, 2), stem_stride=1, strides=(2, 2, 2)),
    "cifar-m": Variant(32, (64, 128, 256), (3, 6, 3), stem_stride=1, strides=(2, 2, 2)),
    # A0 for images of 32x32: the published widths, depths and strides, but for the stem's.
    "cifar-a0": _published(_DEPTHS_A, 0.75, 2.5, stem_stride=1),
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
      variant: a name in `VARIANTS`, or a `Variant`.
      input_shape: (height, width, channels); height and width may be None.
      num_classes: number of logits.
      norm: "bn" or "oabn" (RepVGG blocks only).
      block: "repvgg" or "qarepvgg".
      identity: "norm", or one of the controls "none" and "constant" (RepVGG blocks only).
      oabn_k: limit k of OABN, or a mapping {pattern of block names: k}, first match wins; "6std" makes it relative.
      oabn_branches, clip_mode, identity_gain: see `RepVGGBlock`.
      padding: "same", or "symmetric" for weights trained in PyTorch.
      momentum, epsilon: of every batch normalization.

    Returns:
      A functional model [batch, height, width, channels] -> float32 logits [batch, num_classes]; its blocks are
      named "stem" and "stage1_block1" onwards.

    Raises:
      ValueError: for an unknown choice, or options that do not go together.
    """
    if isinstance(variant, str):
        variant = find_variant(variant)
    if block not in BLOCKS:
        raise ValueError(f"block is {block!r}; known: {', '.join(BLOCKS)}")
    if block == "qarepvgg" and (norm, identity) != ("bn", "norm"):
        raise ValueError(
            f"block='qarepvgg' has no normalization on its identity branch to change, but norm={norm!r} and "
            f"identity={identity!r}; use norm='bn' and identity='norm'"
        )
    options = {"padding": padding, "momentum": momentum, "epsilon": epsilon, "se_reduction": variant.se_reduction}
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
    # Logits stay float32 under a mixed policy: softmax on bfloat16 loses the loss's small differences.
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(features)
    return keras.Model(inputs, logits, name="repvgg")


def find_variant(name: str) -> Variant:
    """The variant of a name, in upper or lower case.

    Raises:
      ValueError: For an unknown name.
    """
    variants = {known.lower(): variant for known, variant in VARIANTS.items()}
    if name.lower() not in variants:
        raise ValueError(f"variant is {name!r}; known: {', '.join(VARIANTS)}")
    return variants[name.lower()]


def _block_shapes(variant):
    """{name of a block: its filters, strides and groups} in execution order."""
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
