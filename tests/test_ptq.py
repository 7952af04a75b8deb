"""Post-training quantization: each method does what its paper says, and none ends worse than it started."""

import sys

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import SIZE, random_images, small_repvgg
from helpers.random_weights import randomize
from hypothesis import given
from hypothesis import strategies as st

from tf_repvgg import graph, tflite
from tf_repvgg.fusion import fuse
from tf_repvgg.layers import QARepVGGBlock, RepVGGBlock
from tf_repvgg.quantization import cluster_quantize, ptq, quantize_min_max, quantizers
from tf_repvgg.quantization.k_means import k_means
from tf_repvgg.quantization.ptq import METHODS, Network, Options
from tf_repvgg.quantization.ptq.methods.dfq import absorb_high_biases
from tf_repvgg.quantization.ptq.methods.equalize import chain_pairs
from tf_repvgg.quantization.ptq.methods.mse import best_grid, best_range
from tf_repvgg.quantization.ptq.methods.octav import optimal_clip
from tf_repvgg.quantization.ptq.methods.percentile import central_range
from tf_repvgg.quantization.ptq.observers import Histogram
from tf_repvgg.quantization.ptq.reconstruction import objective
from tf_repvgg.quantization.ptq.statistics import clipped_normal, predict
from tf_repvgg.quantization.quantized_layers import kernel_of


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return small_repvgg()


def smooth_images(count=32):
    """Neighbouring pixels alike, as in photographs: on white noise, the nearest codes are already the best."""
    coarse = random_images(count, (3, 3, 3))
    return coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :, :11] + 0.1 * random_images(count, seed=1)


def network_of(model, bits=3, per_channel=False, batch=None, **options):
    batch = random_images(32, model.input_shape[1:]) if batch is None else batch
    return Network(model, batch, ptq.bits_by_layer(model, bits), per_channel, Options(**options))


def measured_repvgg(block=RepVGGBlock):
    """A fused model whose normalizations hold the statistics of `random_images(64)`, as after training."""
    inputs = keras.Input(SIZE, name="image")
    features = block(8, strides=2, name="second")(block(8, name="first")(inputs))
    features = keras.layers.GlobalAveragePooling2D(name="pool")(features)
    model = keras.Model(inputs, keras.layers.Dense(5, name="logits")(features))
    randomize(model, dead_share=0)
    for layer in graph.find_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(random_images(64), training=True)
    return fuse(model)


def kernels_of(model):
    return {name: model.get_layer(name).quantized_kernel() for name in ("first", "second", "logits")}


@pytest.mark.parametrize("method", METHODS)
def test_every_method(model, method):
    """The codes of the asked width in every layer, close to float at 6 bits, and ranges everywhere."""
    if not ptq.needs_calibration(method):
        model = measured_repvgg()
    batch = random_images(8, seed=1)
    expected = model(batch).numpy()
    found = ptq.quantize(model, method, 6, True, random_images(32), iterations=20)
    assert np.sqrt(np.mean(np.square(found(batch) - expected))) < 0.1 * np.std(expected)
    for quantized in kernels_of(found).values():
        for column in quantized.codes.reshape(-1, quantized.codes.shape[-1]).T:
            assert len(np.unique(column)) <= 64
        assert len(np.unique(quantized.codes)) > 16
        assert method.startswith("codebook") or np.max(np.abs(quantized.codes)) <= 31
    assert np.all(np.isfinite([quantizer.range.numpy() for quantizer in quantizers(found)]))


def test_from_a_combination_to_a_file(model):
    found = ptq.quantize(model, "equalize+adaquant", "first=8,.*=4", calibration=random_images(32), iterations=20)
    largest = {name: np.max(np.abs(kernel.codes.astype(int))) for name, kernel in kernels_of(found).items()}
    assert largest["first"] > 40 and largest["second"] <= 7 and largest["logits"] <= 7
    file, batch = tflite.convert(found), random_images(8, seed=1)
    for own, written in zip(kernels_of(found).values(), tflite.weight_codes(file), strict=True):
        np.testing.assert_array_equal(own.codes, written.codes)
        np.testing.assert_array_equal(own.scale, written.scale)
    difference = np.abs(tflite.predict(file, batch) - found(batch).numpy())
    assert np.max(difference) <= 2.01 * quantizers(found)[-1].scale()


