"""Fuses a trained RepVGG, writes integer TFLite files and runs them: python export/main.py --workdir=runs/x

Writes one file per weight width and granularity to the output folder, export.json with everything measured, and
predictions.npz: for each image the label and the class that every form and file finds.
"""

import collections
import functools
import io
import itertools

import integer_files
import numpy as np
from absl import flags
from tabulate import tabulate
from tqdm import tqdm

from tf_repvgg import cli, fusion, outliers, provenance, report, runs, storage, tflite
from tf_repvgg.data import ClassificationData, Preprocessing
from tf_repvgg.data.image_folder import BAD_IMAGES, MAX_MEGAPIXELS
from tf_repvgg.quantization import ptq, quantizers
from tf_repvgg.tflite import targets
from tf_repvgg.training import finished_runs

FLAGS = flags.FLAGS

flags.DEFINE_string("workdir", None, "Run folder of train/main.py, or a .keras file.", required=True)
flags.DEFINE_string("output", None, "Folder to write to; by default 'export' in the workdir.")
flags.DEFINE_string("dataset", None, "TFDS name, or folder:PATH; by default the one the run was trained on.")
flags.DEFINE_string(
    "data_dir", None, "TFDS data directory that holds the set, by default TFDS's own; for a folder, where PATH starts."
)
flags.DEFINE_enum("bad_images", "refuse", BAD_IMAGES, "What to do with images of a folder that cannot be used.")
flags.DEFINE_float("max_megapixels", MAX_MEGAPIXELS, "Images of a folder that are larger are bad.", lower_bound=0)
flags.DEFINE_list(
    "targets", ["litert_int8"], f"Runtimes that each file is also made ready for: {', '.join(targets.TARGETS)}."
)
flags.DEFINE_bool("report", False, "Leave report.html too: one page to look at, which needs no network.")
flags.DEFINE_enum("calibration_split", "train", ["train", "validation"], "Split whose images set activation ranges.")
flags.DEFINE_integer("calibration_images", 512, "How many of them, from the start of the split.", lower_bound=1)
flags.DEFINE_enum("evaluation_split", "test", ["validation", "test"], "Split that is evaluated, whole.")
flags.DEFINE_integer("latency_runs", 100, "Timed inferences, 50 or more; 0 leaves them out.", lower_bound=0)
flags.register_validator("latency_runs", lambda runs: runs == 0 or runs >= 50, "must be 0, or 50 or more")
flags.DEFINE_integer("threads", 1, "Interpreter threads of the timed inferences.", lower_bound=1)
flags.adopt_module_key_flags(integer_files)  # they are this program's own too: export.json holds them

# Images on which the activations of each layer are compared with the float model's.
FIDELITY_IMAGES = 32
# Interpreters of targets are slow: batches small enough that progress is seen, and few timed inferences.
TARGET_BATCH = 100
SLOW_RUNS = 10
# The Keras models that files are compared with, the last in order of those that there are: key in export.json, words.
FORMS = {
    "float_training_form": "float, training form",
    "float_fused": "float, fused",
    "trained_model": "quantized, as trained",
}
AGREEMENT = {
    "float_fused": "agreement_with_float_percent",
    "trained_model": "agreement_with_trained_model_percent",
}
# Why a fully integer RepVGG may hold more than convolutions, a mean and a dense layer.
EXTRA_OPERATORS = {
    "PAD": "symmetric padding of a strided block",
    "LOGISTIC": "sigmoid of a block's squeeze-and-excite",
    "MUL": "a block's channels scaled by its squeeze-and-excite",
    "QUANTIZE": "input or output is not of the activations' type",
    "DEQUANTIZE": "output is float",
}


def read_flags():
    """(bits, granularities) as asked for."""
    asked = integer_files.read_flags()
    targets.check_installed(targets.parse(FLAGS.targets))
    if FLAGS.report:
        report.check_installed()
        if not FLAGS.latency_runs:
            raise ValueError("--report shows latencies; leave --latency_runs=0 out")
    return asked


def make_data(trained_on):
    """The dataset of the flags, preprocessed as the model was trained."""
    data = ClassificationData(
        FLAGS.dataset or trained_on["dataset"],
        FLAGS.data_dir,
        Preprocessing.from_facts(trained_on),
        hold_out=trained_on["validation_held_out"],
        bad_images=FLAGS.bad_images,
        max_megapixels=FLAGS.max_megapixels,
    )
    if FLAGS.dataset:
        FLAGS.dataset = data.name  # export.json is for other machines too: without the path to a folder
    return data


