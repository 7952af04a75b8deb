"""Fusion: the deploy form is the same function."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from helpers.fusion import ALL_KINDS, KINDS, assert_same_function, images
from helpers.random_weights import randomize, relative_error
from hypothesis import given
from hypothesis import strategies as st

from tf_repvgg import graph
from tf_repvgg.fusion import fuse
from tf_repvgg.layers import OutlierAwareBatchNormalization, QARepVGGBlock, ReparameterizedBlock, RepVGGBlock
from tf_repvgg.models import build_repvgg


def assert_deploy_form(model, fused):
    assert not graph.find_layers(fused, ReparameterizedBlock)
    assert not graph.find_layers(fused, keras.layers.BatchNormalization)
    blocks = {block.name: block for block in graph.find_layers(model, ReparameterizedBlock)}
    convs = {conv.name: conv for conv in graph.find_layers(fused, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D))}
    assert blocks.keys() <= convs.keys()
    for name, block in blocks.items():
        assert convs[name].kernel_size == (block.kernel_size, block.kernel_size)
        is_depthwise = 1 < block.groups == block.input_shape[-1]
        assert isinstance(convs[name], keras.layers.DepthwiseConv2D) == is_depthwise
        assert convs[name].use_bias
        if block.squeeze_excite is None:
            assert convs[name].activation is block.activation
        else:
            assert convs[name].activation is keras.activations.linear
            (activation,) = (layer for layer in fused.layers if layer.name == f"{name}_activation")
            assert activation.activation is block.activation
        assert len(convs[name].weights) == 2


# Every kind with both strides, and every stride with every number of groups and padding: what a kind adds to the kernel
# does not depend on the padding. Squeeze-and-excite comes after all that strides and groups change.
GEOMETRIES = [
    (kind, stride, [1, 2, 4][(row + stride) % 3], ["same", "symmetric"][row % 2])
    for row, kind in enumerate(KINDS)
    for stride in (1, 2)
] + [
    *itertools.product(["oabn, norm", "qarepvgg"], [1, 2], [2], ["same", "symmetric"]),
    *itertools.product(["mobileone", "mobileone 5x5, oabn all"], [2], [8], ["same", "symmetric"]),
    ("mobileone", 1, 8, "same"),
    ("mobileone 5x5, oabn all", 3, 1, "same"),
    ("mobileone pointwise", 1, 1, "same"),
    ("mobileone pointwise", 2, 1, "same"),
    ("qamobileone", 2, 8, "symmetric"),
    ("qamobileone pointwise", 1, 1, "symmetric"),
    ("oabn, norm, SE", 2, 2, "symmetric"),
    ("qarepvgg, SE", 2, 2, "same"),
]
GEOMETRIES = list(dict.fromkeys(GEOMETRIES))


@pytest.mark.parametrize("kind, stride, groups, padding", GEOMETRIES)
def test_every_block_on_odd_and_even_inputs(kind, stride, groups, padding):
    make, arguments = ALL_KINDS[kind]
    common = {"groups": groups, "padding": padding, "activation": None}
    inputs = keras.Input((None, None, 8))
    # The first keeps its input's shape where the stride is 1; the second never does.
    features = make(8, strides=stride, name="first", **common, **arguments)(inputs)
    outputs = make(16, strides=stride, name="second", **common, **arguments)(features)
    model = keras.Model(inputs, outputs)
    for seed, block in enumerate(graph.find_layers(model, ReparameterizedBlock)):
        randomize(block, seed)
    fused = fuse(model)
    assert_deploy_form(model, fused)
    sizes = [(8, 8), (9, 9), (11, 10)]
    assert_same_function(model, fused, *(images(height, width, 8) for height, width in sizes))


@given(
    kind=st.sampled_from(list(ALL_KINDS)),
    filters=st.sampled_from([4, 8]),
    geometry=st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)]),
    padding=st.sampled_from(["same", "symmetric"]),
    groups=st.sampled_from([1, 2, 4]),
    activation=st.sampled_from(["relu", "tanh", None]),
    size=st.tuples(st.integers(5, 14), st.integers(5, 14)),
    seed=st.integers(0, 2**16),
)
def test_any_block(kind, filters, geometry, padding, groups, activation, size, seed):
    make, arguments = ALL_KINDS[kind]
    stride, dilation = geometry
    block = make(
        filters,
        strides=stride,
        dilation_rate=dilation,
        padding=padding,
        groups=groups,
        activation=activation,
        **arguments,
    )
    inputs = keras.Input((*size, 4))
    model = keras.Model(inputs, block(inputs))
    randomize(model, seed)
    fused = fuse(model)
    assert_deploy_form(model, fused)
    assert_same_function(model, fused, images(*size, 4, seed=seed))


def test_original_is_untouched():
    model = build_repvgg("digits", (8, 8, 1), 10, norm="oabn")
    randomize(model)
    config, weights = model.get_config(), model.get_weights()
    x = images(8, 8, 1)
    before = model(x).numpy()
    fused = fuse(model)
    for conv in graph.find_layers(fused, keras.layers.Conv2D):
        conv.kernel.assign(conv.kernel * 0)
    fused.get_layer("logits").kernel.assign(fused.get_layer("logits").kernel * 0)
    assert model.get_config() == config
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(model(x), before)
    assert not {id(layer) for layer in fused.layers} & {id(layer) for layer in model.layers}


def backbone(size=(None, None, 3)):
    """A user's feature pyramid: strides, a skip connection by `+`, a concatenation, three outputs in a dictionary."""
    inputs = keras.Input(size, name="picture")
    stem = RepVGGBlock(8, strides=2, norm="oabn", name="stem")(inputs)
    c2 = RepVGGBlock(8, name="c2", norm="oabn")(stem) + stem
    c3 = QARepVGGBlock(16, strides=2, name="c3")(c2)
    c4 = RepVGGBlock(16, strides=2, padding="symmetric", name="c4")(c3)
    c4 = RepVGGBlock(16, dilation_rate=2, name="c4_dilated")(tf.nn.leaky_relu(c4))
    c4 = keras.layers.Concatenate(name="both")([c4, keras.layers.MaxPool2D(2, padding="same")(c3)])
    head = keras.layers.BatchNormalization(name="head_norm")(keras.layers.Conv2D(5, 1, name="head")(c4))
    return keras.Model(inputs, {"c2": c2, "c3": c3, "head": head}, name="backbone")