def test_equalized_model_is_the_same_function(model):
    network = network_of(model)
    before = {name: network.kernel(name) for name in network.layers}
    METHODS["equalize"].function(network)
    batch = random_images(8, seed=2)
    expected = model(batch).numpy()
    assert np.max(np.abs(network.float(batch) - expected)) < 1e-4 * np.max(np.abs(expected))
    for first, second in (("first", "second"), ("second", "logits")):
        r1 = np.max(np.abs(network.kernel(first)), axis=(0, 1, 2))
        after = network.kernel(second)
        r2 = np.max(np.abs(after), axis=(*range(after.ndim - 2), after.ndim - 1))
        alive = (r1 > 0) & (r2 > 0)
        np.testing.assert_allclose(r1[alive], r2[alive], rtol=0.02)
        assert not np.allclose(network.kernel(first), before[first], rtol=0.1)
    assert network.notes == []


@pytest.mark.parametrize("size", [0, 1e-30])
def test_channels_that_training_has_emptied_are_not_equalized(size):
    """Their biases would grow without bound, and no scale of the weights would serve both."""
    model = small_repvgg()
    emptied = model.get_layer("second")
    kernel, bias = emptied.get_weights()
    kernel[..., :2] *= size
    bias[:2] = 0.5
    emptied.set_weights([kernel, bias])
    batch = random_images(32, model.input_shape[1:])
    found = ptq.quantize(model, "equalize", calibration=batch)
    assert found.get_layer("second").bias.numpy()[:2] == pytest.approx(0.5, rel=0.01)
    expected = model(batch).numpy()
    for predicted in (found(batch).numpy(), tflite.predict(tflite.convert(found), batch)):
        assert np.max(np.abs(predicted - expected)) < 0.05 * np.max(np.abs(expected))


def test_only_what_is_safe_is_equalized():
    """A branch, groups, and an activation that no factor passes."""
    inputs = keras.Input((8, 8, 4), name="image")
    conv = lambda name, **options: keras.layers.Conv2D(4, 3, padding="same", name=name, **options)  # noqa: E731
    split = conv("split", activation="relu")(inputs)
    both = keras.layers.Add()([conv("left", activation="relu6")(split), conv("right")(split)])
    features = conv("grouped", groups=2)(conv("before_groups")(both))
    features = keras.layers.MaxPooling2D()(keras.layers.ReLU()(features))
    outputs = keras.layers.Dense(3, name="dense")(keras.layers.GlobalAveragePooling2D()(features))
    model = keras.Model(inputs, outputs)
    network = network_of(model)
    batch = random_images(8, (8, 8, 4), seed=2)
    before = {name: network.kernel(name) for name in network.layers}
    METHODS["equalize"].function(network)
    expected = model(batch).numpy()
    assert np.max(np.abs(network.float(batch) - expected)) < 1e-4 * np.max(np.abs(expected))
    changed = {name for name, kernel in before.items() if not np.allclose(kernel, network.kernel(name))}
    assert changed == {"grouped", "dense"}
    (note,) = network.notes
    assert note.startswith("not equalized with what follows them: ")
    assert set(note.partition(": ")[2].split(", ")) == {"split", "left", "right", "before_groups"}