def check_fits(model, trained_on, data):
    """Refuses a dataset that the model is not for."""
    finished_runs.check_fits(model, data)
    for number, (its, ours) in enumerate(zip(trained_on.get("labels", data.labels), data.labels, strict=True)):
        if its != ours:
            raise ValueError(f"class {number} of the model is {its!r}, but that of {data.name!r} is {ours!r}")


def classify(data, split, predictors):
    """Labels of a split, and the classes that each predictor {name: images -> logits} finds.

    Batch by batch: a split need not fit into memory.
    """
    labels, classes = [], {name: [] for name in predictors}
    with tqdm(total=data.num_examples(split), desc=f"{split} split", unit="image", leave=False) as bar:
        for images, its_labels in data.evaluation(split).as_numpy_iterator():
            labels.append(its_labels)
            for name, predict in predictors.items():
                classes[name].append(np.argmax(predict(images), axis=1))
            bar.update(len(images))
    return np.concatenate(labels), {name: np.concatenate(parts) for name, parts in classes.items()}


def build_targets(name, file):
    """{target: `targets.Built`} of one file.

    Raises:
      ValueError: if a target cannot take it; names both.
    """
    found = {}
    for target in targets.parse(FLAGS.targets):
        try:
            found[target] = targets.TARGETS[target](file)
        except ValueError as error:
            raise ValueError(f"{name}, target {target}: {error}") from None
    return found


def measure_target(data, split, name, built, classes, labels):
    """What a target's own interpreter finds on a split, if there is one: accuracy, and equality with the int8 file."""
    measured = {} if built.in_litert is None else latency_facts(built.in_litert, SLOW_RUNS)
    if built.predict is None:
        return measured
    found, equal = [], []
    with tqdm(total=len(labels), desc=name, unit="image", leave=False) as bar:
        for images, _ in data.evaluation(split, TARGET_BATCH).as_numpy_iterator():
            logits = built.predict(images)
            equal.append(np.all(logits == built.predict_int8(images), axis=1))
            found.append(np.argmax(logits, axis=1))
            bar.update(len(images))
    found = np.concatenate(found)
    return measured | {
        "top1_percent": percent(found == labels),
        "equal_to_int8_file_on_same_kernels_percent": percent(np.concatenate(equal)),
        "agreement_with_litert_percent": percent(found == classes),
    }


def latency_facts(file, runs):
    latency = tflite.latency(file, FLAGS.threads, runs)
    return {
        "latency_ms_p50": round(latency.p50_ms, 4),
        "latency_ms_p90": round(latency.p90_ms, 4),
        "latency_runs": latency.runs,
        "latency_threads": latency.threads,
    }


def write_predictions(path, labels, classes):
    """{"labels": [images], form or file name: [images]}, as small integers."""
    content = io.BytesIO()
    np.savez_compressed(content, labels=labels.astype(np.int32), **{k: v.astype(np.int32) for k, v in classes.items()})
    storage.write_bytes(path, content.getvalue())


def calibrated_on(reference):
    """In words, where activation ranges come from."""
    if reference == "trained_model":
        return "as trained"
    if not ptq.needs_calibration(FLAGS.ptq):
        return "statistics of the normalizations, no images"
    return f"first {FLAGS.calibration_images} images of {FLAGS.calibration_split}"


def percent(matches):
    return round(100 * float(np.mean(matches)), 3)


def forms_of(model):
    """{key of FORMS: the model in that form}."""
    if quantizers(model):
        return {"trained_model": model}
    for weight in model.weights:
        if not np.all(np.isfinite(weight)):
            raise ValueError(f"weight {weight.name!r} of the model holds infinities or NaN; was training stable?")
    if not fusion.needs_fusing(model):
        return {"float_fused": model}
    try:
        return {"float_training_form": model, "float_fused": fusion.fuse(model)}
    except ArithmeticError as error:  # weights that are not finite, say
        raise ValueError(error) from None


