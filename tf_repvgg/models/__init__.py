"""The families RepVGG and MobileOne: one table of variants and one builder."""

from tf_repvgg.models.complexity import Complexity, complexity, summary
from tf_repvgg.models.networks import BLOCKS, build_mobileone, build_network, build_repvgg, find_blocks
from tf_repvgg.models.variants import FAMILIES, VARIANTS, Variant, find_variant

__all__ = [
    "BLOCKS",
    "FAMILIES",
    "VARIANTS",
    "Complexity",
    "Variant",
    "build_mobileone",
    "build_network",
    "build_repvgg",
    "complexity",
    "find_blocks",
    "find_variant",
    "summary",
]
