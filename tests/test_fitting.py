"""Fitting levels to budgets: exact choices, damages, costs, files that fit, and budgets that cannot be met."""

import itertools
import re

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import model_of_all_weighted_layers, random_images, small_repvgg
from helpers.ptq import build_measured_repvgg, network_of

from tf_repvgg import quantization, storage, tflite
from tf_repvgg.quantization import GRANULARITIES, QuantizedLayer, ptq
from tf_repvgg.quantization.fitting import Budget, BudgetError, Fitter, Level
from tf_repvgg.quantization.fitting.choice import choose
from tf_repvgg.quantization.fitting.costs import FIT_TARGETS
from tf_repvgg.quantization.fitting.outputs import OutputError
from tf_repvgg.quantization.fitting.search import fits, search

LEVELS = [Level(number, False) for number in (2, 4, 16)]


@pytest.fixture(scope="module")
def images():
    return random_images(24)


@pytest.fixture(scope="module")
def digits_images(digits):
    return np.stack(list(digits.calibration(24).as_numpy_iterator()))


@pytest.fixture(scope="module")
def fitter(fused_digits, digits_images):
    return Fitter(fused_digits, "tflm_lut", digits_images, "codebook", evaluations=6)


def find_budget(fitter, share):
    """A share of the bytes of a file of 8 bits."""
    return Budget(file_bytes=int(share * fitter.estimate_bytes(fitter.find_extremes()[1])))


def make_problem(seed):
    """Random damages and costs of four layers."""
    generator = np.random.default_rng(seed)
    names = [f"layer{number}" for number in range(4)]
    damages = {name: {level: float(generator.uniform()) for level in LEVELS} for name in names}
    costs = {
        name: {level: [float(generator.uniform(1, 9)), float(generator.uniform())] for level in LEVELS}
        for name in names
    }
    return damages, costs


@pytest.mark.parametrize("seed", range(8))
def test_a_choice_is_the_best_of_all(seed):
    damages, costs = make_problem(seed)
    limits = [18.0, 2.0]
    candidates = [dict(zip(damages, levels, strict=True)) for levels in itertools.product(LEVELS, repeat=len(damages))]
    allowed = [levels for levels in candidates if fits(levels, costs, limits)]
    sums = [sum(damages[name][level] for name, level in levels.items()) for levels in allowed]
    choice = choose(damages, costs, limits)
    if not sums:
        assert choice is None
    else:
        assert fits(choice, costs, limits)
        assert sum(damages[name][level] for name, level in choice.items()) == pytest.approx(min(sums))


def test_a_search_finds_what_sums_hide():
    """The error is not the sum of the damages here: two layers disturb each other."""
    damages, costs = make_problem(0)
    limits = [30.0, np.inf]
    start = choose(damages, costs, limits)
    first, second, *_ = damages

    def measure(levels):
        error = sum(damages[name][level] for name, level in levels.items())
        return error + 10 * (levels[first] == start[first] and levels[second] == start[second])

    levels, error = search([start], damages, costs, limits, measure, evaluations=50)
    assert error < 10 < measure(start) and fits(levels, costs, limits)
    assert search([start], damages, costs, limits, measure, evaluations=0) == (start, measure(start))


@pytest.mark.parametrize(
    "text,expected",
    [
        ("weights:256kB", Budget(file_bytes=256_000)),
        ("weights:1.5MiB,arena:64KiB", Budget(1_572_864, 65_536)),
        ("time:500us", Budget(time_ms=0.5)),
        ("weights:2kB, time:1s", Budget(2000, None, 1000.0)),
    ],
)
def test_budgets(text, expected):
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    "text,message",
    [
        ("weights", "holds 'weights'"),
        ("weights:5", "holds 'weights:5'"),
        ("weights:5ms", "unit 'ms'"),
        ("time:5kB", "unit 'kB'"),
        ("weights:0B", "above zero"),
        ("weights:5kB,weights:6kB", "names weights twice"),
    ],
)
def test_budgets_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        Budget.parse(text)