@pytest.mark.parametrize("bits, per_channel", [(2, True), (3, False), (8, False)])
@pytest.mark.parametrize("method", ["adaround", "adaquant", "codebook_adaquant"])
def test_no_layer_ends_worse_than_its_start(model, method, bits, per_channel, monkeypatch):
    """On the calibration objective, given the prefix as it ended; and the network as a whole ends better."""
    batch = smooth_images()
    start, network = (network_of(model, bits, per_channel, batch, iterations=40) for _ in range(2))
    METHODS["codebook" if method == "codebook_adaquant" else "mse"].function(start)
    module = sys.modules[f"tf_repvgg.quantization.ptq.{method}"]
    monkeypatch.setattr(module, "bias_tune", lambda network: None)  # it moves the biases of the prefix once more
    METHODS[method].function(network)
    assert bits == 8 or network.error() < start.error()
    errors = []
    for name in network.layers:
        layer, inputs, expected = network.quantized.get_layer(name), network.inputs_of(name), network.outputs_of(name)
        errors.append(
            [
                objective(layer, its.kernels[name], its.quantized_bias(name), inputs, expected)
                for its in (network, start)
            ]
        )
    assert all(ended <= started for ended, started in errors)
    assert bits == 8 or errors[0][0] < errors[0][1]  # in 8 bits a few steps may find nothing better
    monkeypatch.undo()
    tuned_from = network.error()
    METHODS["bias_tune"].function(network)
    assert network.error() <= tuned_from
    if method == "adaround" and bits == 3:
        for name, quantized in network.kernels.items():
            exact = np.clip(network.kernel(name) / quantized.scale, -3, 3)
            assert np.all(np.abs(quantized.codes - exact) <= 1)


def test_a_start_that_cannot_be_improved_is_kept(model, monkeypatch):
    """A learning rate that ruins everything."""
    for method in ("adaquant", "bias_tune"):
        monkeypatch.setattr(sys.modules[f"tf_repvgg.quantization.ptq.{method}"], "_LEARNING_RATE", 1e3)
    start, network = network_of(model, 8), network_of(model, 8, iterations=5)
    METHODS["mse"].function(start)
    METHODS["adaquant"].function(network)
    for name, quantized in start.kernels.items():
        np.testing.assert_array_equal(network.kernels[name].codes, quantized.codes)
        np.testing.assert_array_equal(network.quantized_bias(name), start.quantized_bias(name))
    assert network.notes == ["bias tuning undone: the outputs' error was no smaller for it"]


def test_bias_tuning_moves_biases_alone(model):
    start, network = network_of(model, 3), network_of(model, 3, iterations=100)
    METHODS["mse"].function(start)
    METHODS["bias_tune"].function(network)
    assert network.error() < 0.9 * start.error() and network.notes == []
    for name, quantized in start.kernels.items():
        np.testing.assert_array_equal(network.kernels[name].codes, quantized.codes)
        assert np.any(network.quantized_bias(name) != start.quantized_bias(name))
    tflite.convert(network.quantized)


def test_biases_stay_within_32_bits(model):
    network = network_of(model, 8)
    METHODS["min_max"].function(network)
    network.set_bias("first", np.full(8, -1e30))
    tflite.convert(network.quantized)


def test_seeded(model):
    runs = [
        ptq.quantize(model, "adaquant", 3, calibration=smooth_images(), iterations=30, seed=seed) for seed in (1, 1, 2)
    ]
    one, same, other = (np.concatenate([k.codes.ravel() for k in kernels_of(run).values()]) for run in runs)
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


def test_bias_correction_restores_means(model):
    network = network_of(model, 3)
    METHODS["min_max"].function(network)
    before = network.error()
    METHODS["bias_correct"].function(network)
    assert network.error() < before
    for name in network.layers:
        expected = network.linear_outputs_of(name)
        found = network.linear_outputs_of_quantized(name) + network.quantized_bias(name)
        axes = tuple(range(expected.ndim - 1))
        np.testing.assert_allclose(found.mean(axes), expected.mean(axes), atol=1e-4 * np.abs(expected).max())


def test_absorption_keeps_the_function_above_its_threshold():
    inputs = keras.Input((6, 6, 3), name="image")
    features = keras.layers.Conv2D(4, 3, activation="relu", name="high", bias_initializer=constant(20.0))(inputs)
    outputs = keras.layers.Conv2D(2, 3, name="next")(features)
    model = keras.Model(inputs, outputs)
    network = network_of(model)
    absorb_high_biases(network)
    difference = np.abs(network.float(network.images) - model(network.images).numpy())
    assert np.max(difference) < 0.1 and np.mean(difference < 1e-4) > 0.9  # one in a thousand inputs is below it
    assert np.all(network.bias("high") < 15)


