"""The RepVGG family: one table of variants and one builder."""

from tf_repvgg.models.complexity import Complexity, complexity, summary
from tf_repvgg.models.repvgg import BLOCKS, VARIANTS, Variant, build_repvgg, find_variant

__all__ = ["BLOCKS", "VARIANTS", "Complexity", "Variant", "build_repvgg", "complexity", "find_variant", "summary"]