def build_branches():
    """A layer whose output two branches read, and one that is called twice."""
    inputs = keras.Input((8, 8, 3))
    stem = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="stem")(inputs)
    shared = keras.layers.Conv2D(4, 1, name="shared")
    gate = keras.layers.Conv2D(4, 1, activation="sigmoid", name="gate")(stem)
    outputs = keras.layers.Add()([shared(stem), shared(keras.layers.Multiply()([stem, gate]))])
    return keras.Model(inputs, keras.layers.Dense(5, name="logits")(keras.layers.Flatten()(outputs)))


@pytest.mark.parametrize("build", [small_repvgg, model_of_all_weighted_layers, build_branches])
def test_damages_are_errors_of_the_whole_network(build):
    """Levels of a layer share the layers before it, and leave the network as it was."""
    network = network_of(build())
    before = network.float.get_weights()
    outputs = OutputError(network.float, network.calibration)
    for name in network.layers:
        kernels = [quantization.quantize_min_max(network.kernel(name), bits) for bits in (2, 4, 8)]
        errors = outputs.measure_each(name, kernels)
        assert errors == pytest.approx([outputs.measure({name: kernel}) for kernel in kernels], rel=1e-4)
        assert errors[0] > errors[1] > errors[2] > 0
    assert all(map(np.array_equal, before, network.float.get_weights()))
    assert outputs.measure({}) < 1e-10


def test_estimates_are_close_to_files(fitter):
    """Up to a constant for the graph, for choices that have nothing in common."""
    constants = []
    for pick in (min, max):
        levels = {name: pick(costs, key=lambda level: costs[level][0]) for name, costs in fitter.costs.items()}
        constants.append(fitter.compare_with_estimate(fitter.build(levels))["file_bytes"])
    assert abs(constants[0] - constants[1]) < 1000


def test_a_file_fits_and_serves_better_than_a_uniform_one(fitter):
    uniform = dict.fromkeys(fitter.costs, Level(4, False))
    limit = fitter.build(uniform).assignment.measured["file_bytes"]
    fitted = fitter.fit(Budget(file_bytes=limit))
    assignment = fitted.assignment
    assert len(fitted.built.files["_lut.tflite"]) == assignment.measured["file_bytes"] <= limit
    assert assignment.error == pytest.approx(fitter.measure_error(assignment.levels))
    assert assignment.error <= fitted.record["error_of_exact_choice"]
    assert assignment.error < fitter.measure_error(uniform)
    layers = {layer.name: layer for layer in fitted.network.quantized.layers if isinstance(layer, QuantizedLayer)}
    for layer in assignment.layers:
        kernel = layers[layer.name].get_quantized_kernel()
        columns = kernel.codes.reshape(-1, kernel.codes.shape[-1]).T if layer.level.per_channel else [kernel.codes]
        assert max(len(np.unique(column)) for column in columns) <= layer.level.number
        assert (len(kernel.scale) > 1) == layer.level.per_channel
    table = str(assignment).splitlines()
    assert table[0].split() == ["layer", "weights", "clusters", "granularity", "bytes", "damage"]
    assert len(table) == len(assignment.layers) + 3


def test_an_assignment_is_taken_where_numbers_of_clusters_are(fitter, fused_digits, digits_images):
    model, images = fused_digits, digits_images
    assignment = fitter.fit(find_budget(fitter, 0.5)).assignment
    granularities = assignment.per_channel
    quantized = ptq.quantize(
        model, "codebook", number_of_clusters=assignment, per_channel=granularities, calibration=images
    )
    clustered = quantization.cluster_quantize(model, assignment, cluster_per_channel=granularities, calibration=images)
    stripped = quantization.strip_cluster_quantize(clustered)
    for layer in assignment.layers:
        for form in (quantized, stripped):
            assert form.get_layer(layer.name).per_channel == layer.level.per_channel
        centroids = clustered.get_layer(f"cluster_{layer.name}").cluster_centroids["kernel"]
        assert centroids.shape[1] == layer.level.number
    numbers, granularities = (line.partition("=")[2] for line in assignment.as_flags().splitlines())
    again = quantization.cluster_quantize(model, numbers, cluster_per_channel=granularities)
    shapes = [[weight.shape for weight in form.weights] for form in (clustered, again)]
    assert shapes[0] == shapes[1]