def test_looking_at_a_network_does_not_break_its_chain(model):
    network = network_of(model)
    before = [(first.name, second.name) for first, second in chain_pairs(network)]
    network.linear_outputs_of("first")
    assert [(first.name, second.name) for first, second in chain_pairs(network)] == before != []


def test_clipped_normal():
    sample = np.random.default_rng(0).normal(0.3, 2.0, 1_000_000)
    for ends in ((0, np.inf), (0, 6), (-np.inf, np.inf), (-1, 1), (20, 30)):
        clipped = np.clip(sample, *ends)
        np.testing.assert_allclose(clipped_normal(0.3, 2.0, *ends), (clipped.mean(), clipped.std()), atol=0.01)
    mean, deviation = clipped_normal(np.array([-1.0, -7e3, 1.0]), np.array([0, 1e-9, 0]), 0, np.inf)  # dead channels
    np.testing.assert_allclose([mean, deviation], [[0, 0, 1], [0, 0, 0]], atol=1e-9)


@pytest.mark.parametrize("block", [QARepVGGBlock, RepVGGBlock])
def test_statistics_without_data(block):
    """Means are exact, on the images of the statistics; deviations after one normalization, and after several about."""
    network = network_of(measured_repvgg(block), batch=random_images(64))
    METHODS["equalize"].function(network)
    predicted = predict(network)
    for name in ("first", "second"):
        found = network.linear_outputs_of(name)
        mean, deviation = found.mean((0, 1, 2)), found.std((0, 1, 2))
        assert np.max(np.abs(predicted.linear[name].mean - mean) / deviation) < 2e-3
        share = predicted.linear[name].deviation / deviation
        assert np.max(np.abs(share - 1)) < (2e-3 if block is QARepVGGBlock else 1)
        inputs = network._run(network.float, network.layers[name].input).mean((0, 1, 2))
        assert name == "first" or np.mean(np.abs(predicted.inputs[name].mean - inputs) / inputs.max()) < 0.1
    for name, activations in next(iter(network.activations())).items():
        its = predicted.activations[name]
        assert activations.min() >= its.low.min() - 1e-6 and activations.max() <= its.high.max() + 0.01


def test_dfq_without_data():
    """Shifts of the mean are taken out, and calibration images change nothing but the notes."""
    model = measured_repvgg()
    free = ptq.quantize(model, "dfq_data_free", 3)
    given = ptq.quantize(model, "equalize+dfq_data_free", 3, calibration=random_images(64))
    for mine, its in zip(free.get_weights(), given.get_weights(), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-3, atol=1e-5)
    assert free.quantization_notes == ("no statistics, so followed from the inputs: logits",)
    assert (
        "standard deviations predicted without data differ from those on the calibration" in given.quantization_notes[1]
    )
    network = network_of(model, 3, batch=random_images(64))
    METHODS["dfq_data_free"].function(network)
    expected, found = network.linear_outputs_of("second"), network.linear_outputs_of_quantized("second")
    shifts = [
        np.sum(np.square((found + bias - expected).mean((0, 1, 2))))
        for bias in (network.quantized_bias("second"), network.bias("second"))
    ]
    assert shifts[0] < 0.5 * shifts[1]


def test_dfq_without_statistics(model):
    without = keras.models.clone_model(model)
    with pytest.raises(ValueError, match=r"this model holds none: give it what tf_repvgg\.fusion\.fuse returns"):
        ptq.quantize(without, "dfq_data_free")
    inputs = keras.Input(SIZE)
    features = RepVGGBlock(8, name="first")(inputs)
    features = keras.layers.Multiply(name="gate")([features, features])
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(features))
    with pytest.raises(ValueError, match="'gate': distributions cannot be followed through Multiply without data"):
        ptq.quantize(fuse(keras.Model(inputs, outputs)), "dfq_data_free")
    for method in ("equalize", "dfq", "dfq_data_free+bias_tune"):
        with pytest.raises(ValueError, match="there are no calibration images"):
            ptq.quantize(model, method)
    with pytest.raises(ValueError, match="there are no calibration images"):
        ptq.quantize(model, "dfq_data_free", calibration=[])


