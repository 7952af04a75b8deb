"""What fuse() returns: a plain network that carries its statistics through saving, and never those of other weights."""

import copy
import json
import pickle

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from helpers.random_weights import randomize

from tf_repvgg import fusion, graph
from tf_repvgg.layers import OutlierAwareBatchNormalization, QARepVGGBlock, RepVGGBlock
from tf_repvgg.models import Variant, build_repvgg

SIZE = (8, 8, 3)
FORMS = ["fused.keras", "fused.h5", "saved_model"]


def make_classifier():
    model = build_repvgg(Variant(4, widths=(4, 8), depths=(1, 1), strides=(1, 2)), SIZE, 5)
    randomize(model)
    return fusion.fuse(model)


def make_branching_model():
    """Dictionaries of inputs and outputs, a nested model, a name in two models, statistics that are None."""
    inner_inputs = keras.Input((8, 8, 4))
    inner = keras.Model(inner_inputs, RepVGGBlock(4, name="stem")(inner_inputs), name="inner")
    inputs = {side: keras.Input(SIZE, name=side) for side in ("left", "right")}
    left = inner(RepVGGBlock(4, name="stem")(inputs["left"]))
    right = QARepVGGBlock(4, se_reduction=2, name="right_block")(inputs["right"])
    right = RepVGGBlock(4, identity="constant", name="constant")(right)
    model = keras.Model(inputs, {"both": left + right, "right": right}, name="branching")
    randomize(model)
    return fusion.fuse(model)


@pytest.fixture(scope="module")
def classifier():
    return make_classifier()


@pytest.fixture(scope="module", params=[make_classifier, make_branching_model])
def fused(request):
    return request.param()


def make_inputs(model):
    generator = np.random.default_rng(0)
    tensors = [generator.standard_normal((2, *tensor.shape[1:])).astype("float32") for tensor in model.inputs]
    return graph.pack_inputs(model, tensors)


def assert_same_statistics(expected, actual):
    assert expected
    assert expected.keys() == actual.keys()
    for name, statistics in expected.items():
        if statistics is None:
            assert actual[name] is None
            continue
        assert isinstance(actual[name], fusion.PreActivationStatistics)
        for before, after in zip(statistics, actual[name], strict=True):
            assert after.dtype == np.float32
            np.testing.assert_array_equal(after, before)


def assert_same_model(expected, actual):
    assert_same_statistics(fusion.pre_activation_statistics(expected), fusion.pre_activation_statistics(actual))
    inputs = make_inputs(expected)
    tf.nest.map_structure(np.testing.assert_array_equal, expected(inputs), actual(inputs))


def test_layers_are_plain_keras_layers(fused):
    layers = [layer for layer in graph.find_layers(fused) if layer is not fused]
    assert {type(layer).__module__.partition(".")[0] for layer in layers} == {"tf_keras"}
    assert graph.is_functional(fused)


@pytest.mark.parametrize("form", FORMS)
def test_statistics_are_saved_with_the_model(tmp_path, fused, form):
    fused.save(tmp_path / form)
    loaded = keras.models.load_model(tmp_path / form)
    assert_same_model(fused, loaded)
    loaded.save(tmp_path / f"again_{form}")
    assert_same_model(fused, keras.models.load_model(tmp_path / f"again_{form}"))


def test_statistics_are_loaded_in_a_fresh_process(tmp_path, classifier, run_program):
    for form in FORMS:
        classifier.save(tmp_path / form)
    program = f"""
import sys, tf_repvgg
print(*sorted({{"sklearn", "tensorflow_datasets", "matplotlib", "tensorflow_model_optimization"}} & set(sys.modules)))
import tf_keras as keras
for form in {FORMS}:
    model = keras.models.load_model({str(tmp_path)!r} + "/" + form)
    statistics = tf_repvgg.fusion.pre_activation_statistics(model)
    print(type(model).__name__, {{name: [array.tolist() for array in entry] for name, entry in statistics.items()}})
"""
    result = run_program("-c", program)
    statistics = classifier.pre_activation_statistics
    expected = {name: [array.tolist() for array in entry] for name, entry in statistics.items()}
    assert result.stdout.splitlines() == ["", *[f"FusedModel {expected}"] * len(FORMS)], result.stderr


def test_training_state_is_saved_beside_the_statistics(tmp_path, classifier):
    fused = keras.models.clone_model(classifier)
    fused.set_weights(classifier.get_weights())
    fused.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    fused.save(tmp_path / "compiled.keras")
    loaded = keras.models.load_model(tmp_path / "compiled.keras")
    assert loaded.optimizer.momentum == 0.9
    assert_same_model(classifier, loaded)