def test_budgets_that_cannot_be_met(fitter):
    with pytest.raises(BudgetError, match=r"^a file of 500 bytes cannot be met on .* is a file of [\d,]+ bytes"):
        fitter.fit("weights:500B")
    with pytest.raises(BudgetError, match=r"an arena of 100 bytes cannot be met .* the smallest arena"):
        fitter.fit("arena:100B")
    with pytest.raises(BudgetError, match=r"leaves room for 8 bits in each layer, [\d,]+ bytes; .* litert_int8"):
        fitter.fit("weights:9MB")
    with pytest.raises(ValueError, match="does not report a time; a budget for it may hold: file, arena"):
        fitter.fit("time:5ms")


def test_an_arena_leaves_layers_uncompressed(fitter):
    """TFLite Micro unpacks weights into the arena."""
    smallest = fitter.smallest.assignment.measured["arena_bytes"]
    assert smallest > fitter.smallest.built.record["arena_bytes_of_int8_file"]
    limits = Budget(find_budget(fitter, 0.9).file_bytes, int(smallest) - 1)
    measured = fitter.fit(limits).assignment.measured
    assert all(measured[field] <= limit for field, limit in limits.limits().items())


def test_damages_are_measured_once(images, tmp_path, monkeypatch):
    model = build_measured_repvgg()

    def make():
        work = storage.FinishedWork(tmp_path)
        return Fitter(model, "tflm_lut", images, "codebook", ["per_tensor"], finished_work=work)

    first = make()
    monkeypatch.setattr(OutputError, "measure_each", lambda *_: pytest.fail("measured again"))
    assert make().damages == first.damages


def test_uniform_grids_of_four_and_eight_bits(images):
    fitter = Fitter(small_repvgg(), "litert_int4", images, "mse", evaluations=5)
    sizes = [fitter.estimate_bytes(levels) for levels in fitter.find_extremes()]
    fitted = fitter.fit(Budget(file_bytes=sum(sizes) // 2))
    assert 4 in fitted.assignment.values() and set(fitted.assignment.values()) <= {4, 8}
    assert len(fitted.built.files["_int4.tflite"]) == fitted.assignment.measured["file_bytes"] <= sum(sizes) // 2
    assert re.fullmatch(r"--weight_bits=\S+\n--granularity=\S+\n", fitted.assignment.as_flags())
    assert tflite.predict(fitted.file, images).shape == (24, 5)


@pytest.mark.parametrize("field", ["file_bytes", "time_ms"])
def test_ethos_u(images, field):
    pytest.importorskip("ethosu.vela")
    fitter = Fitter(small_repvgg(), "ethos_u55_128", images, "mse", ["per_tensor"], evaluations=3)
    uniform = fitter.build(dict.fromkeys(fitter.costs, Level(4, False))).assignment.measured
    fitted = fitter.fit(Budget(**{field: uniform[field]}))
    assert fitted.assignment.measured[field] <= uniform[field]


def test_settings_that_do_not_go_together(images):
    model = small_repvgg()
    for target, method, granularities, message in [
        ("edge_tpu", "codebook", GRANULARITIES, f"'edge_tpu'; known: {', '.join(FIT_TARGETS)}"),
        ("tflm_lut", "min_max", GRANULARITIES, "by the method 'min_max'"),
        ("litert_int4", "codebook", GRANULARITIES, "stores no codebooks"),
        ("tflm_lut", "codebook", ["per_layer"], "granularities are 'per_layer'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Fitter(model, target, images, method, granularities)


def test_granularities_by_layer(images):
    model = small_repvgg()
    quantized = ptq.quantize(model, "mse", 4, "first=per_channel,.*=per_tensor", calibration=images)
    assert [quantized.get_layer(name).per_channel for name in ("first", "second", "logits")] == [True, False, False]
    trainable = quantization.learned_step_quantize(model, 4, {"first": False, ".*": True})
    stripped = quantization.strip_learned_step(trainable)
    assert [stripped.get_layer(name).per_channel for name in ("first", "second", "logits")] == [False, True, True]
    with pytest.raises(ValueError, match="a granularity is 'per_row'; known: per_tensor, per_channel"):
        ptq.quantize(model, "mse", 4, "per_row", calibration=images)
