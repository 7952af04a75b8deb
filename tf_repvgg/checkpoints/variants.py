"""Which variants of `tf_repvgg.models` a checkpoint may be of."""

import itertools
from collections.abc import Mapping

from tf_repvgg.checkpoints.files import StoredArray
from tf_repvgg.checkpoints.layouts import LAYOUTS, Detected
from tf_repvgg.checkpoints.slots import MERGED
from tf_repvgg.models import VARIANTS


def list_variants(arrays: Mapping[str, StoredArray], detected: Detected) -> list[str]:
    """Names of the variants that have the file's widths, depths, groups and branches; strides are not in a file.

    Args:
      arrays: {key: array} of the file.
      detected: Layout of the file.
    """
    layout = LAYOUTS[detected.name]
    is_pair = layout.family == "mobileone"

    def find_shape(block, part):
        array = arrays.get(f"{detected.prefix}{layout.module(block, part)}.weight")
        return array.shape if array is not None and len(array.shape) == 4 else None

    part = MERGED if detected.form == "deploy" else "conv1" if is_pair else "conv3x3"
    ending = "_pointwise" if is_pair else ""
    stages = []
    for stage in itertools.count(1):
        names = (f"stage{stage}_block{index}{ending}" for index in itertools.count(1))
        shapes = list(itertools.takewhile(bool, (find_shape(name, part) for name in names)))
        if not shapes:
            break
        stages.append(shapes)
    stem = find_shape("stem", part)
    actual = {
        "family": layout.family,
        "stem_width": stem and stem[0],
        "widths": tuple(shapes[0][0] for shapes in stages),
        "depths": tuple(map(len, stages)),
    }
    if not is_pair and stages and len(stages[0]) > 1:
        outputs, inputs_per_group, *_ = stages[0][1]
        actual["groups"] = outputs // max(inputs_per_group, 1)
    elif is_pair and detected.form == "training":
        branches = (find_shape("stage1_block1_pointwise", f"conv{number}") for number in itertools.count(1))
        actual["conv_branches"] = sum(1 for _ in itertools.takewhile(bool, branches))
    return [
        name
        for name, variant in VARIANTS.items()
        if all(getattr(variant, field) == value for field, value in actual.items())
    ]
