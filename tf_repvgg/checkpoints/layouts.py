"""How other projects name the weights of the networks in `tf_repvgg.models`: one row for each project."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tf_repvgg.checkpoints.slots import HEAD, MERGED, Slot

# Keras's names of the weights of a layer, and PyTorch's.
_LEAVES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# A counter of every batch normalization that PyTorch writes and, with a momentum that is a number, never reads.
COUNTER = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names of weights in one project.

    Attributes:
      kind: Kind of blocks, in `models.BLOCKS`.
      family: Family of the networks, in `models.FAMILIES`. Blocks of a family have the same layers in deploy form.
      stem: Name of the first block.
      stages: Name of a block in a stage, with `{stage}` counted from 1, and `{stage0}` and `{block0}` from 0. The two
        blocks of a pair of MobileOne count as two.
      head: Name of the last layer.
      parts: {part of a block, see `slots`: its name}. "conv" and "norm" stand for conv1, conv2 and so on, with `{0}`
        counted from 0.
      anchor: Part of the stem by whose name layouts are told apart.

    Example:
      >>> from tf_repvgg.checkpoints import LAYOUTS
      >>> LAYOUTS["timm_repvgg"].module("stage2_block1", "conv3x3")
      'stages.1.0.conv_kxk.conv'
    """

    kind: str
    family: str
    stem: str
    stages: str
    head: str
    parts: Mapping[str, str]
    anchor: str

    def kind_in(self, form: str) -> str:
        """Kind of network in a form, "training" or "deploy"."""
        return self.kind if form == "training" else self.family

    def module(self, block: str, part: str) -> str | None:
        """Name of the layer that is a part of a block; None if the layout has no such part.

        Args:
          block: Name of the block in a network of `tf_repvgg.models`: "stem", "stage1_block1", or that of the head.
          part: Part of the block; an empty text for the head.
        """
        if block == HEAD:
            return self.head
        if number := re.fullmatch(r"(conv|norm)(\d+)", part):
            part, index = number[1], int(number[2]) - 1
        else:
            index = 0
        if part not in self.parts:
            return None
        return f"{self._name_block(block)}.{self.parts[part].format(index)}"

    def _name_block(self, block):
        numbers = re.fullmatch(r"stage(\d+)_block(\d+)(?:_(depthwise|pointwise))?", block)
        if not numbers:
            return self.stem
        stage, position = int(numbers[1]), int(numbers[2]) - 1
        if numbers[3]:
            position = 2 * position + (numbers[3] == "pointwise")
        return self.stages.format(stage=stage, stage0=stage - 1, block0=position)

    def key(self, slot: Slot) -> str:
        """Key of a weight.

        Raises:
          ValueError: If the layout has no such part.
        """
        module = self.module(slot.block, slot.part)
        if module is None:
            raise ValueError(
                f"block {slot.block!r} has a part {slot.part!r}, which networks of this layout do not have; their "
                f"parts are {', '.join(self.parts)}"
            )
        return f"{module}.{_LEAVES[slot.leaf]}"

    def anchor_key(self, form: str) -> str:
        """Key of the weight that tells the layout in one form, "training" or "deploy"."""
        return f"{self.module('stem', self.anchor if form == 'training' else MERGED)}.weight"


_ORIGINAL = {"stem": "stage0", "stages": "stage{stage}.{block0}", "head": "linear"}
_ORIGINAL_PARTS = {"conv3x3": "rbr_dense.conv", "norm3x3": "rbr_dense.bn", MERGED: "rbr_reparam"}
_TIMM = {"stem": "stem", "stages": "stages.{stage0}.{block0}", "head": "head.fc"}
_TIMM_PARTS = {
    "norm_identity": "identity",
    "se_reduce": "attn.fc1",
    "se_expand": "attn.fc2",
    MERGED: "reparam_conv",
}

