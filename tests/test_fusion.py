"""Fusion: the deploy form is the same function, or fuse() refuses."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from helpers.random_weights import randomize, relative_error
from hypothesis import given
from hypothesis import strategies as st

from tf_repvgg import graph
from tf_repvgg.fusion import PreActivationStatistics, fuse
from tf_repvgg.layers import OutlierAwareBatchNormalization, QARepVGGBlock, ReparameterizedBlock, RepVGGBlock
from tf_repvgg.models import build_repvgg

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
ALL_KINDS = KINDS | KINDS_WITH_SE


def images(height, width, channels=3, count=2, seed=0):
    return np.random.default_rng(seed).standard_normal((count, height, width, channels)).astype("float32")


def layers_of(model, kind):
    return graph.find_layers(model, kind)


def assert_same_function(model, fused, *inputs, tolerance=TOLERANCE):
    for x in inputs:
        expected = tf.nest.flatten(model(x, training=False))
        found = tf.nest.flatten(fused(x, training=False))
        for mine, its in zip(expected, found, strict=True):
            assert relative_error(mine, its) < tolerance


def assert_deploy_form(model, fused):
    assert not layers_of(fused, ReparameterizedBlock)
    assert not layers_of(fused, keras.layers.BatchNormalization)
    blocks = {block.name: block for block in layers_of(model, ReparameterizedBlock)}
    convs = {conv.name: conv for conv in layers_of(fused, keras.layers.Conv2D)}
    assert blocks.keys() <= convs.keys()
    for name, block in blocks.items():
        assert convs[name].kernel_size == (3, 3)
        assert convs[name].use_bias
        if block.squeeze_excite is None:
            assert convs[name].activation is block.activation
        else:
            assert convs[name].activation is keras.activations.linear
            (activation,) = (layer for layer in fused.layers if layer.name == f"{name}_activation")
            assert activation.activation is block.activation
        assert len(convs[name].weights) == 2


# Squeeze-and-excite comes after all that strides and groups change: few of its combinations are enough.
GEOMETRIES = [
    *itertools.product(KINDS, [1, 2], [1, 2, 4], ["same", "symmetric"]),
    *itertools.product(KINDS_WITH_SE, [2], [2], ["same", "symmetric"]),
]


@pytest.mark.parametrize("kind, stride, groups, padding", GEOMETRIES)
def test_every_block_on_odd_and_even_inputs(kind, stride, groups, padding):
    make, arguments = ALL_KINDS[kind]
    common = {"groups": groups, "padding": padding, "activation": None}
    inputs = keras.Input((None, None, 8))
    # The first keeps its input's shape where the stride is 1; the second never does.
    features = make(8, strides=stride, name="first", **common, **arguments)(inputs)
    outputs = make(16, strides=stride, name="second", **common, **arguments)(features)
    model = keras.Model(inputs, outputs)
    for seed, block in enumerate(layers_of(model, ReparameterizedBlock)):
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
    for conv in layers_of(fused, keras.layers.Conv2D):
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
    assert not layers_of(fused, keras.layers.BatchNormalization)
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
    assert not layers_of(fused, ReparameterizedBlock)
    assert set(fused.pre_activation_statistics) == {"stem", "c2", "c3", "c4", "c4_dilated"}
    assert_same_function(outer, fused, images(32, 32))


def test_blocks_of_one_name_in_nested_models():
    """Two backbones of the same make: their convolutions and statistics get names of their own."""

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
    assert sorted(layer.name for layer in layers_of(fused, keras.layers.Conv2D)) == sorted(names)
    for side in ("left", "right"):
        mean, variance = model.get_layer(side).get_layer("stem").pre_activation_statistics()
        found = fused.pre_activation_statistics[f"{side}_stem"]
        np.testing.assert_array_equal(found.mean, mean)
        np.testing.assert_array_equal(found.variance, variance)
    assert_same_function(model, fused, images(8, 8))
    # Those of models within models too, and a name that is taken is not given twice.
    inputs = keras.Input((8, 8, 3))
    taken = RepVGGBlock(4, name="eyes2_left_stem")(inputs)
    outputs = keras.layers.Concatenate()([two_eyes(2)(inputs), two_eyes(3)(inputs), taken])
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
    assert not layers_of(fused, keras.layers.BatchNormalization)
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
    assert [layer.name for layer in layers_of(fused, keras.layers.BatchNormalization)] == list("abcdef")
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
    assert len(layers_of(fused, keras.layers.Conv2D)) == 2
    assert len(layers_of(fused, keras.layers.Dense)) == 1
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
    assert all(layer.compute_dtype == "float32" for layer in layers_of(fused, keras.layers.Conv2D))
    assert fused(images(8, 8, 4)).dtype == tf.float32
    # bfloat16 has 8 bits of precision; the function is the same beyond that.
    assert relative_error(tf.cast(model(images(8, 8, 4)), tf.float32), fused(images(8, 8, 4))) < 0.05
    keras.mixed_precision.set_global_policy("float32")
    again = keras.models.clone_model(model, clone_function=_in_float32)
    again.set_weights(model.get_weights())
    assert_same_function(again, fused, images(8, 8, 4))


def _in_float32(layer):
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


def test_refuses_what_it_cannot_fuse():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.block = RepVGGBlock(4)

        def call(self, inputs):
            return self.block(inputs)

    subclassed = Subclassed()
    subclassed(images(8, 8, 4))
    with pytest.raises(ValueError, match=r"fuse needs a functional Keras 2 model, but got Subclassed"):
        fuse(subclassed)
    with pytest.raises(ValueError, match="but got RepVGGBlock"):
        fuse(RepVGGBlock(4))
    plain = keras.Sequential([keras.Input((8, 8, 4)), keras.layers.Conv2D(3, 3)], name="plain")
    with pytest.raises(ValueError, match="model 'plain' contains no re-parameterized block"):
        fuse(plain)
    inputs = keras.Input((3, 8, 8, 4))
    wrapped = keras.Model(inputs, keras.layers.TimeDistributed(RepVGGBlock(4, name="hidden"))(inputs))
    with pytest.raises(ValueError, match="block 'hidden' is inside another layer"):
        fuse(wrapped)


class LyingBlock(RepVGGBlock):
    """Says its merged kernel is one per cent smaller than it is."""

    def branches(self):
        return {name: (0.99 * kernel, 0.99 * bias) for name, (kernel, bias) in super().branches().items()}


def test_refuses_when_exactness_fails_and_says_by_how_much():
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, LyingBlock(4, activation=None)(inputs), name="liar")
    randomize(model)
    with pytest.raises(ArithmeticError, match=r"model 'liar' changed its output 'lying_block.*' by 1\.00e-02 of its"):
        fuse(model)
    assert_same_function(model, fuse(model, tolerance=0.02), images(8, 8, 4), tolerance=0.02)


def test_every_output_is_checked_by_itself():
    """An output a million times larger hides nothing, and an output of classes is compared too."""
    inputs = keras.Input((8, 8, 4))
    wrong = LyingBlock(4, activation=None, name="wrong")(inputs)
    large = keras.layers.Rescaling(1e6, name="large")(RepVGGBlock(4)(inputs))
    classes = keras.layers.Lambda(lambda x: tf.argmax(x, axis=-1), name="classes")(large)
    model = keras.Model(inputs, [large, classes, wrong])
    randomize(model)
    with pytest.raises(ArithmeticError, match=r"changed its output 'wrong' by 1\.00e-02"):
        fuse(model)
    assert fuse(keras.Model(inputs, [large, classes]))(images(8, 8, 4))[1].dtype == tf.int64


def test_refuses_outputs_that_are_not_finite():
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, RepVGGBlock(4, name="block")(inputs))
    model.get_layer("block").norm3x3.gamma.assign([np.nan] * 4)
    with pytest.raises(ArithmeticError, match="changed its output 'block' by nan"):
        fuse(model)


def test_check_runs_on_the_inputs_given():
    """A fault that random images do not show is found on the user's own input."""

    class FaultOnLarge(RepVGGBlock):
        def call(self, inputs, training=None):
            outputs = super().call(inputs, training=training)
            return tf.where(tf.reduce_max(inputs) > 100, outputs * 2, outputs)

    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, FaultOnLarge(4)(inputs))
    fuse(model)
    with pytest.raises(ArithmeticError):
        fuse(model, check_inputs=images(8, 8, 4) * 1000)