def constant(value):
    return keras.initializers.Constant(value)


def test_dfq_says_what_absorption_did(model):
    found = ptq.quantize(model, "dfq", 4, calibration=random_images(32))
    assert any("high-bias absorption changed the float outputs by" in note for note in found.quantization_notes)


@given(seed=st.integers(0, 1000), bits=st.integers(2, 8), per_channel=st.booleans())
def test_mse_grid_is_never_worse_than_min_max(seed, bits, per_channel):
    kernel = np.random.default_rng(seed).standard_t(3, (3, 3, 4, 5)).astype("float32")
    best, plain = (method(kernel, bits, per_channel) for method in (best_grid, quantize_min_max))
    errors = [np.sum(np.square(found.dequantize() - kernel)) for found in (best, plain)]
    assert errors[0] <= errors[1]
    assert bits > 4 or errors[0] < errors[1]


def test_mse_range_clips_an_outlier_that_min_max_keeps():
    values = np.append(np.random.default_rng(0).normal(size=1_000_000), 40.0)
    counts, edges = np.histogram(values, 2048)
    low, high = best_range(Histogram(counts, edges))
    assert high < 30 and low < -3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_octav_clips_where_its_objective_is_smallest(bits, per_channel):
    kernel = np.random.default_rng(0).standard_t(3, (3, 3, 16, 4)).astype(np.float32) * (1, 10, 0.1, 0)
    found = optimal_clip(kernel, bits, per_channel)
    assert found.shape == ((4,) if per_channel else (1,))
    for clip, weights in zip(found, np.abs(kernel.reshape(-1, 4)).T if per_channel else [np.abs(kernel)], strict=True):

        def objective(clip, weights=weights[weights > 0]):
            return np.sum(np.where(weights > clip, np.square(weights - clip), 4.0**-bits / 3 * clip**2))

        # Newton's iteration overlooks that the number of weights beyond a clip jumps.
        assert objective(clip) <= 1.02 * min(map(objective, np.linspace(0, np.max(weights), 1001)))


def test_percentile_range_by_hand():
    histogram = Histogram(np.array([1, 0, 48, 50, 1]), np.arange(6.0))
    assert central_range(histogram, 0.98) == (2.0, 4.0)
    assert central_range(histogram, 1.0) == (0.0, 5.0)


@given(seed=st.integers(0, 1000), states=st.integers(2, 40))
def test_k_means(seed, states):
    """A fixed point of Lloyd's algorithm that is better than a uniform grid of as many states."""
    generator = np.random.default_rng(seed)
    values, weights = generator.standard_t(3, 500), generator.uniform(0.1, 5, 500)
    centroids = k_means(values, weights, states)
    assert len(centroids) == states and np.all(np.diff(centroids) >= 0)

    def error(book):
        return np.sum(weights * np.min(np.square(values[:, None] - book), axis=1))

    assert error(centroids) < error(np.linspace(values.min(), values.max(), states))


def test_k_means_follows_the_weights():
    values = np.array([0.0, 1.0, 10.0, 11.0])
    np.testing.assert_allclose(k_means(values, np.array([1, 3, 1, 1]), 2), [0.75, 10.5])
    np.testing.assert_array_equal(k_means(np.array([2.0, 1.0, 2.0]), np.ones(3), 5), [1, 2])
    np.testing.assert_array_equal(k_means(np.zeros(4), np.zeros(4), 3), [0])


