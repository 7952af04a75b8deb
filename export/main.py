"""Fuses a trained RepVGG, writes integer TFLite files and runs them: python export/main.py --workdir=runs/x

Writes one file per weight width and granularity to the output folder, export.json with everything measured, and
predictions.npz: for each image the label and the class that every form and file finds.
"""

import collections
import dataclasses
import functools
import io
import itertools
import time

import numpy as np
from absl import flags
from tabulate import tabulate
from tqdm import tqdm

from tf_repvgg import cli, fusion, outliers, report, runs, tflite
from tf_repvgg.data import ClassificationData, Preprocessing
from tf_repvgg.data.image_folder import BAD_IMAGES, MAX_MEGAPIXELS
from tf_repvgg.quantization import ptq, quantizers
from tf_repvgg.tflite import targets

FLAGS = flags.FLAGS

flags.DEFINE_string("workdir", None, "Run folder of train/main.py, or a .keras file.", required=True)
flags.DEFINE_string("output", None, "Folder to write to; by default 'export' in the workdir.")
flags.DEFINE_string("dataset", None, "TFDS name, or folder:PATH; by default the one the run was trained on.")
flags.DEFINE_string(
    "data_dir", None, "TFDS data directory that holds the set, by default TFDS's own; for a folder, where PATH starts."
)
flags.DEFINE_enum("bad_images", "refuse", BAD_IMAGES, "What to do with images of a folder that cannot be used.")
flags.DEFINE_float("max_megapixels", MAX_MEGAPIXELS, "Images of a folder that are larger are bad.", lower_bound=0)
flags.DEFINE_list("weight_bits", ["8"], "Widths of the uniform weight grid, 2 to 8; one file each.")
flags.DEFINE_list("granularity", ["per_channel"], "Weight scales: per_tensor, per_channel, or both; one file each.")
flags.DEFINE_string(
    "ptq",
    "min_max",
    f"How weights and ranges are found: {', '.join(ptq.METHODS)}, or several in a row as in equalize+adaquant.",
)
flags.DEFINE_string("layer_bits", None, "Layers of other widths, by patterns of names: stem=8,logits=8.")
flags.DEFINE_integer("ptq_iterations", ptq.Options.iterations, "Steps per layer of AdaRound, AdaQuant.", lower_bound=1)
flags.DEFINE_integer(
    "number_of_clusters", None, "States of codebooks, by default 2^bits.", lower_bound=2, upper_bound=256
)
flags.DEFINE_integer("ptq_seed", 0, "Seed of AdaRound and AdaQuant.")
flags.DEFINE_enum("activation_bits", "8", ["8", "16"], "Of activations, input included.")
flags.DEFINE_enum(
    "inference_type",
    None,
    list(tflite.INFERENCE_TYPES),
    "Type of the file's input and output; by default that of its activations, int8 or int16.",
)
flags.DEFINE_list(
    "targets", ["litert_int8"], f"Runtimes that each file is also made ready for: {', '.join(targets.TARGETS)}."
)
flags.DEFINE_bool("report", False, "Leave report.html too: one page to look at, which needs no network.")
flags.DEFINE_enum("calibration_split", "train", ["train", "validation"], "Split whose images set activation ranges.")
flags.DEFINE_integer("calibration_images", 512, "How many of them, from the start of the split.", lower_bound=1)
flags.DEFINE_enum("evaluation_split", "test", ["validation", "test"], "Split that is evaluated, whole.")
flags.DEFINE_integer("latency_runs", 100, "Timed inferences.", lower_bound=50)
flags.DEFINE_integer("threads", 1, "Interpreter threads of the timed inferences.", lower_bound=1)

# Images on which the activations of each layer are compared with the float model's.
FIDELITY_IMAGES = 32
# Interpreters of targets are slow: batches small enough that progress is seen, and few timed inferences.
TARGET_BATCH = 100
SLOW_RUNS = 10
GRANULARITIES = ("per_tensor", "per_channel")
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
    """(bits, granularities) as asked for; the flags are lists of words."""
    unknown = [word for word in FLAGS.granularity if word not in GRANULARITIES]
    if unknown:
        raise ValueError(f"--granularity is {unknown[0]!r}; known: {', '.join(GRANULARITIES)}")
    bits = [int(word) if word.isdigit() else 0 for word in FLAGS.weight_bits]
    if not bits or not all(2 <= width <= 8 for width in bits):
        raise ValueError(f"--weight_bits is {','.join(FLAGS.weight_bits)!r}; use whole numbers from 2 to 8")
    ptq.parse_method(FLAGS.ptq)
    targets.check_installed(targets.parse(FLAGS.targets))
    if FLAGS.report:
        report.check_installed()
    return bits, FLAGS.granularity


def check_trained_codes():
    """Refuses flags that would quantize what training has quantized."""
    for name in ("weight_bits", "granularity", "ptq", "layer_bits", "number_of_clusters", "activation_bits"):
        if FLAGS[name].value != FLAGS[name].default:
            raise ValueError(
                f"--{name}={FLAGS[name].value} does not go with a model that was trained quantized; leave it"
            )


