"""The page of experiments/codebook_limit.py."""

from harness.oabn_limit.candidates import LIMITS
from harness.oabn_limit.codebook_trainings import CLUSTERS, FINAL_SEEDS, average, list_seeds
from harness.tables import IMAGES, make_paragraph, make_table


def render(record: dict) -> str:
    """The page in Markdown, from the content of codebook_limit.json, complete or not."""
    introduction = make_paragraph(
        f"""`python experiments/codebook_limit.py`: the CIFAR-10 model of {record["config"]} with {record["epochs"]}
        epochs ({record["early_epochs"]} of them on small crops) on 45,000 images, then one epoch of ClusterQAT (per
        tensor, 8-bit activations, distilled from the same model, learning rate
        {record["fine_tuning"]["learning_rate"]}); top-1 in percent on the 5,000 held-out images, as the training
        program evaluates it, mean over the seeds. FP32 is before that epoch. `inf` is plain batch normalization.
        Chosen (bold): the highest mean of the limits with {1 + len(FINAL_SEEDS)} seeds. {IMAGES}"""
    )
    return f"# Which k serves a codebook\n\n{introduction}\n\n{make_codebook_table(record)}"


def make_codebook_table(record: dict) -> str:
    """One row per limit that has been trained, the chosen one in bold."""
    trainings = record["trainings"]
    rows = [
        [
            f"**{k}**" if k == record["chosen"] else k,
            len(seeds),
            *(f"{average(trainings, k, column):.2f}" for column in ("float", *CLUSTERS)),
            f"{average(trainings, k, *CLUSTERS):.2f}",
        ]
        for k in LIMITS
        if (seeds := list_seeds(trainings, k))
    ]
    return make_table(rows, ["k", "seeds", "FP32", *(f"{count} clusters" for count in CLUSTERS), "mean of these"])