def test_multi_output_backbone_of_any_size():
    model = backbone()
    randomize(model)
    model.get_layer("head_norm").moving_mean.assign(np.arange(5.0))
    fused = fuse(model)
    assert set(fused(images(33, 40))) == {"c2", "c3", "head"}
    assert fused.input_shape == (None, None, None, 3)
    assert fused.name == "backbone"
    # The head's normalization follows a plain convolution and goes into it.
    assert not graph.find_layers(fused, keras.layers.BatchNormalization)
    assert {"head", "c2", "c3", "both"} <= {layer.name for layer in fused.layers}
    assert_same_function(model, fused, images(33, 40), images(32, 31), images(17, 17))
    function = tf.function(fused, input_signature=[tf.TensorSpec([None, None, None, 3])])
    assert_same_function(model, lambda x, training: function(x), images(33, 40))


@pytest.mark.parametrize("training", [None, False])
def test_nested_models(training):
    """A backbone inside a classifier inside a model, as transfer learning builds it with training=False."""
    inner = backbone((32, 32, 3))
    inputs = keras.Input((32, 32, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(inner(inputs, training=training)["head"])
    classifier = keras.Model(inputs, keras.layers.Dense(4)(pooled), name="classifier")
    outer = keras.Sequential([keras.layers.Rescaling(0.5, input_shape=(32, 32, 3)), classifier])
    randomize(outer)
    fused = fuse(outer)
    assert not graph.find_layers(fused, ReparameterizedBlock)
    assert set(fused.pre_activation_statistics) == {"stem", "c2", "c3", "c4", "c4_dilated"}
    assert_same_function(outer, fused, images(32, 32))


def test_blocks_of_one_name_in_nested_models():
    """In two backbones with the same names, convolutions and statistics get unique names."""

    def two_eyes(seed):
        def eye(side):
            eye_inputs = keras.Input((8, 8, 3))
            features = RepVGGBlock(4, name="first")(RepVGGBlock(4, name="stem")(eye_inputs))
            return keras.Model(eye_inputs, features, name=side)

        inputs = keras.Input((8, 8, 3))
        both = keras.layers.Concatenate()([eye("left")(inputs), eye("right")(inputs)])
        model = keras.Model(inputs, RepVGGBlock(4, name="top")(both), name=f"eyes{seed}")
        randomize(model, seed)
        return model

    model = two_eyes(1)
    fused = fuse(model)
    names = ["left_stem", "left_first", "right_stem", "right_first", "top"]
    assert sorted(fused.pre_activation_statistics) == sorted(names)
    assert sorted(layer.name for layer in graph.find_layers(fused, keras.layers.Conv2D)) == sorted(names)
    for side in ("left", "right"):
        mean, variance = model.get_layer(side).get_layer("stem").pre_activation_statistics()
        statistics = fused.pre_activation_statistics[f"{side}_stem"]
        np.testing.assert_array_equal(statistics.mean, mean)
        np.testing.assert_array_equal(statistics.variance, variance)
    assert_same_function(model, fused, images(8, 8))
    # Also for models within models; and no name is given to two layers.
    inputs = keras.Input((8, 8, 3))
    namesake = RepVGGBlock(4, name="eyes2_left_stem")(inputs)
    outputs = keras.layers.Concatenate()([two_eyes(2)(inputs), two_eyes(3)(inputs), namesake])
    nested = fuse(keras.Model(inputs, outputs))
    assert len(nested.pre_activation_statistics) == 11
    assert {"eyes2_left_stem", "eyes2_left_stem_", "eyes3_right_first"} <= set(nested.pre_activation_statistics)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.Conv2D(6, 3, strides=2, use_bias=False),
        lambda: keras.layers.Conv2D(6, 3, groups=2, bias_initializer="ones"),
        lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2, bias_initializer="ones"),
        lambda: keras.layers.Dense(5, use_bias=False),
    ],
)
@pytest.mark.parametrize("norm", [{}, {"scale": False}, {"center": False}, {"k": 0.3}], ids=str)
def test_normalizations_after_plain_layers_are_merged(make, norm):
    layer = make()
    normalization = OutlierAwareBatchNormalization(**norm) if "k" in norm else keras.layers.BatchNormalization(**norm)
    inputs = keras.Input((9, 8, 4))
    model = keras.Model(inputs, keras.layers.ReLU()(normalization(layer(RepVGGBlock(4)(inputs)))))
    generator = np.random.default_rng(0)
    for weight in normalization.weights:
        weight.assign(generator.uniform(0.5, 2, weight.shape))
    fused = fuse(model)
    assert not graph.find_layers(fused, keras.layers.BatchNormalization)
    assert fused.get_layer(layer.name).use_bias
    assert_same_function(model, fused, images(9, 8, 4))


