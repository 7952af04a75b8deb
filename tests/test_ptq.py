"""Post-training quantization as a user calls it: every method, from a model to a file, and bad input."""

import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import SIZE, random_images, small_repvgg
from helpers.ptq import build_measured_repvgg, kernels_of, network_of, smooth_images

from tf_repvgg import graph, tflite
from tf_repvgg.layers import RepVGGBlock
from tf_repvgg.quantization import QuantizedModel, cluster_quantize, ptq, quantizers
from tf_repvgg.quantization.ptq import METHODS, Network, Options
from tf_repvgg.quantization.quantized_layers import kernel_of


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return small_repvgg()


@pytest.mark.parametrize("method", METHODS)
def test_every_method(model, method):
    """Codes of the requested width in every layer, outputs close to float at 6 bits, and ranges everywhere."""
    if not ptq.needs_calibration(method):
        model = build_measured_repvgg()
    batch = random_images(8, seed=1)
    expected = model(batch).numpy()
    quantized = ptq.quantize(model, method, 6, True, random_images(32), iterations=20)
    assert np.sqrt(np.mean(np.square(quantized(batch) - expected))) < 0.1 * np.std(expected)
    for kernel in kernels_of(quantized).values():
        for column in kernel.codes.reshape(-1, kernel.codes.shape[-1]).T:
            assert len(np.unique(column)) <= 64
        assert len(np.unique(kernel.codes)) > 16
        assert method.startswith("codebook") or np.max(np.abs(kernel.codes)) <= 31
    assert np.all(np.isfinite([quantizer.range.numpy() for quantizer in quantizers(quantized)]))


@pytest.mark.parametrize("name", METHODS)
def test_what_the_table_states_of_a_method(name):
    method, names_read = METHODS[name], set()

    class ObservedOptions(Options):
        def __getattribute__(self, name):
            names_read.add(name)
            return super().__getattribute__(name)

    model = build_measured_repvgg()
    bits = ptq.bits_by_layer(model, 4)
    options = ObservedOptions(iterations=2)
    names_read.clear()
    network = Network(model, random_images(8), bits, False, options)
    method.function(network)
    assert network.has_ranges == method.sets_ranges
    assert ("iterations" in names_read) == method.learns
    with pytest.raises(ValueError, match="no calibration images") if method.needs_calibration else nullcontext():
        method.function(Network(model, None, bits, False, Options()))
    assert method.summary.endswith(".") and "\n" not in method.summary


def test_from_a_combination_to_a_file(model):
    quantized = ptq.quantize(model, "equalize+adaquant", "first=8,.*=4", calibration=random_images(32), iterations=20)
    largest = {name: np.max(np.abs(kernel.codes.astype(int))) for name, kernel in kernels_of(quantized).items()}
    assert largest["first"] > 40 and largest["second"] <= 7 and largest["logits"] <= 7
    file, batch = tflite.convert(quantized), random_images(8, seed=1)
    for expected, written in zip(kernels_of(quantized).values(), tflite.weight_codes(file), strict=True):
        np.testing.assert_array_equal(expected.codes, written.codes)
        np.testing.assert_array_equal(expected.scale, written.scale)
    difference = np.abs(tflite.predict(file, batch) - quantized(batch).numpy())
    assert np.max(difference) <= 2.01 * quantizers(quantized)[-1].scale()


LOAD = """
import sys, numpy as np, tf_repvgg, tf_keras as keras
from tf_repvgg import tflite
folder = sys.argv[1]
model = keras.models.load_model(f"{folder}/model{sys.argv[2]}")
print(*model.quantization_notes, sep="\\n")
np.savez(f"{folder}/outputs.npz", **model(np.load(f"{folder}/images.npy")))
keras.models.clone_model(model).save(f"{folder}/clone.keras")
open(f"{folder}/model.tflite", "wb").write(tflite.convert(model))
"""


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_notes_are_saved(tmp_path, ending):
    """And so is the structure of outputs; in another process, which imports nothing but the package."""
    inputs = keras.Input(SIZE, name="image")
    features = keras.layers.Conv2D(4, 3, activation="tanh", name="conv")(inputs)
    pooled = keras.layers.GlobalAveragePooling2D()(features)
    outputs = {name: keras.layers.Dense(2, name=name)(pooled) for name in ("right", "left")}
    model = keras.Model(inputs, outputs, name="both")
    quantized = ptq.quantize(model, "equalize", calibration=random_images(8))
    notes = ("layers not equalized with the next one: conv",)
    assert quantized.quantization_notes == notes and quantized.name == "both"
    quantized.save(tmp_path / f"model{ending}")
    images = random_images(4, seed=1)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", LOAD, str(tmp_path), ending]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == list(notes)
    expected = quantized(images)
    with np.load(tmp_path / "outputs.npz") as actual:
        assert set(actual) == set(expected) == {"left", "right"}
        for name in expected:
            np.testing.assert_array_equal(actual[name], expected[name])
    assert (tmp_path / "model.tflite").read_bytes() == tflite.convert(quantized)
    clone = keras.models.load_model(tmp_path / "clone.keras")
    assert clone.quantization_notes == notes and set(clone.output) == {"left", "right"}


