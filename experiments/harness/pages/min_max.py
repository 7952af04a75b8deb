"""The page of experiments/min_max.py."""

from harness.tables import IMAGES, make_bits_table, make_paragraph

BITS = (8, 6, 5, 4, 3)


def render(record: dict) -> str:
    """The page in Markdown, from the content of min_max.json."""
    introduction = make_paragraph(
        f"""`python experiments/min_max.py`: one seed, {record["BN"]["export"]["images"]:,} test images, every file
        run in LiteRT. Top-1 in percent; int8 activations, weights by min-max, per tensor / per channel. {IMAGES}"""
    )
    return f"# Min-max quantization of CIFAR-10 models\n\n{introduction}\n\n{make_models_table(record)}"


def make_models_table(record: dict) -> str:
    """One row per model, one column per weight width."""
    return make_bits_table({name: model["export"] for name, model in record.items()}, BITS)
