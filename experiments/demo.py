"""The main job on the embedded digits, in minutes: python experiments/demo.py (or: make demo)

Trains RepVGG three times from one seed with one schedule (plain BN; OABN; a control without identity branches),
fuses, writes integer files at every weight width and with codebooks of few states, runs all of them over the whole test
split, and leaves runs/demo/report.json, report.html, the .tflite files and weights.png.
"""

import importlib.util
import time

from absl import logging
from harness.commands import ROOT, export, train
from harness.tables import bits_table
from harness.weight_figure import draw

from tf_repvgg import report, runs, storage
from tf_repvgg.data import ClassificationData, Preprocessing

FOLDER = "runs/demo"
BITS = (8, 7, 6, 5, 4, 3)
CODEBOOK_BITS = (4, 3, 2)
MODELS = {"BN": "digits_bn", "OABN": "digits_oabn", "no identity": "digits_no_identity"}


def export_codebooks(workdir):
    """Weights of few states, stored as such where TFLite Micro is installed (an extra, for Linux only)."""
    has_micro = importlib.util.find_spec("tflite_micro") is not None
    return export(
        workdir,
        output=f"{workdir}/codebooks",
        ptq="codebook",
        weight_bits=",".join(map(str, CODEBOOK_BITS)),
        granularity="per_tensor",
        targets="litert_int8,tflm_lut" if has_micro else "litert_int8",
    )


def write_page(path, facts):
    """report.html of all models; facts are those of the images they take."""
    logging.set_verbosity(logging.ERROR)  # as the commands do: TFDS warns of what does not concern users
    data = ClassificationData(
        facts["dataset"], preprocessing=Preprocessing.from_facts(facts), hold_out=facts["validation_held_out"]
    )
    folders = {name: ROOT / FOLDER / config for name, config in MODELS.items()}
    gathered = [
        report.gather(name, folder, [folder / "export", folder / "codebooks"], data) for name, folder in folders.items()
    ]
    report.write(path, gathered)


def main():
    started = time.monotonic()
    trained, exported, with_codebooks = {}, {}, {}
    for name, config in MODELS.items():
        workdir = f"{FOLDER}/{config}"
        trained[name] = train(config, workdir)
        exported[name] = export(workdir, weight_bits=",".join(map(str, BITS)), granularity="per_tensor,per_channel")
        with_codebooks[name] = export_codebooks(workdir)
    draw(
        {name: runs.load_model(ROOT / FOLDER / MODELS[name]) for name in ("BN", "OABN")}, ROOT / FOLDER / "weights.png"
    )
    record = {
        "seconds": round(time.monotonic() - started, 1),
        "models": {
            name: {
                "config": f"configs/{config}.flags",
                "training": trained[name],
                "export": exported[name],
                "codebooks": with_codebooks[name],
            }
            for name, config in MODELS.items()
        },
    }
    storage.write_json(ROOT / FOLDER / "report.json", record)
    write_page(ROOT / FOLDER / "report.html", exported["BN"]["input"])
    images = exported["BN"]["images"]
    print(f"\nTop-1 in percent on all {images} test images, in the LiteRT interpreter,")
    print("int8 activations, weights by min-max: per tensor / per channel\n")
    print(bits_table(exported, BITS, tablefmt="simple"))
    print("\noutliers: largest merged weight over the layer's standard deviation, largest over the layers")
    for name, its in exported.items():
        print(f"  {name:<12} {max(entry['outlier_ratio'] for entry in its['outliers']):6.1f}")
    print(f"\n{FOLDER}/report.html   all of it to look at\n{FOLDER}/report.json   every number")
    print(f"{FOLDER}/weights.png   merged weights of both")
    print(f"{FOLDER}/*/export/    the .tflite files")


if __name__ == "__main__":
    main()
