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


def test_activations_image_by_image():
    """Nested models, shared layers and several inputs, beside what Keras computes."""
    left, right = keras.Input([8, 8, 2], name="left"), keras.Input([8, 8, 2], name="right")
    shared = keras.layers.Conv2D(4, 3, name="shared")
    inner_input = keras.Input([6, 6, 4])
    inner = keras.Model(
        inner_input, keras.layers.ReLU(name="relu")(keras.layers.Conv2D(3, 1, name="conv")(inner_input))
    )
    x = keras.layers.Add(name="sum")([shared(left), shared(right)])
    x = keras.layers.Dropout(0.9)(inner(x))
    model = keras.Model([left, right], keras.layers.Dense(2, name="logits")(keras.layers.Flatten()(x)))
    images = np.random.default_rng(0).normal(size=[2, 10, 8, 8, 2]).astype("float32")
    images[:, 7] *= 100
    batches = [list(images[:, start : start + 4]) for start in (0, 4, 8)]
    lines = []
    layers = {layer.name: layer for layer in outliers.report_activations(model, batches, lines.append)}
    assert list(layers) == ["shared", "sum", "conv", "relu", "logits"]
    outputs = keras.Model(model.inputs, [model.get_layer("sum").output, model.output])(list(images))
    for name, values in zip(("sum", "logits"), outputs, strict=True):
        largest = np.abs(values).reshape(10, -1).max(axis=1)
        layer = layers[name]
        assert (layer.median, layer.largest) == pytest.approx((np.median(largest), largest.max()), rel=1e-5)
        assert layer.percentile_99 == pytest.approx(np.percentile(largest, 99), rel=1e-5)
        assert layer.image == 7 and layer.factor > outliers.EXTREME_FACTOR
    calls = [np.abs(shared(part)).reshape(10, -1).max(axis=1) for part in images]
    assert layers["shared"].largest == pytest.approx(np.max(calls), rel=1e-5)
    warnings = [line for line in lines if line.startswith("warning: on image 7, ")]
    assert len(warnings) == len(layers) and len(lines) == len(layers) + 1
    magnitudes = outliers.measure_activations(model, batches)
    (first, second) = outliers.find_extreme_images(magnitudes, count=2)
    assert first["image"] == 7 and first["factors"]["sum"] == pytest.approx(layers["sum"].factor, rel=1e-5)
    assert max(second["factors"].values()) < outliers.EXTREME_FACTOR


def test_activations_of_ordinary_images_warn_of_nothing():
    model = build_repvgg("digits", (8, 8, 1), 10)
    lines = []
    images = np.random.default_rng(0).normal(size=[16, 8, 8, 1]).astype("float32")
    before, after = (outliers.report_activations(network, [images], lines.append) for network in (model, fuse(model)))
    assert len(lines) == 2 and "stage1_block1" in lines[0]
    relus = [layer.largest for layer in after if layer.name.endswith("relu")] or [layer.largest for layer in after[:-1]]
    assert [layer.largest for layer in before[:-1]] == pytest.approx(relus, rel=1e-4)


def test_activations_without_images_or_values():
    model = keras.Sequential([keras.Input([2]), keras.layers.ReLU(name="relu")])
    with pytest.raises(ValueError, match="there are no images"):
        outliers.report_activations(model, [])
    (layer,) = outliers.report_activations(model, [np.zeros([3, 2], "float32")])
    assert layer.factor == 1
    assert outliers.find_extreme_images({"relu": np.zeros(3)}) == []
    assert outliers.describe_activations({"relu": np.array([0.0, 0, 1])})[0].factor == np.inf