def test_other_normalizations_stay():
    """After an activation, a sum, a shared layer, an output or a layer that something else reads, or in training."""
    inputs = keras.Input((8, 8, 4))
    norms = [keras.layers.BatchNormalization(name=name) for name in "abcdef"]
    conv = lambda **kwargs: keras.layers.Conv2D(4, 1, **kwargs)  # noqa: E731
    features = norms[0](conv(activation="relu")(RepVGGBlock(4)(inputs)))
    features = norms[1](features + inputs)
    shared, read_twice, output = conv(), conv()(features), conv()(features)
    features = norms[2](shared(shared(features))) + norms[3](read_twice) + read_twice
    features = features + norms[4](output) + norms[5](conv()(features), training=True)
    model = keras.Model(inputs, [features, output])
    randomize(model)
    for norm in norms:
        norm.moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    fused = fuse(model)
    assert [layer.name for layer in graph.find_layers(fused, keras.layers.BatchNormalization)] == list("abcdef")
    assert_same_function(model, fused, images(8, 8, 4))


def test_blocks_called_with_training_false():
    """Frozen blocks, as users write them in fine-tuning: the argument is part of the graph."""
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, RepVGGBlock(4)(inputs, training=False))
    randomize(model)
    assert_same_function(model, fuse(model), images(8, 8, 4))


def test_shared_layers_stay_shared():
    block, dense = RepVGGBlock(4, name="shared"), keras.layers.Dense(3, name="dense")
    left, right = keras.Input((8, 8, 4), name="left"), keras.Input((10, 6, 4), name="right")
    branch = keras.Sequential([keras.Input((None, None, 4)), RepVGGBlock(4, name="inner"), block])
    features = [keras.layers.GlobalAveragePooling2D()(branch(x)) for x in (left, right)]
    again = keras.layers.GlobalAveragePooling2D()(block(block(left)))
    model = keras.Model([left, right], [dense(features[0]) - dense(features[1]), dense(again)])
    randomize(model)
    fused = fuse(model)
    assert len(graph.find_layers(fused, keras.layers.Conv2D)) == 2
    assert len(graph.find_layers(fused, keras.layers.Dense)) == 1
    assert len(fused.weights) == 2 * 2 + 2
    assert_same_function(model, fused, [images(8, 8, 4), images(10, 6, 4, seed=1)])


def test_dictionary_inputs():
    inputs = {"a": keras.Input((8, 8, 2), name="a"), "b": keras.Input((8, 8, 2), name="b")}
    model = keras.Model(inputs, RepVGGBlock(4)(keras.layers.Concatenate()([inputs["b"], inputs["a"]])))
    randomize(model)
    fused = fuse(model)
    assert_same_function(model, fused, {"a": images(8, 8, 2), "b": images(8, 8, 2, seed=1)})


