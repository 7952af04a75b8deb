"""The whole journey on the embedded digits, in minutes: python experiments/demo.py (or: make demo)

Trains RepVGG three times from one seed with one schedule (plain BN; OABN; a control without identity branches), fuses,
writes integer files at every weight width and with small codebooks, runs all of them over the whole test split, and
writes runs/demo/report.json, report.html, the .tflite files and weights.png.
"""

import importlib.util
import time

from absl import logging
from harness import weight_figure
from harness.commands import ROOT, export, train
from harness.tables import make_bits_table

from tf_repvgg import report, runs, storage
from tf_repvgg.data import ClassificationData, Preprocessing
from tf_repvgg.quantization.uniform import GRANULARITIES

FOLDER = "runs/demo"
BITS = (8, 7, 6, 5, 4, 3)
CODEBOOK_BITS = (4, 3, 2)
MODELS = {"BN": "digits_bn", "OABN": "digits_oabn", "no identity": "digits_no_identity"}


def export_codebooks(workdir):
    """Exports weights with few levels, stored as such where TFLite Micro is installed (an extra, for Linux only)."""
    has_micro = importlib.util.find_spec("tflite_micro") is not None
    return export(
        workdir,
        output=f"{workdir}/codebooks",
        ptq="codebook",
        weight_bits=",".join(map(str, CODEBOOK_BITS)),
        granularity="per_tensor",
        targets="litert_int8,tflm_lut" if has_micro else "litert_int8",
    )


def measure(config):
    """Trains and exports one model; returns its part of the record."""
    workdir = f"{FOLDER}/{config}"
    training = train(config, workdir)
    exported = export(workdir, ptq="min_max", weight_bits=",".join(map(str, BITS)), granularity=",".join(GRANULARITIES))
    codebooks = export_codebooks(workdir)
    return {"config": f"configs/{config}.flags", "training": training, "export": exported, "codebooks": codebooks}


def write_report(path, metadata):
    """Writes report.html of all models; the metadata describe their input images."""
    logging.set_verbosity(logging.ERROR)  # as the commands do: TFDS warns of what does not concern users
    data = ClassificationData(
        metadata["dataset"],
        preprocessing=Preprocessing.from_metadata(metadata),
        hold_out=metadata["validation_held_out"],
    )
    folders = {name: ROOT / FOLDER / config for name, config in MODELS.items()}
    gathered = [
        report.gather(name, folder, [folder / "export", folder / "codebooks"], data) for name, folder in folders.items()
    ]
    report.write(path, gathered)


def print_summary(exports):
    """Prints the table of README.md."""
    print(f"\nTop-1 in percent on all {exports['BN']['images']} test images, in the LiteRT interpreter,")
    print("int8 activations, weights by min-max: per tensor / per channel\n")
    print(make_bits_table(exports, BITS, tablefmt="simple"))
    print("\noutliers: largest merged weight over the layer's standard deviation, largest over the layers")
    for name, exported in exports.items():
        print(f"  {name:<12} {max(layer['outlier_ratio'] for layer in exported['outliers']):6.1f}")
    print(f"\n{FOLDER}/report.html   everything to look at\n{FOLDER}/report.json   every number")
    print(f"{FOLDER}/weights.png   merged weights of both")
    print(f"{FOLDER}/*/export/    the .tflite files")


def main():
    started = time.monotonic()
    models = {name: measure(config) for name, config in MODELS.items()}
    folder = ROOT / FOLDER
    drawn = {name: runs.load_model(folder / MODELS[name]) for name in ("BN", "OABN")}
    weight_figure.draw(drawn, folder / "weights.png")
    record = {"seconds": round(time.monotonic() - started, 1), "models": models}
    storage.write_json(folder / "report.json", record)
    write_report(folder / "report.html", models["BN"]["export"]["input"])
    print_summary({name: model["export"] for name, model in models.items()})


if __name__ == "__main__":
    main()
