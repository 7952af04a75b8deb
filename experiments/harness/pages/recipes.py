"""The page of experiments/recipes.py."""

import math

from harness.tables import IMAGES, make_paragraph, make_table

BASELINE = "baseline"
_HEADERS = ("recipe", "changes", "top-1 %", "gain", "minutes")


def render(record: dict) -> str:
    """The page in Markdown, from the content of recipes.json."""
    teacher = find_teacher(record)
    steps = f" of {record['steps_per_epoch']} steps each" if record["steps_per_epoch"] else ""
    introduction = make_paragraph(
        f"""`python experiments/recipes.py`: {record["config"]} on 45,000 images of CIFAR-10, with {record["epochs"]}
        epochs{steps} ({record["early_epochs"]} on small crops) instead of the schedule of the config, and one change
        at a time; seed 0; top-1 of the float model on the {record["rows"][0]["images"]:,} held-out images. Gains are
        in points against the baseline. With one seed, differences below about {estimate_chance(record):.1f} points
        are within chance, and regularization (mixup, RandAugment) is made for longer schedules than this. Minutes are
        the training time on a machine that may have been busy. The teacher of the distillation is
        {teacher["variant"]}, trained the same way to {teacher["top1_percent"]:.2f} %. {IMAGES}"""
    )
    return f"# What each training recipe gives\n\n{introduction}\n\n{make_recipes_table(record)}"


def make_recipes_table(record: dict) -> str:
    """One row per recipe."""
    baseline = record["rows"][0]["top1_percent"]

    def make_row(row):
        gain = "" if row["recipe"] == BASELINE else f"{row['top1_percent'] - baseline:+.2f}"
        changes = " ".join(f"--{name}={value}" for name, value in row["flags"].items())
        return [row["recipe"], changes, f"{row['top1_percent']:.2f}", gain, f"{row['training_seconds'] / 60:.1f}"]

    return make_table([make_row(row) for row in record["rows"]], _HEADERS)


def find_teacher(record: dict) -> dict:
    """The result of the model that teaches in the distillation."""
    (teacher,) = (row["teacher"] for row in record["rows"] if "teacher" in row)
    return teacher


def estimate_chance(record: dict) -> float:
    """Two standard deviations of the difference between two models that err independently, in points.

    On the same images models err alike, so that the true deviation is smaller.
    """
    baseline = record["rows"][0]
    share = baseline["top1_percent"] / 100
    return 2 * 100 * math.sqrt(2 * share * (1 - share) / baseline["images"])
