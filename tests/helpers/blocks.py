"""One block of every kind, and models of a single block."""

import numpy as np
import tf_keras as keras

from tf_repvgg.layers import MobileOneBlock, QARepVGGBlock, RepVGGBlock


def images(height=9, width=8, channels=8, count=2, seed=0):
    return np.random.default_rng(seed).standard_normal((count, height, width, channels)).astype("float32")


def make_model(block, size=(None, None), channels=8):
    inputs = keras.Input((*size, channels))
    return keras.Model(inputs, block(inputs))


BLOCKS = {
    "bn": lambda **kwargs: RepVGGBlock(8, **kwargs),
    "oabn": lambda **kwargs: RepVGGBlock(8, norm="oabn", oabn_k=0.1, **kwargs),
    "oabn relative": lambda **kwargs: RepVGGBlock(8, norm="oabn", oabn_k="6std", **kwargs),
    "oabn all": lambda **kwargs: RepVGGBlock(8, norm="oabn", oabn_branches="all", clip_mode="return_only", **kwargs),
    "none": lambda **kwargs: RepVGGBlock(8, identity="none", **kwargs),
    "constant": lambda **kwargs: RepVGGBlock(8, identity="constant", identity_gain=0.25, **kwargs),
    "qarepvgg": lambda **kwargs: QARepVGGBlock(8, **kwargs),
    "mobileone": lambda **kwargs: MobileOneBlock(8, conv_branches=2, norm="oabn", oabn_k="6std", **kwargs),
}


def clip_ratio(norm):
    """|gamma_hat| / sqrt(running variance + epsilon), in double precision."""
    variance = norm.moving_variance.numpy().astype(np.float64)
    return np.abs(norm.effective_gamma().numpy().astype(np.float64)) / np.sqrt(variance + norm.epsilon)