@pytest.mark.parametrize("policy_while_fusing", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", ["oabn relative, norm", "qarepvgg, SE"])
def test_mixed_precision_model_fuses_to_float32(kind, policy_while_fusing):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    make, arguments = ALL_KINDS[kind]
    inputs = keras.Input((8, 8, 4))
    features = keras.layers.Activation("relu")(make(4, name="block", **arguments)(inputs))
    features = keras.layers.Conv2D(6, 1, name="plain")(features)
    model = keras.Model(inputs, features)
    randomize(model)
    keras.mixed_precision.set_global_policy(policy_while_fusing)
    fused = fuse(model)
    assert all(layer.compute_dtype == "float32" for layer in graph.find_layers(fused, keras.layers.Conv2D))
    assert fused(images(8, 8, 4)).dtype == tf.float32
    # bfloat16 has 8 bits of precision; the function is the same beyond that.
    assert relative_error(tf.cast(model(images(8, 8, 4)), tf.float32), fused(images(8, 8, 4))) < 0.05
    keras.mixed_precision.set_global_policy("float32")
    again = keras.models.clone_model(model, clone_function=_copy_in_float32)
    again.set_weights(model.get_weights())
    assert_same_function(again, fused, images(8, 8, 4))


def _copy_in_float32(layer):
    return type(layer).from_config(layer.get_config() | {"dtype": "float32"})


class OnceBuilt(keras.layers.Layer):
    """A user's layer that makes its weight in the constructor, without a build of its own."""

    def __init__(self, value=2.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = self.add_weight("factor", shape=(), initializer=keras.initializers.Constant(value))

    def call(self, inputs):
        return inputs * self.factor


def test_users_own_layers_are_copied_with_their_weights():
    inputs = keras.Input((8, 8, 4))
    own = OnceBuilt(name="own")
    features = keras.layers.DepthwiseConv2D(3)(own(RepVGGBlock(4)(inputs)))
    features = keras.layers.LayerNormalization()(keras.layers.Lambda(lambda x: x * 3)(features))
    sequence = keras.layers.Reshape((-1, 4))(features)
    sequence = keras.layers.Bidirectional(keras.layers.GRU(3, return_sequences=True))(sequence)
    sequence = keras.layers.MultiHeadAttention(2, 2)(sequence, sequence)
    model = keras.Model(inputs, keras.layers.TimeDistributed(keras.layers.Dense(2))(sequence))
    own.factor.assign(5.0)
    randomize(model)
    fused = fuse(model)
    assert_same_function(model, fused, images(8, 8, 4))
    assert fused.get_layer("own").factor.numpy() == 5.0


def test_symmetric_padding_costs_a_layer_only_where_it_must():
    inputs = keras.Input((9, 9, 4))
    features = RepVGGBlock(4, padding="symmetric", name="same_size")(inputs)
    fused = fuse(keras.Model(inputs, RepVGGBlock(4, padding="symmetric", strides=2, name="half")(features)))
    assert [layer.name for layer in graph.find_layers(fused, keras.layers.ZeroPadding2D)] == ["half_padding"]


def test_fused_models_train():
    """The deploy form is an ordinary Keras model: fine-tuning it works."""
    fused = fuse(build_repvgg("digits", (8, 8, 1), 10))
    fused.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, labels = images(8, 8, 1, count=16), np.arange(16) % 10
    losses = [fused.train_on_batch(x, labels) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


def test_identity_weight_of_a_fused_oabn_model_keeps_the_bound():
    model = build_repvgg("digits", (8, 8, 1), 10, norm="oabn", oabn_k=0.05)
    randomize(model, gain=2.0, dead_share=0)
    fused = fuse(model)
    checked = 0
    for block in graph.find_layers(model, ReparameterizedBlock):
        branches = block.branches()
        if "identity" in branches:
            rest = sum(kernel for name, (kernel, _) in branches.items() if name != "identity")
            identity = fused.get_layer(block.name).kernel - rest
            assert np.max(np.abs(identity)) <= 0.05 * (1 + 1e-6) + 1e-6 * np.max(np.abs(rest))
            checked += 1
    assert checked == 4


def test_cross_product_is_whole():
    """Every combination of the blocks' choices is either in KINDS or refused at construction."""
    valid = 0
    for norm, branches, identity in itertools.product(
        ("bn", "oabn"), ("identity", "all"), ("norm", "none", "constant")
    ):
        try:
            RepVGGBlock(8, norm=norm, oabn_branches=branches, identity=identity)
        except ValueError:
            continue
        valid += norm == "oabn" or branches == "identity"
    assert valid == len(KINDS) - 2  # without the relative k and QARepVGG