def pre_activation_of(block_type, **arguments):
    """A linear block and its statistics, after its normalizations have seen one distribution for long."""
    inputs = keras.Input((12, 12, 6))
    block = block_type(6, activation=None, momentum=0.0, name="block", **arguments)
    model = keras.Model(inputs, block(inputs))
    randomize(model, dead_share=0, gain=1.0)
    x = (images(12, 12, 6, count=256) * np.linspace(0.5, 2, 6) + np.linspace(-1, 1, 6)).astype("float32")
    model(x, training=True)  # momentum 0: the running statistics are those of this batch
    outputs = fuse(model)(x).numpy()
    return fuse(model).pre_activation_statistics["block"], outputs


def test_statistics_of_qarepvgg_are_those_of_real_passes():
    found, outputs = pre_activation_of(QARepVGGBlock)
    assert isinstance(found, PreActivationStatistics)
    assert found.mean.shape == found.variance.shape == (6,)
    np.testing.assert_allclose(found.mean, outputs.mean(axis=(0, 1, 2)), atol=2e-3 * outputs.std())
    np.testing.assert_allclose(found.variance, outputs.var(axis=(0, 1, 2)), rtol=5e-3)


@pytest.mark.parametrize("kind", ["bn, norm", "bn, none", "oabn, norm", "oabn all, norm"])
def test_means_of_repvgg_are_those_of_real_passes(kind):
    make, arguments = KINDS[kind]
    found, outputs = pre_activation_of(make, **arguments)
    np.testing.assert_allclose(found.mean, outputs.mean(axis=(0, 1, 2)), atol=2e-3 * outputs.std())
    # The variance is that of uncorrelated branches: of the right order only.
    ratio = found.variance / outputs.var(axis=(0, 1, 2))
    assert np.all((ratio > 0.2) & (ratio < 5))


