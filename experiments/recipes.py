"""What each training recipe gives on CIFAR-10: python experiments/recipes.py --data_dir=...

Trains configs/cifar10_oabn.flags with a shortened schedule on 45,000 images, as it is and with one change at a time,
and evaluates on the 5,000 held-out images. The teacher of the distillation is a wider, deeper network that is trained
the same way first. Resumable; leaves results/recipes.json and results/recipes.md.
"""

from absl import app, flags
from harness.commands import ROOT, train
from harness.tables import write_results
from tabulate import tabulate

from tf_repvgg import provenance

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/recipes", "Folder of the training runs.")
flags.DEFINE_string("results", "results", "Folder of the results.")
flags.DEFINE_integer("epochs", 4, "Epochs of every run; the final models train longer.", lower_bound=1)
flags.DEFINE_integer("early_epochs", 3, "How many of them train on small crops.", lower_bound=0)
flags.DEFINE_integer("steps_per_epoch", None, "By default those of one pass; fewer to try this out.", lower_bound=1)

CONFIG = "cifar10_oabn"
BASELINE = "baseline"
DISTILLATION = "distillation"
TEACHER_VARIANT = "cifar-m"
# {recipe: what it changes in the config}
RECIPES = {
    BASELINE: {},
    "AdamW": {"optimizer": "adamw", "learning_rate": "0.002", "weight_decay": "0.1"},
    "EMA": {"ema": "0.995"},
    "mixup": {"mixup": "0.2"},
    "RandAugment": {"randaugment": "2", "randaugment_magnitude": "9"},
    "no label smoothing": {"label_smoothing": "0"},
    DISTILLATION: {"distill_weight": "0.5", "distill_temperature": "4"},
}


def run(name, changes):
    """(workdir, result.json) of the config with changes."""
    workdir = f"{FLAGS.runs}/{name.replace(' ', '_')}"
    schedule = {name: FLAGS[name].value for name in ("epochs", "early_epochs", "steps_per_epoch")}
    return workdir, train(CONFIG, workdir, validation=True, data_dir=FLAGS.data_dir, **schedule, **changes)


def measure(name, changes):
    row = {"recipe": name, "flags": dict(changes)}
    if name == DISTILLATION:
        teacher, result = run("teacher", {"variant": TEACHER_VARIANT})
        row["teacher"] = {"variant": TEACHER_VARIANT, **result}
        changes = {**changes, "distill_from": teacher}
    _, result = run(name, changes)
    return row | result


def page(rows):
    baseline = rows[0]["top1_percent"]

    def cells(row):
        delta = "" if row["recipe"] == BASELINE else f"{row['top1_percent'] - baseline:+.2f}"
        changes = " ".join(f"--{name}={value}" for name, value in row["flags"].items())
        return [row["recipe"], changes, f"{row['top1_percent']:.2f}", delta, f"{row['training_seconds'] / 60:.1f}"]

    headers = ["recipe", "changes", "top-1 %", "gain", "minutes"]
    table = tabulate([cells(row) for row in rows], headers, tablefmt="github", disable_numparse=True)
    teacher = rows[-1]["teacher"]
    images = rows[0]["images"]
    # Of a difference between two models that err independently; on the same images they err alike, so it is less.
    share = baseline / 100
    deviation = 100 * (2 * share * (1 - share) / images) ** 0.5
    shortened = f" of {FLAGS.steps_per_epoch} steps each" if FLAGS.steps_per_epoch else ""
    return f"""# What each training recipe gives

`python experiments/recipes.py`: configs/{CONFIG}.flags on 45,000 images of CIFAR-10, with {FLAGS.epochs}
epochs{shortened} ({FLAGS.early_epochs} on small crops) in place of its own, and one change at a time; seed 0; top-1 of
the float model on the {images:,} held-out images. Gains are in points against the baseline. From one seed, differences
below about {2 * deviation:.1f} points are within chance, and what regularizes (mixup, RandAugment) is made for longer
schedules than this. Minutes are those of training, on a machine that may have been busy. The teacher of the
distillation is {teacher["variant"]}, trained the same way to {teacher["top1_percent"]:.2f} %. Images: JPEG
re-encodings (quality 75) of CIFAR-10 where --data_dir points at the project's shared copy.

{table}
"""


def main(_):
    rows = [measure(name, changes) for name, changes in RECIPES.items()]
    record = {
        "config": f"configs/{CONFIG}.flags",
        "epochs": FLAGS.epochs,
        "early_epochs": FLAGS.early_epochs,
        "steps_per_epoch": FLAGS.steps_per_epoch,
        "machine": provenance.machine(),
        "rows": [{**row, "gain_points": round(row["top1_percent"] - rows[0]["top1_percent"], 3)} for row in rows],
    }
    text = page(rows)
    write_results(ROOT / FLAGS.results, "recipes", record, text)
    print(text)


if __name__ == "__main__":
    app.run(main)
