"""The page of experiments/low_bit.py."""

import itertools
from collections.abc import Mapping, Sequence

from harness.low_bit.methods import LEARNING_RATES
from harness.tables import IMAGES, make_paragraph, make_table
from tf_repvgg.quantization.uniform import GRANULARITIES

# {key of low_bit.json: title of its table}
PARTS = {
    "headline": "ClusterQAT of every layer: two OABN models, one fine-tuning each",
    "peers": "The same steps by other methods",
    "common_rate": "ClusterQAT with 16 clusters per channel at its rate for 8 per tensor, which was tested first",
    "edges": "Stem and classifier with 256 clusters, the other layers with fewer",
    "others": "ClusterQAT without OABN",
}
# Labels in low_bit.json have older words than the page.
_WORDS = {" states": " clusters", "resting for an epoch": "with clusters frozen for an epoch"}


def render(record: Mapping) -> str:
    """The page in Markdown, from the content of low_bit.json, complete or not."""
    sections = [
        "# Few weight clusters on CIFAR-10",
        make_paragraph(
            f"""`python experiments/low_bit.py`: three epochs of fine-tuning, 8-bit activations, top-1 in percent of
            the integer file in LiteRT on all 10,000 test images. Drop: in points, against the same network fine-tuned
            in float for the same steps, with its paired 95 % interval. Agreement: percent of the images on which the
            file finds the same class as the trained model in TensorFlow. Gain: top-1 of the file minus top-1 of the
            trained model, in points. LiteRT runs XNNPACK's kernels, its default. ClusterQAT starts from codebooks
            that codebook_adaquant learns layer by layer on 1,024 images; LSQ and tfmot start as their authors start
            them. LSQ has as many levels of a uniform grid as the tables say clusters. {IMAGES}"""
        ),
    ]
    for part, title in PARTS.items():
        if record[part]:
            sections += [f"## {title}", make_rows_table(record[part])]
        if part == "peers" and record[part]:
            sections += ["Lead of ClusterQAT in points, with its paired 95 % interval:", make_lead_table(record[part])]
    if top1 := record["choices"].get("validation_top1_percent"):
        sections += [
            "## On validation data: the choice of learning rates and distillation, and variants",
            make_paragraph(
                """OABN model, top-1 in percent on 5,000 held-out images. SGD at these rates; tfmot with AdamW, at a
                twentieth of them. The choice per tensor serves per channel too, where ClusterQAT alone was measured;
                the choice with 8 clusters serves 5 clusters and more; the choice on OABN serves the other models too,
                or the next lower rate where that diverges. ClusterQAT with 16 clusters per channel was tested at that
                rate first, and then got the better rate of three seeds, one of which diverges at the other rate."""
            ),
            make_rates_table(top1),
        ]
    return "\n\n".join(sections)


def make_rows_table(rows: Sequence[Mapping]) -> str:
    """One line per row of a part."""
    has_target = "asked" in rows[0]
    cells = [
        [
            " / ".join(row["models"]),
            row["method"],
            row["states"],
            GRANULARITIES[row["granularity"]],
            " / ".join(dict.fromkeys(f"{rate:g}" for rate in row["learning_rates"])),
            join_percent(row["reference_top1_percent"]),
            join_percent(row["integer_top1_percent"]),
            f"{row['drop']:.2f} ± {row['half_interval']:.2f}",
            join_percent(row["agreement_percent"]),
            _join_gains(row),
            *([f"{row['asked']:.1f}", "yes" if row["is_met"] else "no"] if has_target else []),
        ]
        for row in rows
    ]
    headers = ["model", "method", "clusters", "weights", "rate", "float", "integer", "drop", "agreement", "gain"]
    return make_table(cells, [*headers, *(["target", "met"] if has_target else [])])


def make_lead_table(rows: Sequence[Mapping]) -> str:
    """Methods side by side, the first compared with the others, where all of them have been measured."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = []
    for (clusters, granularity), group in itertools.groupby(rows, lambda row: (row["states"], row["granularity"])):
        group = list(group)
        if len(group) == len(methods):
            top1 = (join_percent(row["integer_top1_percent"]) for row in group)
            leads = (
                f"{row['clusterqat_ahead']:.2f} ± {row['clusterqat_ahead_half_interval']:.2f}" for row in group[1:]
            )
            cells.append([clusters, GRANULARITIES[granularity], *top1, *leads])
    return make_table(cells, ["clusters", "weights", *methods, *(f"lead over {method}" for method in methods[1:])])


def make_rates_table(top1: Mapping[str, Mapping[str, float]]) -> str:
    """Top-1 on validation data by learning rate, one row per label of `Choices`."""
    rows = [
        [_reword(label), *(format_percent(values.get(str(rate))) for rate in LEARNING_RATES)]
        for label, values in top1.items()
    ]
    return make_table(rows, ["", *map(str, LEARNING_RATES)])


def join_percent(values: Sequence[float | None]) -> str:
    """Percentages of several models."""
    return " / ".join(map(format_percent, values))


def format_percent(value: float | None) -> str:
    """A percentage with two decimals; "-" if it was not measured, "diverged" if it is 0."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value else "diverged"


def _join_gains(row):
    """Top-1 of each integer file minus that of the trained model, in points."""
    pairs = zip(row["integer_top1_percent"], row["trained_model_top1_percent"], strict=True)
    return " / ".join("-" if trained is None else f"{top1 - trained:+.2f}" for top1, trained in pairs)


def _reword(label):
    for old, new in _WORDS.items():
        label = label.replace(old, new)
    return label
