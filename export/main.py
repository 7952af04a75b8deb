"""Fuses a trained network, writes integer TFLite files and runs them: python export/main.py --workdir=runs/x

A network from elsewhere is given as --init_from=FILE --dataset=folder:PATH --normalization=NAME --output=FOLDER.
Writes one file for each weight width and granularity to the output folder, export.json with everything measured, and
predictions.npz: for each image its label and the class that every model and file predicts.
"""

import collections
import dataclasses
import functools
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Before Keras, so that TensorFlow starts without messages.
from tf_repvgg import cli, fusion, outliers, provenance, report, runs, storage, tflite

# isort: split
import fitted_files
import integer_files
import numpy as np
import sources
import tf_keras as keras
from absl import flags
from evaluation import Evaluation, classify, measure_latency, measure_target
from tabulate import tabulate

from tf_repvgg.data import ClassificationData
from tf_repvgg.quantization import ptq, quantizers
from tf_repvgg.tflite import targets

FLAGS = flags.FLAGS

flags.DEFINE_list("targets", ["litert_int8"], f"Runtimes that each file is prepared for: {', '.join(targets.TARGETS)}.")
flags.DEFINE_bool("report", False, "Write report.html too: one page that needs no network.")
flags.DEFINE_enum("calibration_split", "train", ["train", "validation"], "Split of the calibration images.")
flags.DEFINE_integer(
    "calibration_images", 512, "Number of calibration images, from the start of the split.", lower_bound=1
)
flags.DEFINE_integer("latency_runs", 100, "Number of timed inferences, 50 or more; 0 times none.", lower_bound=0)
flags.register_validator("latency_runs", lambda count: count == 0 or count >= 50, "must be 0, or 50 or more")
flags.DEFINE_integer("threads", 1, "Interpreter threads of the timed inferences.", lower_bound=1, upper_bound=1024)
flags.DEFINE_bool("outliers_only", False, "Print the outliers of the network's weights; export nothing.")
for module in (sources, integer_files, fitted_files):
    flags.adopt_module_key_flags(module)  # so that export.json holds them

DOCUMENTS = ("export.json", "predictions.npz", "report.html")
# Keras models that are evaluated beside the files: {key in export.json: label}.
FORMS = {
    "float_training_form": "float, training form",
    "float_fused": "float, fused",
    "trained_model": "quantized, as trained",
}
# {form that files are made from: key in export.json of their agreement with it}
AGREEMENT = {
    "float_fused": "agreement_with_float_percent",
    "trained_model": "agreement_with_trained_model_percent",
}
# Reasons why a fully integer RepVGG may hold more than convolutions, a mean and a dense layer.
EXTRA_OPERATORS = {
    "PAD": "symmetric padding of a strided block",
    "LOGISTIC": "sigmoid, as in a squeeze-and-excite or swish",
    "MUL": "product of two activations or with a constant, as in a squeeze-and-excite, swish or scaling",
    "QUANTIZE": "input or output is not of the activations' type",
    "DEQUANTIZE": "output is float",
}


@dataclasses.dataclass(frozen=True)
class Forms:
    """The Keras models that are evaluated beside the files.

    Attributes:
      models: {key in `FORMS`: model}.
      reference: Key of the model that files are made from and compared with.
    """

    models: dict[str, keras.Model]
    reference: str

    @property
    def reference_model(self) -> keras.Model:
        return self.models[self.reference]


@dataclasses.dataclass(frozen=True)
class Export:
    """An integer file with its targets.

    Attributes:
      file: The file.
      targets: {target: result of building the file for it}.
    """

    file: integer_files.IntegerFile
    targets: dict[str, targets.Built]


def main(_):
    with cli.bad_input_exits():
        if FLAGS.outliers_only:
            outliers.report(sources.load_network(), print_fn=print)
            return
        settings = read_settings()
        source = sources.load_source()
        if FLAGS.report and source.is_run:
            report.check_history(source.path)
        forms = make_forms(source.model)
        request = make_request(settings, source, forms)
        output = storage.claim_folder(sources.find_output())
        storage.check_no_folders([*(output / name for name in DOCUMENTS), *output.glob("*.tflite")])
        finished_work = storage.FinishedWork(output / ".unfinished", is_sealed=True)
    for note in source.notes:
        print(note)
    workdir = source.write_run(output)
    exports = [Export(file, build_targets(file.name, file.content)) for file in make_files(request, finished_work)]
    write_files(output, exports)  # now that no target refuses one
    evaluation = evaluate(source.data, forms, exports)
    write_predictions(output / "predictions.npz", evaluation)
    record = make_record(source, forms, request, evaluation)
    if FLAGS.report and not request.is_quantized:
        record |= describe_activations(request.model, source.data)
    record["files"] = [describe_export(export, forms.reference, evaluation) for export in exports]
    if FLAGS.fit_curve:
        record["fit_curve"] = fitted_files.measure_curve(request, finished_work, source.data, FLAGS.evaluation_split)
    record["machine"] = provenance.machine()
    storage.write_json(output / "export.json", record)
    if request.is_resumable:
        finished_work.remove()
    print_table(record)
    if FLAGS.report:
        report.write(output / "report.html", [report.gather("", workdir, [output], source.data, FLAGS.trust_model)])
    print(f"written to {output}")


