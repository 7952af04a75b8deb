"""The blocks: what they compute, what they refuse, and that their merged kernel can be trained through."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from helpers.blocks import BLOCKS, images, make_model
from helpers.random_weights import randomize, relative_error

from tf_repvgg.layers import (
    MobileOneBlock,
    OutlierAwareBatchNormalization,
    QAMobileOneBlock,
    QARepVGGBlock,
    RepVGGBlock,
)


def compute_merged(block, inputs):
    """The block's function from its merged kernel alone, before the activation; padding as in PyTorch or Keras."""
    kernel, bias = block.equivalent_kernel_and_bias()
    padding = "SAME" if not block.needs_explicit_padding else [[0, 0], [1, 1], [1, 1], [0, 0]]
    return tf.nn.conv2d(inputs, kernel, block.strides, padding, dilations=block.dilation_rate) + bias


@pytest.mark.parametrize("kind", BLOCKS)
def test_merged_kernel_is_the_block(kind):
    block = BLOCKS[kind](activation=None)
    x = images()
    block(x)
    randomize(block)
    assert relative_error(block(x), compute_merged(block, x)) < 1e-5


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
        assert relative_error(block(x), compute_merged(block, x)) < 1e-5


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_one_graph_for_every_input_size(stride, padding):
    """With Input((None, None, C)) the pixel under the centre tap is determined at run time, in a compiled graph."""
    block = RepVGGBlock(8, strides=stride, padding=padding, activation=None)
    model = make_model(block, channels=3)
    randomize(block)
    function = tf.function(model, input_signature=[tf.TensorSpec([None, None, None, 3])])
    for height in range(5, 13):
        x = images(height, 17 - height, 3)
        outputs = function(x)
        assert outputs.shape == (2, -(-height // stride), -(-(17 - height) // stride), 8)
        assert outputs.shape == block.compute_output_shape(x.shape)
        assert relative_error(compute_merged(block, x), outputs) < 1e-5
        np.testing.assert_allclose(model(x), outputs, rtol=1e-4, atol=1e-4)  # sizes known: the Python path


def test_symmetric_padding_is_pytorchs():
    """Output 0 of a strided block has its centre tap on pixel 0, whatever the parity of the input."""
    block = RepVGGBlock(1, strides=2, padding="symmetric", identity="none", activation=None, epsilon=0.0)
    block(np.zeros((1, 6, 6, 1), "float32"))
    kernel = np.arange(1, 10, dtype=np.float32).reshape(3, 3, 1, 1)
    block.conv3x3.kernel.assign(kernel)
    block.conv1x1.kernel.assign([[[[100.0]]]])
    picture = np.zeros((1, 6, 6, 1), "float32")
    picture[0, 2, 2] = 1  # under the centre tap of output (1, 1) and no other tap of another output
    outputs = block(picture).numpy()[0, ..., 0]
    assert outputs[1, 1] == 105
    assert np.count_nonzero(outputs) == 1


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
        ({"norm": "oabn", "identity": "none"}, "identity='none' has none"),
        ({"norm": "oabn", "identity": "constant"}, "identity='constant' has none"),
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
    """Also where the identity's normalization is made only once the shape of the input is known."""
    with pytest.raises(ValueError, match=message):
        RepVGGBlock(8, norm="oabn", **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kernel_size": 4}, "kernel_size is 4, which has no centre; use an odd one"),
        ({"kernel_size": 0}, "kernel_size is 0; it must be a whole number above 0"),
        ({"conv_branches": 1.5}, "conv_branches is 1.5; it must be a whole number above 0"),
    ],
)
def test_refusals_of_mobileone(arguments, message):
    for make in (MobileOneBlock, QAMobileOneBlock):
        with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
            make(8, **arguments)


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


def test_oabn_is_on_the_requested_branches():
    def find_clipped(**arguments):
        block = RepVGGBlock(8, norm="oabn", **arguments)
        block(images())
        norms = (block.norm3x3, block.norm1x1, block.norm_identity)
        return [isinstance(norm, OutlierAwareBatchNormalization) for norm in norms]

    assert find_clipped() == [False, False, True]
    assert find_clipped(oabn_branches="all") == [True, True, True]


@pytest.mark.parametrize("branches", ["identity", "all"])
def test_merged_kernel_keeps_the_bound(branches):
    block = RepVGGBlock(8, norm="oabn", oabn_k=0.05, oabn_branches=branches)
    block(images())
    randomize(block, gain=3.0, dead_share=0)
    parts = block.branches()
    identity = parts["identity"][0].numpy()
    assert np.max(np.abs(identity)) == pytest.approx(0.05, rel=1e-6)
    assert np.count_nonzero(identity) == 8
    if branches == "all":
        for name, conv in (("conv3x3", block.conv3x3), ("conv1x1", block.conv1x1)):
            largest = np.max(np.abs(conv.kernel), axis=(0, 1, 2))
            assert np.all(np.max(np.abs(parts[name][0]), axis=(0, 1, 2)) <= 0.05 * largest * (1 + 1e-6))


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

    def compute_loss(variable, values):
        before = variable.numpy()
        variable.assign(values)
        kernel, bias = block.equivalent_kernel_and_bias()
        variable.assign(before)
        return np.sum(kernel.numpy().astype(np.float64) ** 3) + np.sum(np.sin(bias.numpy().astype(np.float64)))

    if "6std" not in block.get_config().values():  # the limit itself depends on the kernel, but passes no gradients
        kernel3x3 = next(iter(block.get_convolutions().values())).kernel
        direction = np.random.default_rng(0).standard_normal(kernel3x3.shape).astype("float32") * 1e-2
        values = kernel3x3.numpy()
        quotient = compute_loss(kernel3x3, values + direction) - compute_loss(kernel3x3, values - direction)
        expected = 2 * np.sum(direction * compute_gradient(block, kernel3x3))
        assert quotient == pytest.approx(expected, rel=2e-2)


def compute_gradient(block, variable):
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
    model = make_model(block, (6, 6))
    model.compile(keras.optimizers.SGD(0.01), loss=None)
    before = np.sum(block.equivalent_kernel_and_bias()[0].numpy() ** 2)
    model.fit(images(6, 6, count=8), batch_size=4, epochs=2, verbose=0)
    assert np.sum(block.equivalent_kernel_and_bias()[0].numpy() ** 2) < 0.9 * before


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
    added = {id(weight) for weight in block.squeeze_excite.weights}
    shared = [weight for weight in block.weights if id(weight) not in added]
    for target, source in zip(plain.weights, shared, strict=True):
        target.assign(source)
    total = plain(x).numpy()
    (down, down_bias), (up, up_bias) = (
        (conv.kernel.numpy()[0, 0], conv.bias.numpy())
        for conv in (block.squeeze_excite.reduce, block.squeeze_excite.expand)
    )
    squeezed = np.maximum(total.mean(axis=(1, 2)) @ down + down_bias, 0)
    excited = 1 / (1 + np.exp(-(squeezed @ up + up_bias)))
    np.testing.assert_allclose(block(x), np.tanh(total * excited[:, None, None]), rtol=1e-4, atol=1e-5)
    copy = type(block).from_config(block.get_config())
    assert copy.squeeze_excite.reduce.filters == 2


@pytest.mark.parametrize("reduction", [0, 9, 2.5])
def test_squeeze_excite_refuses_other_reductions(reduction):
    with pytest.raises(
        ValueError, match=f"reduction is {reduction}; it must be a whole number from 1 to the number of channels, 8"
    ):
        RepVGGBlock(8, se_reduction=reduction)


@pytest.mark.parametrize("kind, options", [("oabn", {}), ("qarepvgg", {}), ("oabn", {"groups": 4, "se_reduction": 2})])
def test_gradients_flow_on_every_stride(kind, options):
    for stride in (1, 2):
        block = BLOCKS[kind](strides=stride, **options)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(block(images(), training=True) ** 2)
        assert all(gradient is not None for gradient in tape.gradient(loss, block.trainable_variables))