def test_values_survive_json_exactly():
    """Also those without a short decimal form, denormals and infinities."""
    inputs = keras.Input(SIZE)
    outputs = keras.layers.Conv2D(4, 1)(inputs)
    values = np.array([0.1, 1 / 3, 1e-40, np.inf], np.float32)
    statistics = {"conv": fusion.PreActivationStatistics(values, values * 7)}
    model = fusion.FusedModel(inputs, outputs, statistics=statistics)
    config = json.loads(json.dumps(model.get_config()))
    copied = fusion.FusedModel.from_config(config)
    copied.set_weights(model.get_weights())
    assert_same_statistics(statistics, copied.pre_activation_statistics)


def test_statistics_hold_for_the_weights_of_the_fusion_only(classifier):
    expected = classifier.pre_activation_statistics
    weights = classifier.get_weights()
    for index in range(len(weights)):
        changed = [weight + (number == index) for number, weight in enumerate(weights)]
        classifier.set_weights(changed)
        assert fusion.pre_activation_statistics(classifier) == {}
        classifier.set_weights(weights)
    assert_same_statistics(expected, classifier.pre_activation_statistics)


def test_training_ends_the_statistics(tmp_path):
    fused = make_classifier()
    fused.compile(keras.optimizers.SGD(0.1), "mse")
    fused.train_on_batch(make_inputs(fused), np.ones((2, 5)))
    assert fused.pre_activation_statistics == {}
    fused.save(tmp_path / "trained.keras")
    assert keras.models.load_model(tmp_path / "trained.keras").pre_activation_statistics == {}


def test_freezing_keeps_the_statistics():
    fused = make_classifier()
    expected = fused.pre_activation_statistics
    fused.get_layer("stem").trainable = False
    assert_same_statistics(expected, fused.pre_activation_statistics)


def test_clones_have_statistics_once_they_have_the_weights(tmp_path, fused):
    fused.save_weights(tmp_path / "model.weights.h5")
    for load in (
        lambda clone: clone.set_weights(fused.get_weights()),
        lambda clone: clone.load_weights(tmp_path / "model.weights.h5"),
    ):
        clone = keras.models.clone_model(fused)
        assert fusion.pre_activation_statistics(clone) == {}
        load(clone)
        assert_same_model(fused, clone)
    from_json = keras.models.model_from_json(fused.to_json())
    assert fusion.pre_activation_statistics(from_json) == {}


def test_copies_and_pickles_are_the_model(fused):
    assert_same_model(fused, copy.deepcopy(fused))
    assert_same_model(fused, pickle.loads(pickle.dumps(fused)))


def test_models_that_fuse_did_not_make_have_no_statistics(classifier):
    inputs = keras.Input(SIZE)
    models = [
        keras.Model(inputs, keras.layers.Dense(2)(inputs)),
        keras.Model(classifier.inputs, classifier.outputs),
        graph.rebuild(classifier, graph.copy_layer),
        keras.models.clone_model(classifier, clone_function=lambda layer: type(layer).from_config(layer.get_config())),
        keras.Sequential([classifier, keras.layers.Softmax()]),
    ]
    for model in models:
        assert not isinstance(model, fusion.FusedModel)
        assert fusion.pre_activation_statistics(model) == {}


def test_a_plain_copy_is_loaded_without_this_package(tmp_path, classifier, run_program):
    keras.Model(classifier.inputs, classifier.outputs).save(tmp_path / "plain.keras")
    program = f"""
import sys, tf_keras
model = tf_keras.models.load_model({str(tmp_path / "plain.keras")!r})
print(type(model).__name__, "tf_repvgg" in sys.modules)
"""
    assert run_program("-c", program).stdout == "Functional False\n"


def test_nested_in_another_model(tmp_path, classifier):
    inputs = keras.Input(SIZE)
    outer = keras.Model(inputs, keras.layers.Softmax()(classifier(inputs)))
    outer.save(tmp_path / "outer.keras")
    loaded = keras.models.load_model(tmp_path / "outer.keras")
    np.testing.assert_array_equal(loaded(make_inputs(outer)), outer(make_inputs(outer)))
    assert_same_model(classifier, loaded.get_layer(classifier.name))


def test_tfmot_takes_fused_models():
    classifier = make_classifier()  # tfmot takes the kernels out of its layers
    quantized = tfmot.quantization.keras.quantize_model(classifier)
    clustered = tfmot.clustering.keras.cluster_weights(
        classifier, 4, tfmot.clustering.keras.CentroidInitialization.LINEAR
    )
    for model in (quantized, clustered):
        assert not isinstance(model, fusion.FusedModel)
        assert model(make_inputs(model)).shape == (2, 5)


@pytest.mark.parametrize("form", FORMS)
def test_custom_layers_that_fusion_keeps_are_loaded(tmp_path, form):
    inputs = keras.Input(SIZE)
    features = OutlierAwareBatchNormalization(k=0.5)(keras.layers.ReLU()(RepVGGBlock(4, name="block")(inputs)))
    fused = fusion.fuse(keras.Model(inputs, features))
    fused.save(tmp_path / form)
    assert_same_model(fused, keras.models.load_model(tmp_path / form))
