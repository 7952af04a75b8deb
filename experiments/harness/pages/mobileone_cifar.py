"""The page of experiments/mobileone_cifar.py."""

from harness.tables import IMAGES, make_paragraph, make_table
from tf_repvgg.quantization.uniform import GRANULARITIES

BITS = (8, 4)
# Kinds of layers, by the ends of their names.
KINDS = ("depthwise", "pointwise")
OABN = "OABN"


def render(record: dict) -> str:
    """The page in Markdown, from the content of mobileone_cifar.json."""
    models = record["models"]
    changes = (f"--{name}={record[name]}" for name in ("epochs", "steps_per_epoch") if record[name])
    command = " ".join(["python experiments/mobileone_cifar.py", *changes])
    introduction = make_paragraph(
        f"""`{command}`: variant cifar-mobileone (configs/cifar10_mobileone_*.flags) trained on 50,000 images, one seed;
        top-1 in percent on {models["BN"]["images"]:,} test images, in LiteRT, per tensor / per channel; weights by
        min-max, int8 activations. "4 bit depthwise" and "4 bit pointwise": 4 bits in those layers alone, 8 in all
        others. "QA style" has one normalization after the sum, and none on the identity and scale branches. {IMAGES}"""
    )
    choice = make_paragraph(
        f"""OABN's limit k was chosen on {record["limits"][0]["images"]:,} held-out images, from trainings of
        {record["search_epochs"]} epochs on 45,000: the highest mean over the integer columns (bold)."""
    )
    weights = make_paragraph(
        """What merged weights look like, medians over the layers of a kind: the largest weight over the standard
        deviation of its layer, and within a channel; the largest weight of the identity branch; and the share of
        identity gammas at OABN's limit."""
    )
    return "\n\n".join(
        [
            "# MobileOne on CIFAR-10: BN, OABN and QARepVGG's normalizations",
            introduction,
            make_models_table(record),
            choice,
            make_limits_table(record),
            weights,
            make_weights_table(record),
        ]
    )


def make_models_table(record: dict) -> str:
    """One row per model: float and integer top-1."""

    def make_row(title, model):
        if model["has_diverged"]:
            return [title, "diverged"]
        alone = (_join(model["low_bits_alone_top1_percent"][kind], max(BITS)) for kind in KINDS)
        name = f"{title}, k = {record['chosen_k']}" if title == OABN else title
        return [
            name,
            f"{model['float_top1_percent']:.1f}",
            *(_join(model["integer_top1_percent"], width) for width in BITS),
            *alone,
        ]

    headers = ["model", "FP32", *(f"{width} bit" for width in BITS), *(f"{min(BITS)} bit {kind}" for kind in KINDS)]
    return make_table([make_row(title, model) for title, model in record["models"].items()], headers)


def make_limits_table(record: dict) -> str:
    """One row per limit k, the chosen one in bold."""
    rows = [
        [
            f"**{row['oabn_k']}**" if row["oabn_k"] == record["chosen_k"] else row["oabn_k"],
            f"{row['float_top1_percent']:.1f}",
            *(_join(row["integer_top1_percent"], width) for width in BITS),
            f"{row['mean_integer_top1_percent']:.1f}",
        ]
        for row in record["limits"]
    ]
    return make_table(rows, ["k", "FP32", *(f"{width} bit" for width in BITS), "mean"])


def make_weights_table(record: dict) -> str:
    """One row per model and kind of layer."""
    rows = []
    for title, model in record["models"].items():
        for kind, weights in model.get("weights", {}).items():
            share = weights["clipped_share_mean"]
            numbers = (
                weights["outlier_ratio_median"],
                weights["channel_outlier_ratio_median"],
                weights["identity_largest_median"],
            )
            clipped = "" if share is None else f"{100 * share:.0f} %"
            rows.append([title, kind, *(f"{number:.2f}" for number in numbers), clipped])
    return make_table(rows, ["model", "layers", "outlier", "per channel", "identity", "clipped"])


def _join(top1, width):
    return " / ".join(f"{top1[f'{width} {kind}']:.1f}" for kind in GRANULARITIES)
