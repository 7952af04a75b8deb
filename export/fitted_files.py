"""Files whose layers get as many clusters or bits as a budget allows: the flags --fit and --fit_curve."""

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tf_repvgg import cli, storage, tflite

# isort: split
import integer_files
import numpy as np
from absl import flags
from evaluation import classify
from integer_files import IntegerFile, Request

from tf_repvgg.data import ClassificationData
from tf_repvgg.quantization import GRANULARITIES, fitting
from tf_repvgg.quantization.fitting.costs import list_levels
from tf_repvgg.quantization.fitting.settings import check_budget, check_settings
from tf_repvgg.tflite import targets

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "fit",
    None,
    "Budget of the one target in --targets, as in weights:256kB,arena:64kB,time:5ms: largest size of its file, of its "
    "working memory, and time of an inference. Chooses for each layer its number of clusters or bits, and its "
    "granularity from those in --granularity, by default from all. Goes with --ptq="
    f"{', '.join(fitting.FIT_METHODS)}, and with --targets={', '.join(fitting.FIT_TARGETS)}.",
)
flags.DEFINE_bool(
    "fit_curve", False, "With --fit: measure the accuracy at ten budgets too, beside that of uniform numbers."
)
flags.DEFINE_integer(
    "fit_evaluations", 40, "Networks that the local search of --fit measures at most.", lower_bound=0, upper_bound=10000
)

FLAGFILE = "fit.flags"
_CURVE_BUDGETS = 10
# Flags whose work --fit does.
_REPLACED_FLAGS = ("weight_bits", "layer_bits", "number_of_clusters")


def settle_flags() -> None:
    """Sets the defaults that flags have with --fit.

    Raises:
      ValueError: If flags do not go with --fit, or the budget is none.
    """
    if not FLAGS.fit:
        for name in ("fit_curve", "fit_evaluations"):
            if FLAGS[name].value != FLAGS[name].default:
                raise ValueError(f"--{name}={FLAGS[name].value} has no effect without --fit=weights:SIZE")
        return
    for name in _REPLACED_FLAGS:
        if FLAGS[name].value != FLAGS[name].default:
            raise ValueError(f"--{name}={FLAGS[name].value} does not go with --fit, which chooses it; leave it out")
    if len(FLAGS.targets) != 1:
        raise ValueError(f"--targets is {','.join(FLAGS.targets)!r}; --fit is for one target, so name one")
    (target,) = targets.parse(FLAGS.targets)
    if not FLAGS["ptq"].present:
        stores_codebooks = "codebook" in getattr(fitting.FIT_TARGETS.get(target), "numbers", ())
        FLAGS.ptq = "codebook_adaquant" if stores_codebooks else "adaquant"
    if not FLAGS["granularity"].present:
        FLAGS.granularity = list(GRANULARITIES)
    levels = check_settings(target, FLAGS.ptq, FLAGS.granularity)
    if FLAGS.fit_curve and len({level.number for level in levels}) < 2:
        raise ValueError(f"--fit_curve has no effect with --targets={target}, where all layers have 8 bits")
    check_budget(FLAGS.fit, target)


def make_files(request: Request, finished_work: storage.FinishedWork) -> Iterator[IntegerFile]:
    """Makes the one file that fits.

    Args:
      request: Float model, and the settings that all levels share.
      finished_work: Work that an interrupted run of the same command has done.

    Yields:
      The file.
    """
    name = f"{request.inference_type}_fit_{request.settings.ptq}.tflite"
    with cli.bad_input_exits():
        file = _fit(request, finished_work, name)
    yield file


def _fit(request, finished_work, name):
    inputs = _describe_inputs(request) | {"budget": FLAGS.fit}
    if (finished := finished_work.find(name, inputs)) is not None:
        print(f"{name}: taken from the run that was interrupted", file=sys.stderr)
        return IntegerFile(name, finished["record"], finished_work.read_content(name))
    started = time.monotonic()
    fitted = _make_fitter(request, finished_work).fit(FLAGS.fit)
    record = {
        "ptq": request.settings.ptq,
        "quantization_seconds": round(time.monotonic() - started, 1),
        "notes": fitted.network.notes,
        "fit": fitted.record | fitted.assignment.as_record() | {"flags": fitted.assignment.as_flags()},
        "layers": integer_files.compare_layers(fitted.file, fitted.network.float, request),
    }
    finished_work.keep(name, inputs, {"record": record}, fitted.file)
    print(fitted.assignment)
    return IntegerFile(name, record, fitted.file)


