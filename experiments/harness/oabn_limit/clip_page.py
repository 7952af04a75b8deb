"""The page of experiments/clip_limit.py."""

import numpy as np

from harness.tables import IMAGES, make_paragraph, make_table
from tf_repvgg.quantization.uniform import GRANULARITIES

BITS = (8, 5, 4)
_HEADERS = ("k", "clip mode", "FP32", *(f"{width} bit" for width in BITS))
_HEADERS += ("mean", "median gamma/sigma", "clipped", "outlier")


def render(record: dict) -> str:
    """The page in Markdown, from the content of clip_limit.json."""
    introduction = make_paragraph(
        f"""`python experiments/clip_limit.py`: the CIFAR-10 model of {record["config"]} with {record["epochs"]}
        epochs ({record["early_epochs"]} of them on small crops) on 45,000 images, seed 0; top-1 in percent on the
        5,000 held-out images, per tensor / per channel, in LiteRT. Chosen (bold): the highest mean over the six
        integer columns. `inf` is plain batch normalization. "median gamma/sigma" is the range over blocks of the
        median over channels of |gamma_hat| / sqrt(variance + epsilon) on the identity branch; "clipped" is the share
        of channels at the limit; "outlier" is the largest merged weight over the standard deviation of its layer, the
        largest over the layers. {IMAGES}"""
    )
    return f"# Choosing OABN's limit k\n\n{introduction}\n\n{make_limit_table(record)}"


def make_limit_table(record: dict) -> str:
    """One row per candidate, the chosen limit in bold."""
    return make_table([_make_row(row, row == record["chosen"]) for row in record["rows"]], _HEADERS)


def _make_row(row, is_chosen):
    pairs = (
        " / ".join(f"{row['integer_top1_percent'][f'{width} {kind}']:.1f}" for kind in GRANULARITIES) for width in BITS
    )
    medians = row["gamma_over_sigma_median"]
    shares = [share for share in row["clipped_share"] if share is not None]
    return [
        f"**{row['oabn_k']}**" if is_chosen else row["oabn_k"],
        row["oabn_clip_mode"],
        f"{row['float_top1_percent']:.1f}",
        *pairs,
        f"{row['mean_integer_top1_percent']:.1f}",
        f"{min(medians):.3f} .. {max(medians):.3f}",
        f"{100 * np.mean(shares):.0f} %" if shares else "",
        f"{row['largest_outlier_ratio']:.0f}",
    ]
