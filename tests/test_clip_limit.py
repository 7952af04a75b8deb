"""OABN's limit k: how it is written, and limits relative to the block's kernel."""

import numpy as np
import pytest
import tf_keras as keras
from helpers.blocks import clip_ratio

from tf_repvgg import by_name
from tf_repvgg.layers import CLIP_MODES, ClipLimit, RepVGGBlock
from tf_repvgg.layers.clip_limit import parse_clip_limits


@pytest.mark.parametrize(
    "k, value, relative",
    [(0.1, 0.1, False), ("0.1", 0.1, False), ("inf", float("inf"), False), ("6std", 6, True), ("0.5 std", 0.5, True)],
)
def test_clip_limit(k, value, relative):
    limit = ClipLimit.parse(k)
    assert (limit.value, limit.relative) == (value, relative)


def test_k_by_layer_name():
    limits = parse_clip_limits("stage4_.*=0.05,.*=6std")
    assert limits == {"stage4_.*": "0.05", ".*": "6std"}
    assert by_name.resolve(limits, ["stage4_block1", "stem"], "k") == {"stage4_block1": "0.05", "stem": "6std"}
    assert parse_clip_limits(0.3) == {".*": 0.3}
    with pytest.raises(ValueError, match=r"no pattern of k matches layer 'stem'.*add '\.\*'"):
        by_name.resolve({"stage.*": 0.1}, ["stage1_block1", "stem"], "k")
    with pytest.raises(ValueError, match="pattern 'stage9' of k matches no layer"):
        by_name.resolve({"stage9": 0.1, ".*": 0.1}, ["stage1_block1", "stem"], "k")
    for text, message in [
        ("a=0", "above 0"),
        ("(=1", "not a regular expression"),
        ("a=1,b", "it must be a number"),
        ("a=1,a=2", "appears twice"),
        ("", "above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_clip_limits(text)


def make_block_model(**kwargs):
    inputs = keras.Input((6, 6, 8))
    features = RepVGGBlock(8, norm="oabn", oabn_k="6std", momentum=0.5, name="block", **kwargs)(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, dtype="float32")(keras.layers.GlobalAveragePooling2D()(features)))


def compute_limit(block):
    """Six standard deviations of the merged 3x3 and 1x1 kernels, straight from the weights."""
    merged = np.zeros(block.conv3x3.kernel.shape)
    for conv, norm, taps in ((block.conv3x3, block.norm3x3, slice(0, 3)), (block.conv1x1, block.norm1x1, slice(1, 2))):
        scale = norm.gamma.numpy() / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
        merged[taps, taps] += conv.kernel.numpy() * scale
    return 6 * merged.std()


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("mode", CLIP_MODES)
def test_relative_k_follows_the_kernel(policy, mode):
    keras.mixed_precision.set_global_policy(policy)
    model = make_block_model(clip_mode=mode)
    block = model.get_layer("block")
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    images = np.random.default_rng(0).standard_normal((16, 6, 6, 8)).astype("float32")
    limits = []
    for _ in range(4):
        model.train_on_batch(images, np.arange(16) % 3)
        limits.append(compute_limit(block))
        assert np.all(clip_ratio(block.norm_identity) <= limits[-1] * (1 + 1e-5))
    assert len(set(limits)) == 4
    block.conv3x3.kernel.assign(block.conv3x3.kernel / 100)
    block.conv1x1.kernel.assign(block.conv1x1.kernel / 100)
    block.norm_identity.gamma.assign(np.full(8, 5.0))
    np.testing.assert_allclose(clip_ratio(block.norm_identity), compute_limit(block), rtol=1e-5)


@pytest.mark.parametrize("form", ["model.keras", "saved_model"])
def test_relative_k_survives_save_and_load(tmp_path, form):
    model = make_block_model()
    model.get_layer("block").norm_identity.gamma.assign(np.full(8, 50.0))
    model.save(tmp_path / form)
    loaded = keras.models.load_model(tmp_path / form)
    images = np.random.default_rng(0).standard_normal((2, 6, 6, 8)).astype("float32")
    np.testing.assert_allclose(loaded(images), model(images), rtol=1e-6)
    block = loaded.get_layer("block")
    np.testing.assert_allclose(clip_ratio(block.norm_identity), compute_limit(block), rtol=1e-5)
