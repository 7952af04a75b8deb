"""The main job on the embedded digits, in minutes: python experiments/demo.py (or: make demo)

Trains RepVGG three times from one seed with one schedule (plain BN; OABN; a control without identity branches),
fuses, writes integer files at every weight width, runs all of them over the whole test split, and leaves
runs/demo/report.json, the .tflite files and weights.png.
"""

import time

from commands import ROOT, export, train
from tables import bits_table
from weight_distributions import draw

from tf_repvgg import runs

FOLDER = "runs/demo"
BITS = (8, 7, 6, 5, 4, 3)
MODELS = {"BN": "digits_bn", "OABN": "digits_oabn", "no identity": "digits_no_identity"}


def main():
    started = time.monotonic()
    trained, exported = {}, {}
    for name, config in MODELS.items():
        workdir = f"{FOLDER}/{config}"
        trained[name] = train(config, workdir)
        exported[name] = export(workdir, weight_bits=",".join(map(str, BITS)), granularity="per_tensor,per_channel")
    draw(
        {name: runs.load_model(ROOT / FOLDER / MODELS[name]) for name in ("BN", "OABN")}, ROOT / FOLDER / "weights.png"
    )
    report = {
        "seconds": round(time.monotonic() - started, 1),
        "models": {
            name: {"config": f"configs/{config}.flags", "training": trained[name], "export": exported[name]}
            for name, config in MODELS.items()
        },
    }
    runs.write_json(ROOT / FOLDER / "report.json", report)
    images = exported["BN"]["images"]
    print(f"\nTop-1 in percent on all {images} test images, in the LiteRT interpreter,")
    print("int8 activations, weights by min-max: per tensor / per channel\n")
    print(bits_table(exported, BITS, tablefmt="simple"))
    print("\noutliers: largest merged weight over the layer's standard deviation, largest over the layers")
    for name, record in exported.items():
        print(f"  {name:<12} {max(entry['outlier_ratio'] for entry in record['outliers']):6.1f}")
    print(f"\n{FOLDER}/report.json   every number\n{FOLDER}/weights.png   merged weights of both")
    print(f"{FOLDER}/*/export/    the .tflite files")


if __name__ == "__main__":
    main()
