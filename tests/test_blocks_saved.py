"""Blocks and their configurations, saved, loaded and copied."""

import copy

import numpy as np
import pytest
import tf_keras as keras
from helpers.blocks import BLOCKS, images, make_model
from helpers.random_weights import randomize

from tf_repvgg.layers import QARepVGGBlock, RepVGGBlock


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("form", ["model.keras", "saved_model"])
def test_save_and_load(tmp_path, kind, form):
    model = make_model(BLOCKS[kind](groups=2, padding="symmetric", momentum=0.8, epsilon=1e-4, activation="elu"))
    randomize(model)
    model.save(tmp_path / form)
    loaded = keras.models.load_model(tmp_path / form)
    x = images()
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-6, atol=1e-6)
    saved_block, loaded_block = model.layers[1], loaded.layers[1]
    assert type(loaded_block) is type(saved_block)
    assert loaded_block.get_config() == saved_block.get_config()
    pairs = zip(saved_block.equivalent_kernel_and_bias(), loaded_block.equivalent_kernel_and_bias(), strict=True)
    for before, after in pairs:
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-7)


def test_config_holds_every_argument():
    block = RepVGGBlock(
        8, strides=2, padding="symmetric", groups=2, norm="oabn", oabn_k="4std", clip_mode="return_only", name="b"
    )
    config = block.get_config()
    expected = {"strides": 2, "padding": "symmetric", "groups": 2, "oabn_k": "4std", "clip_mode": "return_only"}
    assert expected.items() <= config.items()
    assert RepVGGBlock.from_config(config).get_config() == config


@keras.saving.register_keras_serializable(package="tests")
class SubclassedNet(keras.Model):
    """A user's own model class, whose layers Keras rebuilds from their input shapes alone."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [RepVGGBlock(8, norm="oabn", name="first"), QARepVGGBlock(8, strides=2, name="second")]

    def call(self, inputs, training=None):
        for block in self.blocks:
            inputs = block(inputs, training=training)
        return inputs


@pytest.mark.parametrize("form", ["model.keras", "saved_model"])
def test_save_and_load_inside_a_subclassed_model(tmp_path, form):
    model = SubclassedNet()
    x = images()
    model(x)
    randomize(model)
    model.save(tmp_path / form)
    loaded = keras.models.load_model(tmp_path / form)
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-6, atol=1e-6)


def test_weights_of_a_loaded_model_have_the_names_of_a_new_one(tmp_path):
    """train/main.py --init_from compares them."""
    model = make_model(RepVGGBlock(8, name="block"), (6, 6))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [weight.name for weight in loaded.weights] == [weight.name for weight in model.weights]
    assert loaded.weights[0].name == "block/conv3x3/kernel:0"


_LOAD = """
import sys
import numpy as np
import tf_repvgg
import tf_keras as keras
for path in sys.argv[2:]:
    model = keras.models.load_model(path)
    data = np.load(sys.argv[1])
    np.testing.assert_allclose(model(data["images"]), data["outputs"], rtol=1e-4, atol=1e-5)
    print([type(layer).__name__ for layer in model.layers])
"""


def test_load_in_a_new_process_without_custom_objects(tmp_path, run_program):
    inputs = keras.Input((None, None, 3))
    features = RepVGGBlock(4, norm="oabn", oabn_k="6std")(RepVGGBlock(4, strides=2)(inputs))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(QARepVGGBlock(4)(features)))
    randomize(model)
    x = images(channels=3)
    np.savez(tmp_path / "data.npz", images=x, outputs=model(x))
    paths = [tmp_path / "model.keras", tmp_path / "saved_model"]
    for path in paths:
        model.save(path)
    result = run_program("-c", _LOAD, tmp_path / "data.npz", *paths)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("'RepVGGBlock', 'RepVGGBlock', 'QARepVGGBlock'") == 2


def test_weights_of_bn_blocks_load_into_oabn_blocks(tmp_path):
    """Names and shapes are the same, so OABN can start from a trained BN model."""
    path = str(tmp_path / "model.weights.h5")
    plain = make_model(RepVGGBlock(8, name="block"), (6, 6))
    randomize(plain, dead_share=0)
    plain.save_weights(path)
    clipped = make_model(RepVGGBlock(8, norm="oabn", oabn_k=0.05, name="block"), (6, 6))
    clipped.load_weights(path)
    for actual, expected in zip(clipped.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert np.max(np.abs(clipped.layers[1].branches()["identity"][0])) <= 0.05 * (1 + 1e-6)


@pytest.mark.parametrize("form", ["model.keras", "saved_model", "model.weights.h5"])
def test_blocks_with_squeeze_excite_are_saved(tmp_path, form):
    model = make_model(RepVGGBlock(8, se_reduction=2, groups=2, name="block"), (6, 6))
    randomize(model)
    x = images(6, 6)
    if form.endswith("h5"):
        model.save_weights(str(tmp_path / form))
        loaded = make_model(RepVGGBlock(8, se_reduction=2, groups=2, name="block"), (6, 6))
        loaded.load_weights(str(tmp_path / form))
    else:
        model.save(tmp_path / form)
        loaded = keras.models.load_model(tmp_path / form)
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-6, atol=1e-6)


def test_arguments_may_be_numpy_integers(tmp_path):
    block = RepVGGBlock(np.int64(8), strides=np.int32(1), groups=np.int64(2), se_reduction=np.int64(2), name="block")
    model = make_model(block, (6, 6))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").get_layer("block")
    assert (loaded.filters, loaded.groups, loaded.se_reduction) == (8, 2, 2)


def test_a_block_can_be_copied():
    copied_block = copy.deepcopy(RepVGGBlock(8, norm="oabn", oabn_k="6std"))
    x = images()
    copied_block(x)
    assert copied_block.branches().keys() == {"conv3x3", "conv1x1", "identity"}