LAYOUTS = {
    # github.com/DingXiaoH/RepVGG
    "repvgg": Layout(
        kind="repvgg",
        family="repvgg",
        parts=_ORIGINAL_PARTS
        | {
            "conv1x1": "rbr_1x1.conv",
            "norm1x1": "rbr_1x1.bn",
            "norm_identity": "rbr_identity",
            "se_reduce": "se.down",
            "se_expand": "se.up",
        },
        anchor="conv1x1",
        **_ORIGINAL,
    ),
    # The authors' block (QARepVGGBlockV2), as in YOLOv6; networks as in the row above. Where it has a
    # squeeze-and-excite, that comes before the last normalization, so that it is another network than ours.
    "qarepvgg": Layout(
        kind="qarepvgg",
        family="repvgg",
        parts=_ORIGINAL_PARTS | {"conv1x1": "rbr_1x1", "norm_sum": "bn"},
        anchor="conv1x1",
        **_ORIGINAL,
    ),
    # timm's repvgg_*
    "timm_repvgg": Layout(
        kind="repvgg",
        family="repvgg",
        parts=_TIMM_PARTS
        | {
            "conv3x3": "conv_kxk.conv",
            "norm3x3": "conv_kxk.bn",
            "conv1x1": "conv_1x1.conv",
            "norm1x1": "conv_1x1.bn",
        },
        anchor="conv1x1",
        **_TIMM,
    ),
    # github.com/apple/ml-mobileone
    "mobileone": Layout(
        kind="mobileone",
        family="mobileone",
        parts={
            "conv": "rbr_conv.{0}.conv",
            "norm": "rbr_conv.{0}.bn",
            "conv_scale": "rbr_scale.conv",
            "norm_scale": "rbr_scale.bn",
            "norm_identity": "rbr_skip",
            "se_reduce": "se.reduce",
            "se_expand": "se.expand",
            MERGED: "reparam_conv",
        },
        anchor="conv_scale",
        **_ORIGINAL,
    ),
    # timm's mobileone_*
    "timm_mobileone": Layout(
        kind="mobileone",
        family="mobileone",
        parts=_TIMM_PARTS
        | {
            "conv": "conv_kxk.{0}.conv",
            "norm": "conv_kxk.{0}.bn",
            "conv_scale": "conv_scale.conv",
            "norm_scale": "conv_scale.bn",
        },
        anchor="conv_scale",
        **_TIMM,
    ),
}


@dataclasses.dataclass(frozen=True)
class Detected:
    """What the keys of a file say.

    Attributes:
      name: Name of the layout in `LAYOUTS`.
      form: "training" or "deploy".
      prefix: Text before every key, such as "module.".
    """

    name: str
    form: str
    prefix: str


def detect(path: str | Path, keys: Iterable[str], kind: str | None = None) -> Detected:
    """Finds the layout of a file.

    Args:
      path: File, for messages.
      keys: Keys of the file.
      kind: Kind of network that is preferred where the keys fit several: that of the model to load into.

    Raises:
      ValueError: If the keys are of no layout, or of several networks.
    """
    names = list(keys)
    matches = []
    for layout_name, layout in LAYOUTS.items():
        for form in ("training", "deploy"):
            anchor = layout.anchor_key(form)
            prefixes = [key.removesuffix(anchor) for key in names if key == anchor or key.endswith(f".{anchor}")]
            matches += [(layout.kind_in(form) != kind, Detected(layout_name, form, prefix)) for prefix in prefixes]
    if not matches:
        raise ValueError(
            f"the keys of {str(path)!r} ({', '.join(names[:3])[:200]}, ...) are of no known layout; known: "
            f"{', '.join(LAYOUTS)}, whose stems are {', '.join(dict.fromkeys(row.stem for row in LAYOUTS.values()))}"
        )
    if len(networks := {match.prefix for _, match in matches}) > 1:
        names = sorted(map(repr, networks))
        raise ValueError(f"{str(path)!r} holds several networks, under {', '.join(names)}; keep one of them")
    return min(matches, key=lambda match: match[0])[1]
