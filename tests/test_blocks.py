"""The blocks: what they refuse, what they save, and that their merged kernel can be trained through."""

import copy

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from helpers.random_weights import randomize, relative_error

from tf_repvgg import by_name
from tf_repvgg.layers import OutlierAwareBatchNormalization, QARepVGGBlock, RepVGGBlock
from tf_repvgg.layers.clip_limit import ClipLimit, parse_clip_limits


def images(height=9, width=8, channels=8, count=2, seed=0):
    return np.random.default_rng(seed).standard_normal((count, height, width, channels)).astype("float32")


def block_model(block, size=(None, None), channels=8):
    inputs = keras.Input((*size, channels))
    return keras.Model(inputs, block(inputs))


def merged_output(block, inputs):
    """The block's function from its merged kernel alone, before the activation; padding as PyTorch or Keras has it."""
    kernel, bias = block.equivalent_kernel_and_bias()
    padding = "SAME" if not block.needs_explicit_padding else [[0, 0], [1, 1], [1, 1], [0, 0]]
    return tf.nn.conv2d(inputs, kernel, block.strides, padding, dilations=block.dilation_rate) + bias


BLOCKS = {
    "bn": lambda **kwargs: RepVGGBlock(8, **kwargs),
    "oabn": lambda **kwargs: RepVGGBlock(8, norm="oabn", oabn_k=0.1, **kwargs),
    "oabn relative": lambda **kwargs: RepVGGBlock(8, norm="oabn", oabn_k="6std", **kwargs),
    "oabn all": lambda **kwargs: RepVGGBlock(8, norm="oabn", oabn_branches="all", clip_mode="return_only", **kwargs),
    "none": lambda **kwargs: RepVGGBlock(8, identity="none", **kwargs),
    "constant": lambda **kwargs: RepVGGBlock(8, identity="constant", identity_gain=0.25, **kwargs),
    "qarepvgg": lambda **kwargs: QARepVGGBlock(8, **kwargs),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_merged_kernel_is_the_block(kind):
    block = BLOCKS[kind](activation=None)
    x = images()
    block(x)
    randomize(block)
    assert relative_error(block(x), merged_output(block, x)) < 1e-5


@pytest.mark.parametrize("dilation", [2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_dilated_blocks_merge(dilation, groups, padding):
    for kind in ("oabn", "qarepvgg"):
        block = BLOCKS[kind](activation=None, dilation_rate=dilation, groups=groups, padding=padding)
        x = images(11, 10)
        block(x)
        randomize(block)
        assert block(x).shape == x.shape
        assert relative_error(block(x), merged_output(block, x)) < 1e-5


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_one_graph_for_every_input_size(stride, padding):
    """With Input((None, None, C)) the pixel under the centre tap is found at run time, in a compiled graph."""
    block = RepVGGBlock(8, strides=stride, padding=padding, activation=None)
    model = block_model(block, channels=3)
    randomize(block)
    function = tf.function(model, input_signature=[tf.TensorSpec([None, None, None, 3])])
    for height in range(5, 13):
        x = images(height, 17 - height, 3)
        found = function(x)
        assert found.shape == (2, -(-height // stride), -(-(17 - height) // stride), 8)
        assert found.shape == block.compute_output_shape(x.shape)
        assert relative_error(merged_output(block, x), found) < 1e-5
        np.testing.assert_allclose(model(x), found, rtol=1e-4, atol=1e-4)  # sizes known: the Python path


def test_symmetric_padding_is_pytorchs():
    """Output 0 of a strided block has its centre tap on pixel 0, whatever the parity of the input."""
    block = RepVGGBlock(1, strides=2, padding="symmetric", identity="none", activation=None, epsilon=0.0)
    block(np.zeros((1, 6, 6, 1), "float32"))
    kernel = np.arange(1, 10, dtype=np.float32).reshape(3, 3, 1, 1)
    block.conv3x3.kernel.assign(kernel)
    block.conv1x1.kernel.assign([[[[100.0]]]])
    picture = np.zeros((1, 6, 6, 1), "float32")
    picture[0, 2, 2] = 1  # under the centre tap of output (1, 1) and no other tap of another output
    found = block(picture).numpy()[0, ..., 0]
    assert found[1, 1] == 105
    assert np.count_nonzero(found) == 1


@pytest.mark.parametrize("make", [RepVGGBlock, QARepVGGBlock])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dilation_rate": 2, "strides": 2}, "dilation 2 with stride 2 cannot be fused exactly; use stride 1"),
        ({"groups": 3}, "8 filters cannot be split into 3 groups"),
        ({"groups": 0}, "groups is 0; it must be a whole number above 0"),
        ({"strides": 0}, "strides is 0"),
        ({"strides": 1.5}, "strides is 1.5"),
        ({"dilation_rate": -1}, "dilation_rate is -1"),
        ({"padding": "valid"}, "padding is 'valid'; known: same, symmetric"),
    ],
)
def test_refusals_at_construction(make, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make(8, **arguments)
    assert str(error.value).startswith(make.__name__ + ": ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"norm": "gn"}, "norm is 'gn'; known: bn, oabn"),
        ({"identity": "gain"}, "identity is 'gain'; known: norm, none, constant"),
        ({"oabn_branches": "3x3"}, "oabn_branches is '3x3'; known: identity, all"),
        ({"norm": "oabn", "identity": "none"}, "identity='none' leaves none with a normalization"),
        ({"norm": "oabn", "identity": "constant"}, "identity='constant' leaves none"),
        ({"norm": "oabn", "oabn_branches": "all", "oabn_k": "6std"}, "oabn_k='6std' is relative to the kernel"),
        ({"norm": "oabn", "oabn_branches": "all", "oabn_k": 0}, "k is 0; it must be a number above 0"),
        ({"norm": "oabn", "oabn_branches": "all", "clip_mode": "soft"}, "clip_mode is 'soft'"),
    ],
)
def test_refusals_of_repvgg(arguments, message):
    with pytest.raises(ValueError, match=message):
        RepVGGBlock(8, **arguments)


@pytest.mark.parametrize("arguments, message", [({"oabn_k": -1}, "k is -1"), ({"clip_mode": "soft"}, "clip_mode is")])
def test_bad_oabn_arguments_are_refused_at_construction(arguments, message):
    """Also where the identity's normalization is made only when the input's shape is known."""
    with pytest.raises(ValueError, match=message):
        RepVGGBlock(8, norm="oabn", **arguments)


def test_refusals_at_build():
    with pytest.raises(ValueError, match="6 input channels cannot be split into 4 groups"):
        RepVGGBlock(8, groups=4)(images(channels=6))
    with pytest.raises(ValueError, match="number of input channels must be known"):
        keras.Model(inputs := keras.Input((4, 4, None)), RepVGGBlock(8)(inputs))


def test_identity_branch_exists_only_where_the_shape_is_kept():
    for arguments, channels, expected in [({}, 8, True), ({}, 4, False), ({"strides": 2}, 8, False)]:
        for make in (RepVGGBlock, QARepVGGBlock):
            block = make(8, **arguments)
            block(images(channels=channels))
            assert ("identity" in block.branches()) == expected


def test_oabn_is_on_the_branches_asked_for():
    def clipped(**arguments):
        block = RepVGGBlock(8, norm="oabn", **arguments)
        block(images())
        norms = (block.norm3x3, block.norm1x1, block.norm_identity)
        return [isinstance(norm, OutlierAwareBatchNormalization) for norm in norms]

    assert clipped() == [False, False, True]
    assert clipped(oabn_branches="all") == [True, True, True]


@pytest.mark.parametrize("branches", ["identity", "all"])
def test_merged_kernel_keeps_the_bound(branches):
    block = RepVGGBlock(8, norm="oabn", oabn_k=0.05, oabn_branches=branches)
    block(images())
    randomize(block, gain=3.0, dead_share=0)
    found = block.branches()
    identity = found["identity"][0].numpy()
    assert np.max(np.abs(identity)) == pytest.approx(0.05, rel=1e-6)
    assert np.count_nonzero(identity) == 8
    if branches == "all":
        for name, conv in (("conv3x3", block.conv3x3), ("conv1x1", block.conv1x1)):
            largest = np.max(np.abs(conv.kernel), axis=(0, 1, 2))
            assert np.all(np.max(np.abs(found[name][0]), axis=(0, 1, 2)) <= 0.05 * largest * (1 + 1e-6))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed_bfloat16"])
def test_merged_kernel_is_differentiable(kind, mixed):
    """A penalty on kernel and bias reaches every trainable weight, and agrees with a difference quotient."""
    if mixed:
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    block = BLOCKS[kind]()
    block(images())
    randomize(block, dead_share=0, gain=0.05)
    with tf.GradientTape() as tape:
        kernel, bias = block.equivalent_kernel_and_bias()
        loss = tf.reduce_sum(kernel**3) + tf.reduce_sum(tf.sin(bias))
    assert kernel.dtype == bias.dtype == tf.float32
    assert kernel.shape == (3, 3, 8, 8)
    variables = block.trainable_variables
    for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
        assert gradient is not None, variable.name
        assert np.any(gradient.numpy() != 0), variable.name

    def loss_with(variable, values):
        before = variable.numpy()
        variable.assign(values)
        kernel, bias = block.equivalent_kernel_and_bias()
        variable.assign(before)
        return np.sum(kernel.numpy().astype(np.float64) ** 3) + np.sum(np.sin(bias.numpy().astype(np.float64)))

    if kind != "oabn relative":  # the limit itself moves with the kernel, and is no path for gradients
        kernel3x3 = block.conv3x3.kernel
        direction = np.random.default_rng(0).standard_normal(kernel3x3.shape).astype("float32") * 1e-2
        values = kernel3x3.numpy()
        quotient = loss_with(kernel3x3, values + direction) - loss_with(kernel3x3, values - direction)
        expected = 2 * np.sum(direction * tape_gradient(block, kernel3x3))
        assert quotient == pytest.approx(expected, rel=2e-2)


def tape_gradient(block, variable):
    with tf.GradientTape() as tape:
        kernel, bias = block.equivalent_kernel_and_bias()
        loss = tf.reduce_sum(kernel**3) + tf.reduce_sum(tf.sin(bias))
    return tape.gradient(loss, variable).numpy()


@pytest.mark.parametrize("kind", ["bn", "oabn", "qarepvgg"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_merged_kernel_as_a_penalty_in_fit(kind, policy):
    """Inside a layer's call, where a mixed policy reads variables as bfloat16: the penalty shrinks the kernel."""
    keras.mixed_precision.set_global_policy(policy)
    block_type = QARepVGGBlock if kind == "qarepvgg" else RepVGGBlock

    class Penalised(block_type):
        def call(self, inputs, training=None):
            outputs = super().call(inputs, training=training)
            kernel, _ = self.equivalent_kernel_and_bias()
            self.add_loss(tf.reduce_sum(tf.square(kernel)))
            return outputs

    block = Penalised(8, **({"norm": "oabn"} if kind == "oabn" else {}))
    model = block_model(block, (6, 6))
    model.compile(keras.optimizers.SGD(0.01), loss=None)
    before = np.sum(block.equivalent_kernel_and_bias()[0].numpy() ** 2)
    model.fit(images(6, 6, count=8), batch_size=4, epochs=2, verbose=0)
    assert np.sum(block.equivalent_kernel_and_bias()[0].numpy() ** 2) < 0.9 * before


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("form", ["model.keras", "saved_model"])
def test_save_and_load(tmp_path, kind, form):
    model = block_model(BLOCKS[kind](groups=2, padding="symmetric", momentum=0.8, epsilon=1e-4, activation="elu"))
    randomize(model)
    model.save(tmp_path / form)
    loaded = keras.models.load_model(tmp_path / form)
    x = images()
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-6, atol=1e-6)
    mine, its = model.layers[1], loaded.layers[1]
    assert type(mine) is type(its)
    assert mine.get_config() == its.get_config()
    for before, after in zip(mine.equivalent_kernel_and_bias(), its.equivalent_kernel_and_bias(), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-7)


def test_config_says_everything_that_was_asked_for():
    block = RepVGGBlock(
        8, strides=2, padding="symmetric", groups=2, norm="oabn", oabn_k="4std", clip_mode="return_only", name="b"
    )
    config = block.get_config()
    wanted = {"strides": 2, "padding": "symmetric", "groups": 2, "oabn_k": "4std", "clip_mode": "return_only"}
    assert wanted.items() <= config.items()
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
    """What train/main.py --init_from compares."""
    model = block_model(RepVGGBlock(8, name="block"), (6, 6))
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
    """The same names and shapes, so a trained BN model is a start for OABN."""
    path = str(tmp_path / "model.weights.h5")
    plain = block_model(RepVGGBlock(8, name="block"), (6, 6))
    randomize(plain, dead_share=0)
    plain.save_weights(path)
    ours = block_model(RepVGGBlock(8, norm="oabn", oabn_k=0.05, name="block"), (6, 6))
    ours.load_weights(path)
    for mine, its in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, its)
    assert np.max(np.abs(ours.layers[1].branches()["identity"][0])) <= 0.05 * (1 + 1e-6)


def test_branches_start_from_different_kernels():
    block = RepVGGBlock(8, kernel_initializer=keras.initializers.HeNormal(seed=1))
    block(images())
    other = RepVGGBlock(8, kernel_initializer=keras.initializers.Constant(0.5))
    other(images())
    assert np.std(block.conv3x3.kernel) == pytest.approx(np.sqrt(2 / 72), rel=0.2)
    assert np.std(block.conv1x1.kernel) == pytest.approx(np.sqrt(2 / 8), rel=0.4)
    assert np.all(other.conv1x1.kernel.numpy() == 0.5)


@pytest.mark.parametrize("kind", ["bn", "qarepvgg"])
def test_squeeze_excite_is_between_the_sum_and_the_activation(kind):
    block, plain = BLOCKS[kind](se_reduction=4, activation="tanh"), BLOCKS[kind](activation=None)
    x = images()
    block(x), plain(x)
    randomize(block)
    own = {id(weight) for weight in block.squeeze_excite.weights}
    for mine, its in zip(plain.weights, (w for w in block.weights if id(w) not in own), strict=True):
        mine.assign(its)
    total = plain(x).numpy()
    (down, down_bias), (up, up_bias) = (
        (conv.kernel.numpy()[0, 0], conv.bias.numpy())
        for conv in (block.squeeze_excite.reduce, block.squeeze_excite.expand)
    )
    squeezed = np.maximum(total.mean(axis=(1, 2)) @ down + down_bias, 0)
    excited = 1 / (1 + np.exp(-(squeezed @ up + up_bias)))
    np.testing.assert_allclose(block(x), np.tanh(total * excited[:, None, None]), rtol=1e-4, atol=1e-5)
    copied = type(block).from_config(block.get_config())
    assert copied.squeeze_excite.reduce.filters == 2


def test_whole_numbers_may_be_numpys(tmp_path):
    block = RepVGGBlock(np.int64(8), strides=np.int32(1), groups=np.int64(2), se_reduction=np.int64(2), name="block")
    model = block_model(block, (6, 6))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").get_layer("block")
    assert (loaded.filters, loaded.groups, loaded.se_reduction) == (8, 2, 2)


@pytest.mark.parametrize("reduction", [0, 9, 2.5])
def test_squeeze_excite_refuses(reduction):
    with pytest.raises(
        ValueError, match=f"reduction is {reduction}; it must be a whole number from 1 to the 8 channels"
    ):
        RepVGGBlock(8, se_reduction=reduction)


@pytest.mark.parametrize("form", ["model.keras", "saved_model", "model.weights.h5"])
def test_blocks_with_squeeze_excite_are_saved(tmp_path, form):
    model = block_model(RepVGGBlock(8, se_reduction=2, groups=2, name="block"), (6, 6))
    randomize(model)
    x = images(6, 6)
    if form.endswith("h5"):
        model.save_weights(str(tmp_path / form))
        loaded = block_model(RepVGGBlock(8, se_reduction=2, groups=2, name="block"), (6, 6))
        loaded.load_weights(str(tmp_path / form))
    else:
        model.save(tmp_path / form)
        loaded = keras.models.load_model(tmp_path / form)
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind, options", [("oabn", {}), ("qarepvgg", {}), ("oabn", {"groups": 4, "se_reduction": 2})])
def test_gradients_flow_on_every_stride(kind, options):
    for stride in (1, 2):
        block = BLOCKS[kind](strides=stride, **options)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(block(images(), training=True) ** 2)
        assert all(gradient is not None for gradient in tape.gradient(loss, block.trainable_variables))


def test_a_block_can_be_copied():
    copied = copy.deepcopy(RepVGGBlock(8, norm="oabn", oabn_k="6std"))
    x = images()
    copied(x)
    assert copied.branches().keys() == {"conv3x3", "conv1x1", "identity"}


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
        ("a=1,a=2", "given twice"),
        ("", "above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_clip_limits(text)
