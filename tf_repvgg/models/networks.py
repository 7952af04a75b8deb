"""The builder of the networks, and the blocks that they consist of."""

from collections.abc import Mapping
from typing import Any

import tf_keras as keras

from tf_repvgg import by_name
from tf_repvgg.layers import MobileOneBlock, QAMobileOneBlock, QARepVGGBlock, ReparameterizedBlock, RepVGGBlock
from tf_repvgg.layers.clip_limit import parse_clip_limits
from tf_repvgg.models.variants import Variant, find_variant

BLOCKS: dict[str, type[ReparameterizedBlock]] = {
    "repvgg": RepVGGBlock,
    "qarepvgg": QARepVGGBlock,
    "mobileone": MobileOneBlock,
    "qamobileone": QAMobileOneBlock,
}


def build_network(
    variant: str | Variant,
    input_shape: tuple[int | None, int | None, int],
    num_classes: int,
    norm: str = "bn",
    block: str | None = None,
    identity: str = "norm",
    oabn_k: float | str | Mapping[str, float | str] = 0.1,
    oabn_branches: str = "identity",
    clip_mode: str = "project",
    identity_gain: float = 0.1,
    padding: str = "same",
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    synchronized: bool = False,
) -> keras.Model:
    """Builds a training-form classifier of any family that ends in logits.

    Args:
      variant: Name in `VARIANTS`, in upper or lower case, or a `Variant`.
      input_shape: Height, width and channels of the images; height and width may be None.
      num_classes: Number of logits.
      norm: Normalization of the branches, "bn" or "oabn" (RepVGG and MobileOne blocks only).
      block: Kind of blocks: "repvgg" or "qarepvgg" for variants of RepVGG, "mobileone" or "qamobileone" for those of
        MobileOne; by default the first.
      identity: Identity branch: "norm", or one of the controls "none" and "constant" (RepVGG and MobileOne blocks
        only).
      oabn_k: Limit k of OABN, or a mapping {pattern of block names: k}, first match wins; "6std" makes it relative.
      oabn_branches: Branches with OABN, see `RepVGGBlock`.
      clip_mode: Gradient of OABN's clip, see `RepVGGBlock`.
      identity_gain: Gain of a constant identity branch, see `RepVGGBlock`.
      padding: Padding of the blocks: "same", or "symmetric" for weights trained in PyTorch.
      momentum: Momentum of the running statistics of every batch normalization.
      epsilon: Epsilon of every batch normalization.
      synchronized: Whether batch normalizations compute the statistics of the global batch under a distribution
        strategy.

    Returns:
      A functional model from images [batch, height, width, channels] to float32 logits [batch, num_classes]. Its
      blocks are named "stem", "stage1_block1", "stage1_block2" and so on; the two blocks of a pair of MobileOne
      "stage1_block1_depthwise" and "stage1_block1_pointwise".

    Raises:
      ValueError: If a choice is unknown, or options do not go together.

    Example:
      >>> from tf_repvgg.models import build_network
      >>> model = build_network("cifar-s", (32, 32, 3), num_classes=10, norm="oabn", oabn_k=0.1)
      >>> [layer.name for layer in model.layers][:3], model.output_shape
      (['image', 'stem', 'stage1_block1'], (None, 10))
    """
    if isinstance(variant, str):
        variant = find_variant(variant)
    block = _check_block(variant.family, block)
    options: dict[str, Any] = {"padding": padding}
    options |= {"momentum": momentum, "epsilon": epsilon, "synchronized": synchronized}
    is_normalized_by_branch = issubclass(BLOCKS[block], RepVGGBlock)
    if is_normalized_by_branch:
        options |= {"norm": norm, "oabn_branches": oabn_branches, "clip_mode": clip_mode}
        options |= {"identity": identity, "identity_gain": identity_gain}
    elif (norm, identity) != ("bn", "norm"):
        raise ValueError(
            f"block={block!r} has no normalization on its identity branch, but norm is {norm!r} and identity is "
            f"{identity!r}; use norm='bn' and identity='norm'"
        )
    shapes = _block_shapes(variant)
    limits = by_name.resolve(parse_clip_limits(oabn_k), shapes, "k")
    inputs = features = keras.Input(input_shape, name="image")
    for name, shape in shapes.items():
        limit: dict[str, Any] = {"oabn_k": limits[name]} if is_normalized_by_branch else {}
        features = BLOCKS[block](name=name, **limit, **shape, **options)(features)
    features = keras.layers.GlobalAveragePooling2D(name="pool")(features)
    # Logits stay float32 under a mixed policy: in bfloat16, softmax would lose small differences.
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(features)
    return keras.Model(inputs, logits, name=variant.family)


