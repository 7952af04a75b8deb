"""MobileOne: counts against published ones (arXiv:2206.04040), and the options of its builder."""

import dataclasses

import numpy as np
import pytest
from helpers.networks import list_blocks, shrink_variant

from tf_repvgg.layers import OutlierAwareBatchNormalization
from tf_repvgg.models import VARIANTS, build_mobileone, complexity

# (parameters in training form without running statistics, in deploy form) of timm 1.0.x's mobileone_s0 to s4 with 1000
# classes, and millions of multiply-accumulates at 224x224 in the MobileOne paper's table 9.
MOBILEONE = {
    "S0": (5_293_272, 2_078_504, 275),
    "S1": (4_825_192, 4_764_840, 825),
    "S2": (7_884_648, 7_808_168, 1299),
    "S3": (10_170_600, 10_078_312, 1896),
    "S4": (14_951_248, 14_838_352, 2978),
}


def count_mobileone(variant, classes, size):
    """Parameters in training form without running statistics and in deploy form, MACs in deploy form; by hand."""
    training = deploy = macs = 0

    def add(inputs, filters, kernel, groups, branches, stride, squeezed):
        nonlocal training, deploy, macs, size
        size = -(-size // stride)
        weights = kernel**2 * inputs * filters // groups
        has_identity = stride == 1 and inputs == filters
        norms = branches + (kernel > 1) + has_identity
        scale = inputs * filters // groups if kernel > 1 else 0
        se = 2 * filters * squeezed + squeezed + filters if squeezed else 0
        training += branches * weights + scale + 2 * filters * norms + se
        deploy += weights + filters + se
        macs += size**2 * weights + (2 * filters * squeezed if squeezed else 0)

    add(3, variant.stem_width, 3, 1, 1, variant.stem_stride, 0)
    channels = variant.stem_width
    for stage, width in enumerate(variant.widths):
        for index in range(variant.depths[stage]):
            in_tail = variant.se_depths is not None and variant.depths[stage] - index <= variant.se_depths[stage]
            stride = variant.strides[stage] if index == 0 else 1
            for filters, kernel, groups in ((channels, 3, channels), (width, 1, 1)):
                squeezed = filters // variant.se_reduction if in_tail else 0
                add(channels, filters, kernel, groups, variant.conv_branches, stride if kernel > 1 else 1, squeezed)
            channels = width
    head = channels * classes + classes
    return training + head, deploy + head, macs + channels * classes


def test_counts_of_mobileone_are_the_published_ones():
    """A count by hand is that of the built network, and for S0 to S4 the published one."""
    variant = dataclasses.replace(shrink_variant(VARIANTS["S4"]), conv_branches=2)
    model = build_mobileone(variant, (40, 40, 3), 10)
    counts = complexity(model)
    running_statistics = sum(int(np.prod(weight.shape)) for weight in model.non_trainable_weights)
    assert count_mobileone(variant, 10, 40) == (
        counts.training_parameters - running_statistics,
        counts.deploy_parameters,
        counts.deploy_macs,
    )
    for name, (training, deploy, macs) in MOBILEONE.items():
        *parameters, actual_macs = count_mobileone(VARIANTS[name], 1000, 224)
        assert parameters == [training, deploy], name
        assert actual_macs / 1e6 == pytest.approx(macs, rel=0.01), name


def test_mobileone_takes_the_same_options():
    limits = {".*_depthwise": 0.2, ".*": "6std"}
    model = build_mobileone(shrink_variant(VARIANTS["cifar-mobileone"]), (None, None, 3), 7, norm="oabn", oabn_k=limits)
    names = [block.name for block in list_blocks(model)]
    assert names[:3] == ["stem", "stage1_block1_depthwise", "stage1_block1_pointwise"]
    assert {block.oabn_k for block in list_blocks(model) if block.name.endswith("_depthwise")} == {0.2}
    assert isinstance(model.get_layer("stage2_block2_pointwise").norm_identity, OutlierAwareBatchNormalization)
    assert [len(block.get_convolutions()) for block in list_blocks(model)][:3] == [2, 3, 2]
