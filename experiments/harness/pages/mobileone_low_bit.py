"""The page of experiments/mobileone_low_bit.py."""

from collections.abc import Mapping

from harness.low_bit.page import format_percent, make_lead_table, make_rows_table
from harness.tables import make_paragraph, make_table


def render(record: Mapping) -> str:
    """The page in Markdown, from the content of mobileone_low_bit.json, complete or not."""
    rates = next(iter(record["validation_top1_percent"].values())).keys()
    choices = [
        [method, *(format_percent(top1[rate]) for rate in rates)]
        for method, top1 in record["validation_top1_percent"].items()
    ]
    return "\n\n".join(
        [
            "# Few weight clusters in MobileOne-S0, on photographs",
            make_paragraph(
                """`python experiments/mobileone_low_bit.py --data_dir=...`: MobileOne-S0, trained on ImageNet by
                others and fused, with a new head for the ten classes of Imagenette, at 128 pixels. Two epochs of
                fine-tuning for every row (configs/imagenette_fine_tuning.flags), 8-bit activations, top-1 in percent
                of the integer file in LiteRT on all 3,925 test photographs. Drop: in points, against the same network
                fine-tuned in float for the same steps, with its paired 95 % interval. Agreement: percent of the
                photographs on which the file finds the same class as the trained model in TensorFlow. Gain: top-1 of
                the file minus top-1 of the trained model. ClusterQAT starts from codebooks that codebook_adaquant
                learns on 1,024 photographs; LSQ and tfmot start as their authors start them; tfmot clusters for one
                epoch and quantizes for one."""
            ),
            make_rows_table(record["rows"]),
            "Lead of ClusterQAT in points, with its paired 95 % interval:",
            make_lead_table(record["rows"]),
            "Learning rates (of tfmot's AdamW, a twentieth of them), chosen on held-out training photographs with 8 "
            "clusters per tensor:",
            make_table(choices, ["", *rates]),
        ]
    )