def build_repvgg(
    variant: str | Variant,
    input_shape: tuple[int | None, int | None, int],
    num_classes: int,
    norm: str = "bn",
    block: str = "repvgg",
    **options: Any,
) -> keras.Model:
    """Builds a RepVGG classifier in training form, see `build_network`.

    Args:
      variant: Name of a variant of RepVGG, or a `Variant`.
      input_shape: Height, width and channels of the images; height and width may be None.
      num_classes: Number of logits.
      norm: Normalization of the branches, "bn" or "oabn" (RepVGG blocks only).
      block: Kind of blocks, "repvgg" or "qarepvgg".
      **options: Further arguments of `build_network`.

    Raises:
      ValueError: As `build_network`, and for a variant of another family.

    Example:
      >>> from tf_repvgg.models import build_repvgg
      >>> model = build_repvgg("digits", (8, 8, 1), num_classes=10, norm="oabn", oabn_k=0.1)
      >>> [layer.name for layer in model.layers][:3], model.output_shape
      (['image', 'stem', 'stage1_block1'], (None, 10))
    """
    _check_family(variant, "repvgg")
    return build_network(variant, input_shape, num_classes, norm, block, **options)


def build_mobileone(
    variant: str | Variant,
    input_shape: tuple[int | None, int | None, int],
    num_classes: int,
    norm: str = "bn",
    block: str = "mobileone",
    **options: Any,
) -> keras.Model:
    """Builds a MobileOne classifier (arXiv:2206.04040) in training form, see `build_network`.

    Args:
      variant: Name of a variant of MobileOne, or a `Variant` of that family.
      input_shape: Height, width and channels of the images; height and width may be None.
      num_classes: Number of logits.
      norm: Normalization of the branches, "bn" or "oabn" (MobileOne blocks only).
      block: Kind of blocks, "mobileone" or "qamobileone".
      **options: Further arguments of `build_network`.

    Raises:
      ValueError: As `build_network`, and for a variant of another family.

    Example:
      >>> from tf_repvgg.models import build_mobileone
      >>> model = build_mobileone("cifar-mobileone", (32, 32, 3), num_classes=10, norm="oabn")
      >>> list(model.get_layer("stage3_block2_pointwise").branches())
      ['conv1', 'conv2', 'identity']
    """
    _check_family(variant, "mobileone")
    return build_network(variant, input_shape, num_classes, norm, block, **options)


def find_blocks(family: str) -> tuple[str, ...]:
    """Names of the blocks that networks of a family can have, its own first.

    Args:
      family: Family of a `Variant`.

    Example:
      >>> from tf_repvgg.models import find_blocks
      >>> find_blocks("mobileone")
      ('mobileone', 'qamobileone')
    """
    return tuple(name for name in BLOCKS if name.endswith(family))


def _check_family(variant, family):
    actual = find_variant(variant).family if isinstance(variant, str) else variant.family
    if actual != family:
        raise ValueError(f"variant {variant!r} is of the family {actual!r}; build it with build_{actual}")


def _check_block(family, block):
    """The name of a block that networks of the family can have."""
    known = find_blocks(family)
    if block is None:
        return known[0]
    if block not in known:
        raise ValueError(f"block is {block!r}; known for variants of the family {family!r}: {', '.join(known)}")
    return block


def _block_shapes(variant) -> dict[str, dict[str, Any]]:
    """{name of a block: its filters, strides and so on} in order of execution."""
    se_in_stem = variant.se_reduction if variant.se_depths is None else None
    shapes = {"stem": {"filters": variant.stem_width, "strides": variant.stem_stride, "se_reduction": se_in_stem}}
    channels = variant.stem_width
    for stage, (width, depth, stride, se_depth) in enumerate(
        zip(variant.widths, variant.depths, variant.strides, variant.se_depths or variant.depths, strict=True), start=1
    ):
        for index in range(1, depth + 1):
            name = f"stage{stage}_block{index}"
            strides = stride if index == 1 else 1
            common = {"se_reduction": variant.se_reduction if index > depth - se_depth else None}
            if variant.family == "repvgg":
                groups = variant.groups if len(shapes) % 2 == 0 else 1
                shapes[name] = {"filters": width, "strides": strides, "groups": groups, **common}
                continue
            common["conv_branches"] = variant.conv_branches
            shapes[f"{name}_depthwise"] = {"filters": channels, "strides": strides, "groups": channels, **common}
            shapes[f"{name}_pointwise"] = {"filters": width, "kernel_size": 1, **common}
            channels = width
    return shapes