@pytest.mark.parametrize("states, per_channel", [(2, False), (5, True), (256, False)])
@pytest.mark.parametrize("method", ["codebook", "codebook_adaquant"])
def test_codebook_states(model, method, states, per_channel):
    options = {"number_of_clusters": {"second": 3, ".*": states}, "iterations": 20}
    found = ptq.quantize(model, method, 8, per_channel, random_images(8), **options)
    for name, quantized in kernels_of(found).items():
        states = 3 if name == "second" else options["number_of_clusters"][".*"]
        columns = quantized.codes.shape[-1] if per_channel else 1
        for column in quantized.codes.reshape(-1, columns).T:
            assert len(np.unique(column)) <= states
            assert states == 256 or len(np.unique(column)) == states or not np.any(column)  # a dead channel


def test_in_float_again(model):
    """Training goes on from what was found: clusters start where the codebooks are."""
    found = ptq.quantize(model, "codebook_adaquant", 8, False, random_images(8), number_of_clusters=5, iterations=20)
    in_float = ptq.dequantized(model, found)
    for name, quantized in kernels_of(found).items():
        np.testing.assert_array_equal(kernel_of(in_float.get_layer(name)), quantized.dequantize())
        np.testing.assert_array_equal(in_float.get_layer(name).bias, found.get_layer(name).bias)
        assert type(in_float.get_layer(name)) is type(model.get_layer(name))
    clustered = cluster_quantize(in_float, 5, activation_bits=None)
    np.testing.assert_allclose(clustered(random_images(8)), in_float(random_images(8)), atol=1e-5)
    with pytest.raises(ValueError, match="layer 'first' is not quantized in '"):
        ptq.dequantized(model, model)


def test_bits_by_pattern(model):
    assert ptq.bits_by_layer(model, 4) == ptq.bits_by_layer(model, "4") == {"first": 4, "second": 4, "logits": 4}
    assert ptq.bits_by_layer(model, "fi.*=8,.*=3") == {"first": 8, "second": 3, "logits": 3}
    for bad in (1, 9, "x", "a=1", 4.5, True, {"a": None}):
        with pytest.raises(ValueError, match="must be a whole number from 2 to 8"):
            ptq.bits_by_layer(model, bad)
    with pytest.raises(ValueError, match="not a regular expression"):
        ptq.bits_by_layer(model, "(=4")


def test_bad_input(model):
    def refuses(match, model=model, calibration=None, **arguments):
        calibration = random_images(2) if calibration is None else calibration
        with pytest.raises(ValueError, match=match):
            ptq.quantize(model, calibration=calibration, **arguments)

    refuses("PTQ method is 'minmax'; known: min_max, ", method="minmax")
    refuses("PTQ method is ''", method="mse+")
    refuses("'secnd' of weight bits matches no layer; there are: second", weight_bits="secnd=4,.*=8")
    refuses("no pattern of weight bits matches layer 'second'", weight_bits="first=4")
    refuses("there are no calibration images", calibration=[])
    refuses(r"image 1 has shape \(3, 3, 3\)", calibration=[np.zeros(SIZE), np.zeros((3, 3, 3))])
    refuses("image 0 holds infinities or NaN", calibration=[np.full(SIZE, np.nan)])
    refuses("reach 255, as pixels do; they must be normalised", calibration=[np.full(SIZE, 255.0)])
    refuses("percentile is 10", percentile=10)
    refuses("numbers of clusters are 257; they must be a whole number from 2 to 256", number_of_clusters=257)
    refuses("pattern 'secnd' of numbers of clusters matches no layer", number_of_clusters="secnd=4,.*=8")
    refuses("iterations are 0", iterations=0)
    refuses(r"image 0 has shape \(12, 11\)", calibration=[np.zeros(SIZE[:2])])
    refuses("input_range is", input_range=(1.0, -1.0))
    for bits in (1, 9):
        refuses(f"weight bits are {bits}; they must be a whole number from 2 to 8", weight_bits=bits)
    inputs = keras.Input(SIZE)
    training_form = keras.Model(inputs, RepVGGBlock(4, name="stem")(inputs))
    refuses(r"block 'stem' is still in training form; call tf_repvgg\.fusion\.fuse", model=training_form)
    broken = keras.models.clone_model(model)
    broken.get_layer("first").bias.assign(np.full(8, np.nan))
    refuses("layer 'first' holds infinities or NaN", model=broken)