def _describe_inputs(request):
    fit = {"target": FLAGS.targets, "granularities": FLAGS.granularity, "evaluations": FLAGS.fit_evaluations}
    return integer_files.describe_inputs(request, request.calibration_images) | {"fit": fit}


def _make_fitter(request, finished_work):
    settings = request.settings
    return fitting.Fitter(
        request.model,
        FLAGS.targets[0],
        request.calibration_images,
        settings.ptq,
        settings.granularities,
        evaluations=FLAGS.fit_evaluations,
        finished_work=finished_work,
        file_options={"inference_type": request.inference_type, "metadata": request.metadata},
        iterations=settings.ptq_iterations,
        activation_bits=settings.activation_bits,
        input_range=request.input_range,
        seed=settings.ptq_seed,
        progress=True,
    )


def format_flagfile(record: Mapping[str, Any]) -> bytes:
    """The content of fit.flags, for train/main.py.

    Args:
      record: Record of the file that fits.
    """
    fit = record["fit"]
    method = "clusterqat" if "number_of_clusters" in fit["flags"] else "lsq"
    command = f"python train/main.py --quantize={method} --flagfile={FLAGFILE} --init_from=... --workdir=..."
    return (
        f"# Levels of export/main.py --fit={FLAGS.fit} --targets={fit['target']}, for fine-tuning:\n"
        f"#   {command}\n{fit['flags']}"
    ).encode()


def describe_margins(record: Mapping[str, Any]) -> list[str]:
    """One line for each limit of the budget: the measured cost, and how far below the limit it is.

    Args:
      record: Record of the file that fits.
    """
    lines = []
    for field, limit in record["fit"]["budget"].items():
        cost = record["fit"][field]
        margin = 100 * (1 - cost / limit)
        lines.append(f"{field.replace('_', ' ')}: {cost:,} of {limit:,}, {margin:.1f} % below the budget")
    return lines


def measure_curve(
    request: Request, finished_work: storage.FinishedWork, data: ClassificationData, split: str
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy in LiteRT at ten budgets from the smallest file to one of 8 bits, and at uniform levels.

    Args:
      request: Float model, and the settings that all levels share.
      finished_work: Work that an interrupted run of the same command has done.
      data: Dataset.
      split: Name of the split to evaluate.

    Returns:
      {"fitted": points, "uniform": points}, each with its size and accuracy; JSON-serializable.
    """
    points: dict[str, list[dict[str, Any]]] = {"fitted": [], "uniform": []}
    files: dict[str, bytes] = {}
    inputs = _describe_inputs(request) | {"curve": _CURVE_BUDGETS}
    fitter = _make_fitter(request, finished_work)

    def measure(kind, name, build):
        """Builds a point of the curve unless an interrupted run has."""
        key = f"curve/{kind}_{len(points[kind])}"
        if (finished := finished_work.find(key, inputs)) is None:
            fitted, description = build()
            point = {**description, "file_bytes": fitted.assignment.measured["file_bytes"]}
            finished = finished_work.keep(key, inputs, {"point": point}, fitted.file)
        files[name] = finished_work.read_content(key)
        points[kind].append({"name": name, **finished["point"]})

    def build_uniform(level):
        return fitter.build(dict.fromkeys(fitter.costs, level)), dataclasses.asdict(level)

    def build_fitted(limit):
        fitted = fitter.fit(fitting.Budget(file_bytes=limit))
        return fitted, {"budget_bytes": limit, "error": fitted.assignment.error}

    smallest, largest = fitter.find_extremes()
    for level in list_levels(fitter.target, fitter.grid, request.settings.granularities):
        is_whole = level.number == max(choice.number for choice in largest.values())
        # Powers of two alone, of clusters.
        if not is_whole and (fitter.grid == "uniform" or level.number & (level.number - 1) == 0):
            measure("uniform", str(level), functools.partial(build_uniform, level))
    low, high = 1.02 * fitter.estimate_bytes(smallest), 0.97 * fitter.estimate_bytes(largest)
    for limit in np.geomspace(low, high, _CURVE_BUDGETS):
        measure("fitted", f"fitted to {int(limit):,} bytes", functools.partial(build_fitted, int(limit)))
    evaluation = classify(data, split, {name: functools.partial(tflite.predict, file) for name, file in files.items()})
    for point in (*points["uniform"], *points["fitted"]):
        point["top1_percent"] = evaluation.top1_percent(point["name"])
    return points
