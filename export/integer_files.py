"""The integer files that export/main.py writes of one model: flags of it, and what quantizes and converts."""

import dataclasses
import hashlib
import itertools
import sys
import time

from absl import flags

from tf_repvgg import cli, provenance, runs, storage, tflite
from tf_repvgg.quantization import ptq
from tf_repvgg.quantization.uniform import GRANULARITIES

FLAGS = flags.FLAGS

flags.DEFINE_list("weight_bits", ["8"], "Widths of the uniform weight grid, 2 to 8; one file each.")
flags.DEFINE_list("granularity", ["per_channel"], "Weight scales: per_tensor, per_channel, or both; one file each.")
flags.DEFINE_string(
    "ptq",
    "min_max",
    f"How weights and ranges are found: {', '.join(ptq.METHODS)}, or several in a row as in equalize+adaquant.",
)
flags.DEFINE_string("layer_bits", None, "Layers of other widths, by patterns of names: stem=8,logits=8.")
flags.DEFINE_integer("ptq_iterations", ptq.Options.iterations, "Steps per layer of methods that learn.", lower_bound=1)
flags.DEFINE_integer(
    "number_of_clusters", None, "States of codebooks, by default 2^bits.", lower_bound=2, upper_bound=256
)
flags.DEFINE_integer("ptq_seed", 0, "Seed of methods that learn.")
flags.DEFINE_enum("activation_bits", "8", ["8", "16"], "Of activations, input included.")
flags.DEFINE_enum(
    "inference_type",
    None,
    list(tflite.INFERENCE_TYPES),
    "Type of the file's input and output; by default that of its activations, int8 or int16.",
)

PTQ_FLAGS = ("ptq", "ptq_iterations", "ptq_seed", "number_of_clusters", "activation_bits")  # alike for all files


def read_flags():
    """(bits, granularities) as asked for; the flags are lists of words."""
    unknown = [word for word in FLAGS.granularity if word not in GRANULARITIES]
    if unknown or not FLAGS.granularity:
        raise ValueError(f"--granularity is {','.join(FLAGS.granularity)!r}; known: {', '.join(GRANULARITIES)}")
    bits = [int(word) if word.isdigit() else 0 for word in FLAGS.weight_bits]
    if not bits or not all(2 <= width <= 8 for width in bits):
        raise ValueError(f"--weight_bits is {','.join(FLAGS.weight_bits)!r}; use whole numbers from 2 to 8")
    ptq.parse_method(FLAGS.ptq)
    return bits, FLAGS.granularity


def check_trained_codes():
    """Refuses flags that would quantize what training has quantized."""
    for name in ("weight_bits", "granularity", "layer_bits", *PTQ_FLAGS):
        if FLAGS[name].value != FLAGS[name].default:
            raise ValueError(
                f"--{name}={FLAGS[name].value} does not go with a model that was trained quantized; leave it"
            )


def trained_file(model, seen, inference_type, metadata):
    """As `make_files`, the one file of a quantized model: its codes and ranges."""
    file = tflite.convert(model, inference_type=inference_type, metadata=metadata)
    return f"{inference_type}_trained.tflite", {"weights": "as trained", "layers": fidelity(file, model, seen)}, file


def fidelity(file, model, seen):
    """What `tflite.layers` says of a file, for JSON."""
    return [dataclasses.asdict(layer) for layer in tflite.layers(file, model, seen)]


def widths(bits):
    """Bits by pattern of layer names, as one file has them."""
    return ",".join(filter(None, [FLAGS.layer_bits, f".*={bits}"]))


def file_facts(width, granularity, started):
    seconds = round(time.monotonic() - started, 1)
    return {"weight_bits": width, "granularity": granularity, "ptq": FLAGS.ptq, "quantization_seconds": seconds}


def make_files(fused, calibration, seen, bits, granularities, inference_type, metadata):
    """Yields (file name, what it is, bytes) for every width and granularity, by TensorFlow's own calibration."""
    calibrated = tflite.convert(fused, calibration, inference_type=inference_type)
    for width, granularity in itertools.product(bits, granularities):
        started = time.monotonic()
        file = tflite.with_weights(calibrated, fused, width, granularity == "per_channel", metadata=metadata)
        facts = file_facts(width, granularity, started) | {"layers": fidelity(file, fused, seen)}
        yield f"{inference_type}_w{width}_{granularity}.tflite", facts, file


def make_ptq_files(fused, images, seen, input_range, bits, granularities, inference_type, metadata, unfinished):
    """As `make_files`, by --ptq; takes what an interrupted run of the same command has left, and leaves each file."""
    for width, granularity in itertools.product(bits, granularities):
        name = f"{inference_type}_w{width}_{granularity}_{FLAGS.ptq.replace('+', '_')}.tflite"
        step = {"weight_bits": widths(width), "granularity": granularity}
        if (kept := unfinished.read(**step)) is not None:
            print(f"{name}: taken from the run that was interrupted", file=sys.stderr)
            yield name, *kept
            continue
        started = time.monotonic()
        with cli.bad_input_exits():
            network = ptq.quantize_network(
                fused,
                FLAGS.ptq,
                widths(width),
                granularity == "per_channel",
                images,
                iterations=FLAGS.ptq_iterations,
                number_of_clusters=FLAGS.number_of_clusters,
                activation_bits=int(FLAGS.activation_bits),
                input_range=input_range,
                seed=FLAGS.ptq_seed,
                progress=True,
            )
        file = tflite.convert(network.quantized, inference_type=inference_type, metadata=metadata)
        facts = file_facts(width, granularity, started) | {"layer_bits": FLAGS.layer_bits, "notes": network.notes}
        facts["layers"] = fidelity(file, network.float, seen)  # which a method may have equalized, say
        unfinished.keep(facts, file, **step)
        yield name, facts, file


def quantized_files(fused, calibration, seen, data, output, bits, granularities, inference_type, metadata):
    """(what yields the files, what to remove once they are written or None)."""
    asked = bits, granularities, inference_type, metadata
    # Without further wishes, TensorFlow's own calibration serves all files.
    if FLAGS.ptq == "min_max" and FLAGS.layer_bits is None and FLAGS.activation_bits == "8":
        return make_files(fused, calibration, seen, *asked), None
    images = list(calibration.as_numpy_iterator()) if ptq.needs_calibration(FLAGS.ptq) else None
    unfinished = storage.Unfinished(
        output,
        model=runs.model_sha256(FLAGS.workdir),
        sources=provenance.sources_sha256(),
        tensorflow=provenance.machine()["tensorflow"],
        calibration=images and hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest(),
        flags={name: FLAGS[name].value for name in PTQ_FLAGS},
        inference_type=inference_type,
        metadata=metadata,
    )
    return make_ptq_files(fused, images, seen, data.preprocessing.range(), *asked, unfinished), unfinished
