"""Does OABN carry over to MobileOne's depthwise layers? python experiments/mobileone_cifar.py --data_dir=...

Chooses OABN's limit k with a shortened schedule on 45,000 images of CIFAR-10 and 5,000 held-out ones, trains MobileOne
with BN, with OABN, and with QARepVGG's normalizations on all 50,000, and evaluates 8 and 4 bit files once on the test
images: all layers, and with 4 bits in the depthwise or in the pointwise layers alone. Resumable; writes
results/mobileone_cifar.json and results/mobileone_cifar.md.
"""

import numpy as np
from absl import app, flags
from harness.commands import ROOT, Diverged, export, train
from harness.pages.mobileone_cifar import BITS, KINDS, OABN, render
from harness.tables import write_results

from tf_repvgg import provenance
from tf_repvgg.quantization.uniform import GRANULARITIES

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/mobileone_cifar", "Folder of the training runs.")
flags.DEFINE_string("results", "results", "Folder of the results.")
flags.DEFINE_list("limits", ["0.1", "0.2", "0.5", "1"], "Limits k of OABN to choose from.")
flags.DEFINE_integer("search_epochs", 2, "Epochs of each training to choose k, one less on small crops.", lower_bound=1)
flags.DEFINE_integer("epochs", None, "Epochs of the final trainings; by default as in the configs.", lower_bound=1)
flags.DEFINE_integer("steps_per_epoch", None, "Steps of an epoch; by default one pass over the images.", lower_bound=1)

MODELS = {"BN": "cifar10_mobileone_bn", OABN: "cifar10_mobileone_oabn", "QA style": "cifar10_mobileone_qa"}


def export_files(workdir, **options):
    """Integer files of a run by min-max, of all granularities: the export's record."""
    return export(workdir, ptq="min_max", granularity=",".join(GRANULARITIES), data_dir=FLAGS.data_dir, **options)


def collect_top1(record):
    """{"<bits> <granularity>": top-1 in percent} of an export's files."""
    return {f"{file['weight_bits']} {file['granularity']}": file["top1_percent"] for file in record["files"]}


def measure_limit(limit):
    """Trains OABN with one limit on a part of the training images; returns its row."""
    workdir = f"{FLAGS.runs}/k_{limit}"
    schedule = {"epochs": FLAGS.search_epochs, "early_epochs": FLAGS.search_epochs - 1}
    schedule["steps_per_epoch"] = FLAGS.steps_per_epoch
    train(MODELS[OABN], workdir, validation=True, data_dir=FLAGS.data_dir, oabn_k=limit, **schedule)
    record = export_files(workdir, weight_bits=",".join(map(str, BITS)), evaluation_split="validation")
    top1 = collect_top1(record)
    return {
        "oabn_k": limit,
        "images": record["images"],
        "float_top1_percent": record["float_fused_top1_percent"],
        "integer_top1_percent": top1,
        "mean_integer_top1_percent": round(float(np.mean(list(top1.values()))), 3),
    }


def measure_model(config, **changes):
    """Trains one model on all training images and evaluates its files on the test images; returns its row.

    That of a model whose training diverges has the flags alone.
    """
    workdir = f"{FLAGS.runs}/{config}"
    schedule = {"epochs": FLAGS.epochs, "steps_per_epoch": FLAGS.steps_per_epoch}
    try:
        training = train(config, workdir, data_dir=FLAGS.data_dir, **schedule, **changes)
    except Diverged:
        return {"config": f"configs/{config}.flags", "flags": changes, "has_diverged": True}
    whole = export_files(workdir, weight_bits=",".join(map(str, BITS)))
    alone = {
        kind: export_files(
            workdir, weight_bits="8", layer_bits=f".*_{kind}={min(BITS)}", output=f"{workdir}/export_{kind}"
        )
        for kind in KINDS
    }
    return {
        "config": f"configs/{config}.flags",
        "flags": changes,
        "has_diverged": False,
        "training": training,
        "images": whole["images"],
        "float_top1_percent": whole["float_fused_top1_percent"],
        "integer_top1_percent": collect_top1(whole),
        "low_bits_alone_top1_percent": {kind: collect_top1(record) for kind, record in alone.items()},
        "weights": {kind: summarize_weights(whole["outliers"], kind) for kind in KINDS},
    }


def summarize_weights(outliers, kind):
    """Medians over the layers of one kind, and the share of identity gammas at OABN's limit."""
    layers = [layer for layer in outliers if layer["name"].endswith(f"_{kind}")]
    clipped = [layer["clipped_share"] for layer in layers if layer["clipped_share"] is not None]
    identities = [layer["branch_largest"]["identity"] for layer in layers if "identity" in layer["branch_largest"]]
    return {
        "outlier_ratio_median": float(np.median([layer["outlier_ratio"] for layer in layers])),
        "channel_outlier_ratio_median": float(np.median([layer["channel_outlier_ratio"] for layer in layers])),
        "identity_largest_median": float(np.median(identities)),
        "clipped_share_mean": float(np.mean(clipped)) if clipped else None,
    }


def main(_):
    limits = [measure_limit(limit) for limit in FLAGS.limits]
    chosen = max(limits, key=lambda row: row["mean_integer_top1_percent"])["oabn_k"]
    changes = {OABN: {"oabn_k": chosen}}
    record = {
        "search_epochs": FLAGS.search_epochs,
        "epochs": FLAGS.epochs,
        "steps_per_epoch": FLAGS.steps_per_epoch,
        "limits": limits,
        "chosen_k": chosen,
        "models": {title: measure_model(config, **changes.get(title, {})) for title, config in MODELS.items()},
        "machine": provenance.machine(),
    }
    page = render(record)
    write_results(ROOT / FLAGS.results, "mobileone_cifar", record, page)
    print(page)


if __name__ == "__main__":
    app.run(main)