def read_settings() -> integer_files.Settings:
    """Checks all flags whose check needs no model, and returns those that describe the files."""
    fitted_files.settle_flags()
    settings = integer_files.read_settings()
    targets.check_installed(targets.parse(FLAGS.targets))
    if FLAGS.report:
        report.check_installed()
        if not FLAGS.latency_runs:
            raise ValueError("--report shows latencies; leave --latency_runs=0 out")
    return settings


def make_forms(model: keras.Model) -> Forms:
    """Fuses a float model; a model that was trained with quantization stays as it is."""
    if quantizers(model):
        return Forms({"trained_model": model}, "trained_model")
    for weight in model.weights:
        if not np.all(np.isfinite(weight)):
            raise ValueError(f"weight {weight.name!r} of the model holds infinities or NaN; was training stable?")
    if not fusion.needs_fusing(model):
        return Forms({"float_fused": model}, "float_fused")
    try:
        fused = fusion.fuse(model)
    except ArithmeticError as error:  # for example because of weights that are not finite
        raise ValueError(error) from None
    return Forms({"float_training_form": model, "float_fused": fused}, "float_fused")


def make_request(settings: integer_files.Settings, source: sources.Source, forms: Forms) -> integer_files.Request:
    """Describes the files to make, and checks that flags and model fit."""
    reference = forms.reference_model
    request = integer_files.Request(
        settings=settings,
        model=reference,
        model_sha256=runs.model_sha256(source.path),
        calibration=source.data.calibration(FLAGS.calibration_images, FLAGS.calibration_split),
        input_range=source.data.preprocessing.range(),
        metadata=source.metadata,
    )
    integer_files.check_request(request)
    return request


def make_files(
    request: integer_files.Request, finished_work: storage.FinishedWork
) -> Iterator[integer_files.IntegerFile]:
    """Makes the files of the flags one after the other, or with --fit the one that fits."""
    return (fitted_files if FLAGS.fit else integer_files).make_files(request, finished_work)


def build_targets(name: str, content: bytes) -> dict[str, targets.Built]:
    """Builds one file for every target; exits if a target refuses it."""
    results = {}
    with cli.bad_input_exits():
        for target in targets.parse(FLAGS.targets):
            try:
                results[target] = targets.TARGETS[target](content)
            except ValueError as error:
                raise ValueError(f"{name}, target {target}: {error}") from None
    return results


def write_files(output: Path, exports: Iterable[Export]) -> None:
    """Writes the integer files, and the files of the targets beside them."""
    for export in exports:
        storage.write_bytes(output / export.file.name, export.file.content)
        if FLAGS.fit:
            storage.write_bytes(output / fitted_files.FLAGFILE, fitted_files.format_flagfile(export.file.record))
        target_files = itertools.chain.from_iterable(result.files.items() for result in export.targets.values())
        for suffix, content in target_files:
            storage.write_bytes(output / f"{export.file.name.removesuffix('.tflite')}{suffix}", content)


def evaluate(data: ClassificationData, forms: Forms, exports: Iterable[Export]) -> Evaluation:
    """Runs every form and every file on the evaluation split."""
    predictors: dict[str, Callable[[np.ndarray], Any]] = {
        form: model.predict_on_batch for form, model in forms.models.items()
    }
    for export in exports:
        predictors[export.file.name] = functools.partial(tflite.predict, export.file.content)
    return classify(data, FLAGS.evaluation_split, predictors)


def write_predictions(path: Path, evaluation: Evaluation) -> None:
    """Writes {"labels": [images], form or file name: [images]}, as small integers."""
    arrays: dict[str, Any] = {"labels": evaluation.labels, **evaluation.classes}
    content = io.BytesIO()
    np.savez_compressed(content, **{name: classes.astype(np.int32) for name, classes in arrays.items()})
    storage.write_bytes(path, content.getvalue())