def test_variance_of_a_single_branch_is_exact():
    """With the 1x1 branch silenced and no identity nothing is correlated, and the formula must be exact."""
    inputs = keras.Input((12, 12, 6))
    block = RepVGGBlock(6, identity="none", activation=None, momentum=0.0, name="block")
    model = keras.Model(inputs, block(inputs))
    randomize(model, dead_share=0)
    block.norm1x1.gamma.assign(np.zeros(6))
    x = images(12, 12, 6, count=256)
    model(x, training=True)
    fused = fuse(model)
    np.testing.assert_allclose(
        fused.pre_activation_statistics["block"].variance, fused(x).numpy().var(axis=(0, 1, 2)), rtol=5e-3
    )


def test_statistics_are_none_where_nothing_determines_them():
    inputs = keras.Input((8, 8, 4))
    features = RepVGGBlock(4, identity="constant", name="constant")(inputs)
    fused = fuse(keras.Model(inputs, RepVGGBlock(8, identity="constant", name="no_identity")(features)))
    assert fused.pre_activation_statistics["constant"] is None
    assert fused.pre_activation_statistics["no_identity"].mean.shape == (8,)


@pytest.mark.parametrize("form", ["model.keras", "saved_model"])
def test_fused_models_are_saved_as_they_are(tmp_path, form):
    model = build_repvgg("digits", (8, 8, 1), 10)
    randomize(model)
    fused = fuse(model)
    assert len(fused.pre_activation_statistics) == 7
    fused.save(tmp_path / form)
    assert len(fused.pre_activation_statistics) == 7
    loaded = keras.models.load_model(tmp_path / form)
    np.testing.assert_allclose(loaded(images(8, 8, 1)), fused(images(8, 8, 1)), rtol=1e-6, atol=1e-6)


def test_symmetric_padding_costs_a_layer_only_where_it_must():
    inputs = keras.Input((9, 9, 4))
    features = RepVGGBlock(4, padding="symmetric", name="same_size")(inputs)
    fused = fuse(keras.Model(inputs, RepVGGBlock(4, padding="symmetric", strides=2, name="half")(features)))
    assert [layer.name for layer in layers_of(fused, keras.layers.ZeroPadding2D)] == ["half_padding"]


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
    for block in layers_of(model, ReparameterizedBlock):
        found = block.branches()
        if "identity" in found:
            rest = sum(kernel for name, (kernel, _) in found.items() if name != "identity")
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
