"""The page of experiments/int8_collapse.py."""

from collections.abc import Mapping

import numpy as np

from harness.tables import IMAGES, make_paragraph, make_table
from tf_repvgg.quantization.uniform import GRANULARITIES

# Flags that shorten the training of the configs.
SCHEDULE = ("epochs", "steps_per_epoch")
_SUMMARY_HEADERS = (
    "model",
    "largest variance",
    "channels below one step",
    "running variances below epsilon",
    "smallest",
    "gamma/sigma",
    "weight outlier",
)


def render(record: dict) -> str:
    """The page in Markdown, from the content of int8_collapse.json."""
    models = record["models"]
    changes = (f"--{name}={record[name]}" for name in SCHEDULE if record[name])
    command = " ".join(["python experiments/int8_collapse.py", *changes])
    introduction = make_paragraph(
        f"""`{command}`: A0's 22 layers on 45,000 images of CIFAR-10 by the published recipe
        (configs/cifar10_a0_*.flags: weight decay on, BN epsilon 1e-5), one seed; top-1 in percent on
        {models["BN"]["test_images"]:,} test images, in LiteRT; weights by min-max, int8 activations. "Change" is
        against FP32, in points; "weights alone" is the change with int8 weights and float activations, so that the
        rest of the change is due to activations. The literature reports a fall from 72 to 52 for A0 on ImageNet.
        {IMAGES}"""
    )
    explanation = make_paragraph(
        f"""What might explain a fall. Over the layers: the largest variance of a channel before the activation, on
        {record["activation_images"]:,} held-out images; the mean share of channels whose standard deviation is below
        one int8 step of their layer; the mean share of the running variances of the batch normalizations that are
        below epsilon (1e-5), and the smallest of them; the largest |gamma| / sqrt(variance + epsilon) in force; the
        largest merged weight over the standard deviation of its layer."""
    )
    return "\n\n".join(
        [
            "# 8 bits and RepVGG-A0 at CIFAR resolution",
            introduction,
            make_accuracy_table(models),
            explanation,
            make_summary_table(models),
            "Variance of the fused network's pre-activations, mean over channels:",
            make_layer_table(models, "variance_mean", "{:.3g}"),
            "Share of running variances below epsilon:",
            make_layer_table(models, "running_variances_below_epsilon_share", "{:.3f}"),
        ]
    )


def make_accuracy_table(models: Mapping[str, dict]) -> str:
    """One row per model: float and int8 top-1, and the changes in points."""

    def make_row(name, model):
        full, weights = model["int8_top1_percent"], model["int8_weights_float_activations_top1_percent"]
        changes = [f"{top1[kind] - model['float_top1_percent']:+.2f}" for top1 in (full, weights) for kind in full]
        integer = [f"{full[kind]:.2f}" for kind in GRANULARITIES]
        return [name, f"{model['float_top1_percent']:.2f}", *integer, *changes]

    headers = [
        "model",
        "FP32",
        *(f"int8 {kind}" for kind in GRANULARITIES.values()),
        *(f"change, {kind}" for kind in GRANULARITIES.values()),
        *(f"weights alone, {kind}" for kind in GRANULARITIES.values()),
    ]
    return make_table([make_row(name, model) for name, model in models.items()], headers)


def make_layer_table(models: Mapping[str, dict], key: str, form: str) -> str:
    """One row per layer, one column per model."""
    layers = next(iter(models.values()))["layers"]
    rows = [[layer, *(form.format(model["layers"][layer][key]) for model in models.values())] for layer in layers]
    return make_table(rows, ["layer", *models])


def make_summary_table(models: Mapping[str, dict]) -> str:
    """One row per model: what might explain a fall."""

    def make_row(name, model):
        layers = model["layers"]
        worst = find_layer_of_largest_variance(model)
        columns = {key: [layer[key] for layer in layers.values()] for key in layers[worst]}
        return [
            name,
            f"{layers[worst]['variance_largest']:.3g} ({worst})",
            f"{100 * np.mean(columns['channels_below_one_step_share']):.1f} %",
            f"{100 * np.mean(columns['running_variances_below_epsilon_share']):.1f} %",
            f"{min(columns['smallest_running_variance']):.2g}",
            f"{max(columns['gamma_over_sigma_largest']):.3g}",
            f"{max(columns['outlier_ratio']):.0f}",
        ]

    return make_table([make_row(name, model) for name, model in models.items()], _SUMMARY_HEADERS)


def find_layer_of_largest_variance(model: dict) -> str:
    """Name of the layer with the largest variance of a channel before the activation."""
    layers = model["layers"]
    return max(layers, key=lambda layer: layers[layer]["variance_largest"])