def make_record(
    source: sources.Source, forms: Forms, request: integer_files.Request, evaluation: Evaluation
) -> dict[str, Any]:
    """Content of export.json that does not belong to a single file."""
    return {
        "input": source.metadata,
        "evaluation_dataset": source.data.name,
        "flags": cli.key_flags(__name__),
        "model_sha256": request.model_sha256,
        "evaluation_split": FLAGS.evaluation_split,
        "images": len(evaluation.labels),
        "calibration": describe_calibration(request),
        "inference_type": request.inference_type,
        **{f"{form}_top1_percent": evaluation.top1_percent(form) for form in forms.models},
        "outliers": outliers.as_records(outliers.report(source.model)),
    }


def describe_activations(model: keras.Model, data: ClassificationData) -> dict[str, Any]:
    """Content of export.json on how far the activations of a float model reach on the calibration images."""
    batches = data.first_batches(FLAGS.calibration_images, FLAGS.calibration_split)
    magnitudes = outliers.measure_activations(model, batches)
    return {
        "activations": outliers.as_records(outliers.describe_activations(magnitudes)),
        "extreme_images": outliers.find_extreme_images(magnitudes),
    }


def describe_calibration(request: integer_files.Request) -> str:
    """The origin of the calibration ranges, in prose."""
    if request.is_quantized:
        return "as trained"
    if not ptq.needs_calibration(request.settings.ptq):
        return "statistics of the normalizations, no images"
    return f"first {FLAGS.calibration_images} images of {FLAGS.calibration_split}"


def describe_export(export: Export, reference: str, evaluation: Evaluation) -> dict[str, Any]:
    """Content of export.json for one file; measures its latency, and accuracy in the interpreters of targets."""
    file = export.file
    latency = measure_latency(file.content, FLAGS.threads, FLAGS.latency_runs) if FLAGS.latency_runs else {}
    return {
        "file": file.name,
        **file.record,
        "top1_percent": evaluation.top1_percent(file.name),
        "file_bytes": len(file.content),
        **latency,
        "operators": dict(collections.Counter(operator.name for operator in tflite.operators(file.content))),
        AGREEMENT[reference]: evaluation.agreement_percent(file.name, reference),
        "targets": {
            target: result.record | measure_target(file.name, target, result, evaluation, FLAGS.threads)
            for target, result in export.targets.items()
        },
    }


def print_table(record: Mapping[str, Any]) -> None:
    """Prints the content of export.json that a user looks for first."""
    files = record["files"]
    print(f"\n{record['evaluation_split']} split, {record['images']} images")
    for form, label in FORMS.items():
        if (top1 := record.get(f"{form}_top1_percent")) is not None:
            print(f"{label:21}  {top1:6.2f} %")
    print()
    columns = {
        "file": "file",
        "top1_percent": "top-1 %",
        **{key: "agrees %" for key in AGREEMENT.values() if key in files[0]},
        "file_bytes": "bytes",
        **({"latency_ms_p50": "p50 ms", "latency_ms_p90": "p90 ms"} if FLAGS.latency_runs else {}),
    }
    rows = [[entry[key] for key in columns] for entry in files]
    print(tabulate(rows, list(columns.values()), intfmt=",", floatfmt=("", ".2f", ".2f", "", ".3f", ".3f")))
    for note in dict.fromkeys(note for entry in files for note in entry.get("notes", ())):
        print(f"{files[0]['ptq']}: {note}")
    if FLAGS.latency_runs:
        print(f"latency: {FLAGS.latency_runs} runs, {FLAGS.threads} thread(s), LiteRT with XNNPACK")
    print()
    for entry in files:
        for line in fitted_files.describe_margins(entry) if FLAGS.fit else ():
            print(f"{entry['file']}, {line}")
        for target, measurements in entry["targets"].items():
            numbers = {key: value for key, value in measurements.items() if _is_number(value)}
            print(
                f"{entry['file']}, {target}: "
                + ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in numbers.items())
            )
    operators = files[0]["operators"]
    print("\noperators: " + ", ".join(f"{count} {name}" for name, count in operators.items()))
    for name in sorted(EXTRA_OPERATORS.keys() & operators.keys()):
        print(f"  {name}: {EXTRA_OPERATORS[name]}")


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


if __name__ == "__main__":
    cli.run(main)