def measure(file, classes, labels):
    """What there is to say about one written file that found these classes."""
    return {
        "top1_percent": percent(classes == labels),
        "file_bytes": len(file),
        **(latency_facts(file, FLAGS.latency_runs) if FLAGS.latency_runs else {}),
        "operators": dict(collections.Counter(operator.name for operator in tflite.operators(file))),
    }


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def print_table(record):
    print(f"\n{record['evaluation_split']} split, {record['images']} images")
    for form, words in FORMS.items():
        if (top1 := record.get(f"{form}_top1_percent")) is not None:
            print(f"{words:21}  {top1:6.2f} %")
    print()
    columns = {
        "file": "file",
        "top1_percent": "top-1 %",
        **{key: "agrees %" for key in AGREEMENT.values() if key in record["files"][0]},
        "file_bytes": "bytes",
        **({"latency_ms_p50": "p50 ms", "latency_ms_p90": "p90 ms"} if FLAGS.latency_runs else {}),
    }
    rows = [[entry[key] for key in columns] for entry in record["files"]]
    print(tabulate(rows, list(columns.values()), intfmt=",", floatfmt=("", ".2f", ".2f", "", ".3f", ".3f")))
    for note in dict.fromkeys(note for entry in record["files"] for note in entry.get("notes", ())):
        print(f"{record['files'][0]['ptq']}: {note}")
    if FLAGS.latency_runs:
        print(f"latency: {FLAGS.latency_runs} runs, {FLAGS.threads} thread(s), LiteRT with XNNPACK")
    print()
    for entry in record["files"]:
        for target, facts in entry["targets"].items():
            words = (f"{key.replace('_', ' ')} {value:,}" for key, value in facts.items() if _is_number(value))
            print(f"{entry['file']}, {target}: {', '.join(words)}")
    found = record["files"][0]["operators"]
    print("\noperators: " + ", ".join(f"{count} {name}" for name, count in found.items()))
    for name in sorted(EXTRA_OPERATORS.keys() & found.keys()):
        print(f"  {name}: {EXTRA_OPERATORS[name]}")


def main(_):
    with cli.bad_input_exits():
        bits, granularities = read_flags()
        trained_on = runs.read_input(FLAGS.workdir)
        model = runs.load_model(FLAGS.workdir)
        data = make_data(trained_on)
        calibration = data.calibration(FLAGS.calibration_images, FLAGS.calibration_split)
        check_fits(model, trained_on, data)
        if FLAGS.evaluation_split == "validation" and not trained_on["validation_held_out"]:
            raise ValueError("the model was trained on the validation split too; use --evaluation_split=test")
        forms = forms_of(model)
        *_, reference = forms
        if reference == "trained_model":
            integer_files.check_trained_codes()
            inference_type = tflite.resolve_inference_type(FLAGS.inference_type, tflite.activation_bits(model))
        else:
            inference_type = tflite.resolve_inference_type(FLAGS.inference_type, int(FLAGS.activation_bits))
            ptq.bits_by_layer(forms[reference], integer_files.widths(bits[0]))
            ptq.check_data_free(forms[reference], FLAGS.ptq)
        output = storage.claim_folder(FLAGS.output or runs.folder_of(FLAGS.workdir) / "export")
    seen = np.stack(list(calibration.take(FIDELITY_IMAGES).as_numpy_iterator()))
    unfinished = None
    if reference == "trained_model":
        made = [integer_files.trained_file(model, seen, inference_type, trained_on)]
    else:
        made, unfinished = integer_files.quantized_files(
            forms[reference], calibration, seen, data, output, bits, granularities, inference_type, trained_on
        )
    files, grids, built = {}, {}, {}
    for name, facts, file in made:
        files[name], grids[name] = file, facts
        with cli.bad_input_exits():
            built[name] = build_targets(name, file)
    for name, file in files.items():  # now that no target refuses one
        storage.write_bytes(output / name, file)
        for suffix, content in itertools.chain.from_iterable(each.files.items() for each in built[name].values()):
            storage.write_bytes(output / f"{name.removesuffix('.tflite')}{suffix}", content)
    predictors = {form: its_model.predict_on_batch for form, its_model in forms.items()}
    predictors |= {name: functools.partial(tflite.predict, file) for name, file in files.items()}
    labels, classes = classify(data, FLAGS.evaluation_split, predictors)
    write_predictions(output / "predictions.npz", labels, classes)
    record = {
        "input": trained_on,
        "evaluation_dataset": data.name,
        "flags": cli.key_flags(),
        "model_sha256": runs.model_sha256(FLAGS.workdir),
        "evaluation_split": FLAGS.evaluation_split,
        "images": len(labels),
        "calibration": calibrated_on(reference),
        "inference_type": inference_type,
        **{f"{form}_top1_percent": percent(classes[form] == labels) for form in forms},
        "outliers": outliers.as_records(outliers.report(model)),
        "files": [],
        "machine": provenance.machine(),
    }
    for name, file in files.items():
        agreement = {AGREEMENT[reference]: percent(classes[name] == classes[reference])}
        its_targets = {
            target: each.facts
            | measure_target(data, FLAGS.evaluation_split, f"{name}: {target}", each, classes[name], labels)
            for target, each in built[name].items()
        }
        measured = measure(file, classes[name], labels)
        record["files"].append({"file": name} | grids[name] | measured | agreement | {"targets": its_targets})
    storage.write_json(output / "export.json", record)
    if unfinished:
        unfinished.remove()
    print_table(record)
    if FLAGS.report:
        report.write(output / "report.html", [report.gather("", FLAGS.workdir, [output], data)])
    print(f"written to {output}")


if __name__ == "__main__":
    cli.run(main)