def trained_file(model, inference_type, metadata):
    """As `make_files`, the one file of a quantized model: its codes and ranges."""
    file = tflite.convert(model, inference_type=inference_type, metadata=metadata)
    return f"{inference_type}_trained.tflite", {"weights": "as trained"}, file, model


def widths(bits):
    """Bits by pattern of layer names, as one file has them."""
    return ",".join(filter(None, [FLAGS.layer_bits, f".*={bits}"]))


def make_files(fused, calibration, bits, granularities, inference_type, metadata):
    """Yields (file name, what it is, bytes, the model whose weights it rounds) for every width and granularity."""
    # Without further wishes, TensorFlow's own calibration serves all files.
    is_plain = FLAGS.ptq == "min_max" and FLAGS.layer_bits is None and FLAGS.activation_bits == "8"
    calibrated = tflite.convert(fused, calibration, inference_type=inference_type) if is_plain else None
    for width, granularity in itertools.product(bits, granularities):
        facts = {"weight_bits": width, "granularity": granularity, "ptq": FLAGS.ptq}
        per_channel = granularity == "per_channel"
        started = time.monotonic()
        if is_plain:
            suffix, reference = "", fused
            file = tflite.with_weights(calibrated, fused, width, per_channel, metadata=metadata)
        else:
            suffix = "_" + FLAGS.ptq.replace("+", "_")
            network = ptq.quantized_network(
                fused,
                FLAGS.ptq,
                widths(width),
                per_channel,
                calibration.as_numpy_iterator(),
                iterations=FLAGS.ptq_iterations,
                number_of_clusters=FLAGS.number_of_clusters,
                activation_bits=int(FLAGS.activation_bits),
                seed=FLAGS.ptq_seed,
                progress=True,
            )
            facts |= {"layer_bits": FLAGS.layer_bits, "notes": network.notes}
            reference = network.float
            file = tflite.convert(network.quantized, inference_type=inference_type, metadata=metadata)
        facts["quantization_seconds"] = round(time.monotonic() - started, 1)
        yield f"{inference_type}_w{width}_{granularity}{suffix}.tflite", facts, file, reference


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
    expected, found = ((model.input_shape[1:], model.output_shape[-1]), (data.image_shape, data.num_classes))
    if expected != found:
        raise ValueError(
            "the model takes images {} into {} classes, but ".format(*expected)
            + "{name} has images {} of {} classes".format(*found, name=repr(data.name))
        )
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
    runs.write_bytes(path, content.getvalue())


def percent(matches):
    return round(100 * float(np.mean(matches)), 3)


def forms_of(model):
    """{key of FORMS: the model in that form}."""
    if quantizers(model):
        return {"trained_model": model}
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
        **latency_facts(file, FLAGS.latency_runs),
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
        "latency_ms_p50": "p50 ms",
        "latency_ms_p90": "p90 ms",
    }
    rows = [[entry[key] for key in columns] for entry in record["files"]]
    print(tabulate(rows, list(columns.values()), intfmt=",", floatfmt=("", ".2f", ".2f", "", ".3f", ".3f")))
    for note in dict.fromkeys(note for entry in record["files"] for note in entry.get("notes", ())):
        print(f"{record['files'][0]['ptq']}: {note}")
    print(f"latency: {FLAGS.latency_runs} runs, {FLAGS.threads} thread(s), LiteRT with XNNPACK\n")
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
            check_trained_codes()
            inference_type = tflite.checked_inference_type(FLAGS.inference_type, tflite.activation_bits(model))
        else:
            inference_type = tflite.checked_inference_type(FLAGS.inference_type, int(FLAGS.activation_bits))
            ptq.bits_by_layer(forms[reference], widths(bits[0]))
        output = runs.claimed_folder(FLAGS.output or runs.folder_of(FLAGS.workdir) / "export")
    if reference == "trained_model":
        made = [trained_file(model, inference_type, trained_on)]
    else:
        made = make_files(forms[reference], calibration, bits, granularities, inference_type, trained_on)
    files, grids, built = {}, {}, {}
    seen = np.stack(list(calibration.take(FIDELITY_IMAGES).as_numpy_iterator()))
    for name, facts, file, rounded in made:
        fidelity = [dataclasses.asdict(layer) for layer in tflite.layers(file, rounded, seen)]
        files[name], grids[name] = file, facts | {"layers": fidelity}
        with cli.bad_input_exits():
            built[name] = build_targets(name, file)
    for name, file in files.items():  # now that no target refuses one
        runs.write_bytes(output / name, file)
        for suffix, content in itertools.chain.from_iterable(each.files.items() for each in built[name].values()):
            runs.write_bytes(output / f"{name.removesuffix('.tflite')}{suffix}", content)
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
        "calibration": f"first {FLAGS.calibration_images} images of {FLAGS.calibration_split}",
        "inference_type": inference_type,
        **{f"{form}_top1_percent": percent(classes[form] == labels) for form in forms},
        "outliers": outliers.as_records(outliers.report(model)),
        "files": [],
        "machine": runs.machine(),
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
    runs.write_json(output / "export.json", record)
    print_table(record)
    if FLAGS.report:
        report.write(output / "report.html", [report.gather("", FLAGS.workdir, [output], data)])
    print(f"written to {output}")


if __name__ == "__main__":
    cli.run(main)