def test_quantized_model_in_other_models():
    """Rebuilt, with its layers shared, and nested with inputs and outputs in dictionaries."""
    inputs = {name: keras.Input((4,), name=name) for name in ("first", "second")}
    outputs = {"sum": keras.layers.Add()(list(inputs.values()))}
    model = QuantizedModel.from_model(keras.Model(inputs, outputs, name="inner"), ["a note"])
    rebuilt = graph.rebuild(model, graph.copy_layer)
    outer = keras.Model(inputs, model({"second": inputs["second"], "first": inputs["first"]}))
    clone = keras.models.clone_model(outer)
    values = {name: np.full((1, 4), value, np.float32) for name, value in (("second", 2), ("first", 1))}
    for form in (model, rebuilt, outer, clone):
        np.testing.assert_array_equal(form(values)["sum"], np.full((1, 4), 3))
    assert clone.get_layer("inner").quantization_notes == ("a note",)


def test_seeded(model):
    runs = [
        ptq.quantize(model, "adaquant", 3, calibration=smooth_images(), iterations=30, seed=seed) for seed in (1, 1, 2)
    ]
    codes = [np.concatenate([kernel.codes.ravel() for kernel in kernels_of(run).values()]) for run in runs]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert np.any(codes[0] != codes[2])


@pytest.mark.parametrize("clusters, per_channel", [(2, False), (5, True), (256, False)])
@pytest.mark.parametrize("method", ["codebook", "codebook_adaquant"])
def test_clusters_of_codebooks(model, method, clusters, per_channel):
    options = {"number_of_clusters": {"second": 3, ".*": clusters}, "iterations": 20}
    quantized = ptq.quantize(model, method, 8, per_channel, random_images(8), **options)
    for name, kernel in kernels_of(quantized).items():
        expected = 3 if name == "second" else clusters
        columns = kernel.codes.shape[-1] if per_channel else 1
        for column in kernel.codes.reshape(-1, columns).T:
            assert len(np.unique(column)) <= expected
            assert expected == 256 or len(np.unique(column)) == expected or not np.any(column)  # a dead channel


def test_in_float_again(model):
    """Training continues from the result: clusters start where the codebooks are."""
    options = {"number_of_clusters": 5, "iterations": 20}
    quantized = ptq.quantize(model, "codebook_adaquant", 8, False, random_images(8), **options)
    in_float = ptq.dequantize(model, quantized)
    for name, kernel in kernels_of(quantized).items():
        np.testing.assert_array_equal(kernel_of(in_float.get_layer(name)), kernel.dequantize())
        np.testing.assert_array_equal(in_float.get_layer(name).bias, quantized.get_layer(name).bias)
        assert type(in_float.get_layer(name)) is type(model.get_layer(name))
    clustered = cluster_quantize(in_float, 5, activation_bits=None)
    np.testing.assert_allclose(clustered(random_images(8)), in_float(random_images(8)), atol=1e-5)
    with pytest.raises(ValueError, match="layer 'first' is not quantized in '"):
        ptq.dequantize(model, model)
    assert ptq.dequantized is ptq.dequantize  # programs of users import the old name


def test_biases_stay_within_32_bits(model):
    network = network_of(model, 8)
    METHODS["min_max"].function(network)
    network.set_bias("first", np.full(8, -1e30))
    tflite.convert(network.quantized)


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
    refuses(
        "reach 255, as pixels do, and layer .first. takes them like that; they must be normalized",
        calibration=[np.full(SIZE, 255.0)],
    )
    refuses("percentile is 10", percentile=10)
    refuses("numbers of clusters are 257; they must be a whole number from 2 to 256", number_of_clusters=257)
    refuses("pattern 'secnd' of numbers of clusters matches no layer", number_of_clusters="secnd=4,.*=8")
    refuses("iterations is 0; it must be 1 or more", iterations=0)
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
