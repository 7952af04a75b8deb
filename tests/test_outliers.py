"""The outlier report: statistics of merged kernels, for blocks in both forms and every kind of convolution."""

import dataclasses

import numpy as np
import pytest
import tf_keras as keras

from tf_repvgg import outliers
from tf_repvgg.fusion import fuse
from tf_repvgg.models import VARIANTS, build_repvgg


def test_outlier_report():
    model = build_repvgg("digits", (8, 8, 1), 10, norm="oabn", oabn_k=0.05)
    block = model.get_layer("stage1_block2")
    block.norm_identity.gamma.assign([0.0] * 4 + [0.02] * 4 + [3.0] * 8)
    lines = []
    layers = {layer.name: layer for layer in outliers.report(model, print_fn=lines.append)}
    assert list(layers) == ["stem", *(f"stage{s}_block{i}" for s in (1, 2, 3) for i in (1, 2)), "logits"]
    printed = "\n".join(lines)
    assert all(name in printed for name in layers)
    layer = layers["stage1_block2"]
    kernel = block.equivalent_kernel_and_bias()[0].numpy()
    assert layer.std == pytest.approx(kernel.std(), rel=1e-5)
    assert layer.largest == pytest.approx(np.abs(kernel).max(), rel=1e-6)
    assert layer.outlier_ratio == pytest.approx(np.abs(kernel).max() / kernel.std(), rel=1e-5)
    assert layer.kurtosis == pytest.approx(np.mean((kernel - kernel.mean()) ** 4) / kernel.var() ** 2, rel=1e-4)
    assert layer.branch_largest["identity"] == pytest.approx(0.05, rel=1e-5)
    assert layer.clipped_share == 0.5
    assert layer.gamma_over_sigma == pytest.approx((0, (0.02 + 0.05) / 2, 0.05), rel=1e-4)
    assert layers["stage1_block1"].gamma_over_sigma is not None  # 16 channels in, 16 out: it has an identity
    assert layers["stem"].gamma_over_sigma is None
    assert layers["logits"].branch_largest == {}


def test_outlier_report_knows_both_forms_and_both_norms():
    model = build_repvgg(dataclasses.replace(VARIANTS["digits"], se_reduction=8), (8, 8, 1), 10)
    before, after = outliers.report(model), outliers.report(fuse(model))
    assert [layer.name for layer in before] == [layer.name for layer in after]
    for layer, fused_layer in zip(before, after, strict=True):
        assert layer.outlier_ratio == pytest.approx(fused_layer.outlier_ratio, rel=1e-5)
        assert layer.clipped_share is None
    # Gammas start at 1 and variances too: the identity tap of plain BN is 1.
    (block,) = [layer for layer in before if layer.name == "stage1_block1"]
    assert block.branch_largest["identity"] == pytest.approx(1, rel=1e-4)
    (record,) = outliers.as_records([block])
    assert record["gamma_over_sigma"] == pytest.approx((1, 1, 1), rel=1e-4)


def test_outlier_report_of_every_kind_of_convolution():
    """Channels of very different sizes are no outliers within a channel, on whichever axis they lie."""
    scales = np.array([1, 10, 100, 1000])

    def spread(kernel, axis):
        noise = np.random.default_rng(0).uniform(-1, 1, kernel.shape)
        kernel.assign(noise * scales.reshape([-1 if index == axis else 1 for index in range(kernel.shape.rank)]))

    layers = [
        (keras.layers.Conv2D(4, 9, padding="same", groups=2, name="grouped"), {"kernel": 3}),
        (keras.layers.DepthwiseConv2D(9, padding="same", name="depthwise"), {"depthwise_kernel": 2}),
        (keras.layers.Conv2DTranspose(4, 9, padding="same", name="transposed"), {"kernel": 2}),
        (
            keras.layers.SeparableConv2D(4, 9, padding="same", name="separable"),
            {"depthwise_kernel": 2, "pointwise_kernel": 3},
        ),
    ]
    model = keras.Sequential([keras.Input((12, 12, 4)), *(layer for layer, _ in layers)])
    for layer, axes in layers:
        for kernel, axis in axes.items():
            spread(getattr(layer, kernel), axis)
    statistics = outliers.report(model)
    names = ["grouped", "depthwise", "transposed", "separable/depthwise", "separable/pointwise"]
    assert [layer.name for layer in statistics] == names
    for layer in statistics:
        assert layer.largest > 900 and 1 < layer.channel_outlier_ratio < 2 < layer.outlier_ratio, layer.name
