"""The variants of RepVGG (arXiv:2101.03697, tables 2 and 3) and MobileOne (arXiv:2206.04040), and for small images."""

import dataclasses

FAMILIES = ("repvgg", "mobileone")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Shape of a network: a stem of one block, then stages of blocks, which in MobileOne are pairs.

    Attributes:
      stem_width: Number of output channels of the stem.
      widths: Number of output channels of each stage.
      depths: Number of blocks of each stage; in MobileOne, of pairs of a depthwise and a pointwise block.
      stem_stride: Stride of the stem: 2 as published, 1 for small images.
      strides: Stride of the first block of each stage.
      groups: Number of groups of every second block, counted through all stages: the second after the stem, the fourth
        and so on. All other blocks have one group. RepVGG only.
      se_reduction: Reduction of the squeeze-and-excite in the blocks; None for no such layer.
      se_depths: Number of blocks, or pairs, at the end of each stage with a squeeze-and-excite; None for all of them
        and the stem.
      conv_branches: Number of convolutions of the same size side by side in every block but the stem, which has one.
        MobileOne only.
      family: Family of networks, one of `FAMILIES`.

    Raises:
      ValueError: If `widths`, `depths`, `strides` and `se_depths` differ in length, the family is unknown, or it has no
        such option.

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
    se_depths: tuple[int, ...] | None = None
    conv_branches: int = 1
    family: str = "repvgg"

    def __post_init__(self) -> None:
        per_stage = [self.widths, self.depths, self.strides, *([] if self.se_depths is None else [self.se_depths])]
        if len({len(numbers) for numbers in per_stage}) > 1:
            raise ValueError(
                f"widths {self.widths}, depths {self.depths}, strides {self.strides} and se_depths {self.se_depths} of "
                "a Variant differ in length; give one of each for every stage"
            )
        if self.family not in FAMILIES:
            raise ValueError(f"family of a Variant is {self.family!r}; known: {', '.join(FAMILIES)}")
        option = {"repvgg": "conv_branches", "mobileone": "groups"}[self.family]
        if getattr(self, option) != 1:
            raise ValueError(
                f"{option} of a Variant is {getattr(self, option)}, but networks of the family {self.family!r} have no "
                "such option; leave it at 1"
            )


def _scale(depths, a, b, **options):
    """A variant of RepVGG's widths: 64, 128 and 256 times a, 512 times b; the stem has at most 64 channels."""
    return Variant(min(64, int(64 * a)), (int(64 * a), int(128 * a), int(256 * a), int(512 * b)), depths, **options)


def _scale_mobileone(*multipliers, **options):
    """A variant of MobileOne's widths: 64, 128, 256 and 512 times a multiplier; the stem has at most 64 channels."""
    widths = tuple(int(width * multiplier) for width, multiplier in zip((64, 128, 256, 512), multipliers, strict=True))
    return Variant(min(64, widths[0]), widths, (2, 8, 10, 1), family="mobileone", **options)


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
    # MobileOne's table 2.
    "S0": _scale_mobileone(0.75, 1.0, 1.0, 2.0, conv_branches=4),
    "S1": _scale_mobileone(1.5, 1.5, 2.0, 2.5),
    "S2": _scale_mobileone(1.5, 2.0, 2.5, 4.0),
    "S3": _scale_mobileone(2.0, 2.5, 3.0, 4.0),
    "S4": _scale_mobileone(3.0, 3.5, 3.5, 4.0, se_reduction=16, se_depths=(0, 0, 5, 1)),
    "digits": Variant(16, (16, 32, 64), (2, 2, 2), stem_stride=1, strides=(1, 2, 2)),
    "cifar-s": Variant(32, (64, 128, 256), (2, 3, 2), stem_stride=1, strides=(2, 2, 2)),
    "cifar-m": Variant(32, (64, 128, 256), (3, 6, 3), stem_stride=1, strides=(2, 2, 2)),
    # A0 for images of 32x32: published widths, depths and strides, except the stem's stride.
    "cifar-a0": _scale(_DEPTHS_A, 0.75, 2.5, stem_stride=1),
    "cifar-l": Variant(32, (64, 128, 256, 512), (2, 4, 6, 1), stem_stride=1, strides=(1, 2, 2, 2)),
    # S0's proportions for images of 32x32, with fewer blocks.
    "cifar-mobileone": Variant(
        32, (48, 96, 192, 512), (2, 5, 5, 1), 1, (2, 2, 2, 1), family="mobileone", conv_branches=2
    ),
}


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
