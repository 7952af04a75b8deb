"""What does each training recipe give on CIFAR-10? python experiments/recipes.py --data_dir=...

Trains configs/cifar10_oabn.flags with a shortened schedule on 45,000 images, as it is and with one change at a time,
and evaluates on the 5,000 held-out images. The teacher of the distillation is a wider, deeper network that is trained
the same way first. Resumable; writes results/recipes.json and results/recipes.md.
"""

from absl import app, flags
from harness.commands import ROOT, train
from harness.pages.recipes import BASELINE, render
from harness.tables import write_results

from tf_repvgg import provenance

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/recipes", "Folder of the training runs.")
flags.DEFINE_string("results", "results", "Folder of the results.")
flags.DEFINE_integer("epochs", 4, "Epochs of every run; the final models train longer.", lower_bound=1)
flags.DEFINE_integer("early_epochs", 3, "Number of these epochs that train on small crops.", lower_bound=0)
flags.DEFINE_integer("steps_per_epoch", None, "Steps of an epoch; by default one pass over the images.", lower_bound=1)

CONFIG = "cifar10_oabn"
DISTILLATION = "distillation"
TEACHER_VARIANT = "cifar-m"
# {recipe: flags that it changes in the config}
RECIPES = {
    BASELINE: {},
    "AdamW": {"optimizer": "adamw", "learning_rate": "0.002", "weight_decay": "0.1"},
    "EMA": {"ema": "0.995"},
    "mixup": {"mixup": "0.2"},
    "RandAugment": {"randaugment": "2", "randaugment_magnitude": "9"},
    "no label smoothing": {"label_smoothing": "0"},
    DISTILLATION: {"distill_weight": "0.5", "distill_temperature": "4"},
}
SCHEDULE = ("epochs", "early_epochs", "steps_per_epoch")


def workdir_of(name):
    return f"{FLAGS.runs}/{name.replace(' ', '_')}"


def run(name, changes):
    """Trains the config with changes; returns result.json."""
    schedule = {flag: FLAGS[flag].value for flag in SCHEDULE}
    return train(CONFIG, workdir_of(name), validation=True, data_dir=FLAGS.data_dir, **schedule, **changes)


def measure(name, changes):
    """Trains one recipe, and its teacher if it has one; returns its row."""
    row = {"recipe": name, "flags": dict(changes)}
    if name == DISTILLATION:
        row["teacher"] = {"variant": TEACHER_VARIANT, **run("teacher", {"variant": TEACHER_VARIANT})}
        changes = {**changes, "distill_from": workdir_of("teacher")}
    return row | run(name, changes)


def main(_):
    rows = [measure(name, changes) for name, changes in RECIPES.items()]
    baseline = rows[0]["top1_percent"]
    record = {
        "config": f"configs/{CONFIG}.flags",
        **{flag: FLAGS[flag].value for flag in SCHEDULE},
        "machine": provenance.machine(),
        "rows": [{**row, "gain_points": round(row["top1_percent"] - baseline, 3)} for row in rows],
    }
    page = render(record)
    write_results(ROOT / FLAGS.results, "recipes", record, page)
    print(page)


if __name__ == "__main__":
    app.run(main)
