"""Every kind of block, and comparison of a model with its fused form."""

import numpy as np
import tensorflow as tf

from helpers.random_weights import relative_error
from tf_repvgg.layers import MobileOneBlock, QAMobileOneBlock, QARepVGGBlock, RepVGGBlock

TOLERANCE = 1e-4

# Every choice that goes together: block type, norm, branches with OABN, identity.
KINDS = {
    "bn, norm": (RepVGGBlock, {}),
    "bn, none": (RepVGGBlock, {"identity": "none"}),
    "bn, constant": (RepVGGBlock, {"identity": "constant", "identity_gain": 0.3}),
    "oabn, norm": (RepVGGBlock, {"norm": "oabn", "oabn_k": 0.2}),
    "oabn relative, norm": (RepVGGBlock, {"norm": "oabn", "oabn_k": "6std"}),
    "oabn all, norm": (RepVGGBlock, {"norm": "oabn", "oabn_k": 0.2, "oabn_branches": "all"}),
    "oabn all, none": (RepVGGBlock, {"norm": "oabn", "oabn_k": 0.2, "oabn_branches": "all", "identity": "none"}),
    "oabn all, constant": (
        RepVGGBlock,
        {"norm": "oabn", "oabn_k": 0.2, "oabn_branches": "all", "identity": "constant"},
    ),
    "qarepvgg": (QARepVGGBlock, {}),
}
# Squeeze-and-excite after the sum of either.
KINDS_WITH_SE = {
    "oabn, norm, SE": (RepVGGBlock, {"norm": "oabn", "oabn_k": 0.2, "se_reduction": 4}),
    "qarepvgg, SE": (QARepVGGBlock, {"se_reduction": 4}),
}
MOBILEONE_KINDS = {
    "mobileone": (MobileOneBlock, {"conv_branches": 3, "norm": "oabn", "oabn_k": "6std"}),
    "mobileone 5x5, oabn all": (
        MobileOneBlock,
        {"kernel_size": 5, "norm": "oabn", "oabn_k": 0.2, "oabn_branches": "all", "se_reduction": 4},
    ),
    "mobileone pointwise": (MobileOneBlock, {"kernel_size": 1, "conv_branches": 2, "norm": "oabn"}),
    "qamobileone": (QAMobileOneBlock, {"conv_branches": 2}),
    "qamobileone pointwise": (QAMobileOneBlock, {"kernel_size": 1}),
}
ALL_KINDS = KINDS | KINDS_WITH_SE | MOBILEONE_KINDS


def images(height, width, channels=3, count=2, seed=0):
    return np.random.default_rng(seed).standard_normal((count, height, width, channels)).astype("float32")


def assert_same_function(model, fused, *inputs, tolerance=TOLERANCE):
    for x in inputs:
        expected = tf.nest.flatten(model(x, training=False))
        actual = tf.nest.flatten(fused(x, training=False))
        for expected_output, actual_output in zip(expected, actual, strict=True):
            assert relative_error(expected_output, actual_output) < tolerance
