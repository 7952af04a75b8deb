"""Narrow networks whose weights and logits come from PyTorch: see tests/reference/make_torch_references.py."""

import functools
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tf_repvgg.models import Variant, build_network

FOLDER = Path(__file__).resolve().parents[1] / "reference" / "torch"

_PLAIN = Variant(8, widths=(8, 16), depths=(2, 1), strides=(2, 2), groups=2)
_WITH_SE = Variant(16, widths=(16, 32), depths=(2, 1), strides=(2, 2), se_reduction=16)
_MOBILEONE = Variant(
    16, (16, 32), (2, 1), strides=(2, 2), conv_branches=2, se_reduction=16, se_depths=(0, 1), family="mobileone"
)

# {name of a reference: its variant, its block, its layout in deploy form}
REFERENCES = {
    "repvgg": (_PLAIN, "repvgg", "repvgg"),
    "repvgg_se": (_WITH_SE, "repvgg", "repvgg"),
    "qarepvgg": (_PLAIN, "qarepvgg", "repvgg"),
    "timm_repvgg": (_PLAIN, "repvgg", "timm_repvgg"),
    "timm_repvgg_se": (_WITH_SE, "repvgg", "timm_repvgg"),
    "mobileone": (_MOBILEONE, "mobileone", "mobileone"),
    "timm_mobileone": (_MOBILEONE, "mobileone", "timm_mobileone"),
}


def build(name, num_classes=5, shape=(None, None, 3), **options):
    """A model in training form for the weights of a reference, with random ones."""
    variant, block, _ = REFERENCES[name]
    return build_network(variant, shape, num_classes, block=block, **{"padding": "symmetric"} | options)


def path_of(name, form="training"):
    return FOLDER / f"{name}_{form}.safetensors"


@functools.cache
def read_results():
    return load_file(FOLDER / "results.safetensors")


def measure_difference(name, form, model):
    """Largest difference of a logit from PyTorch's, relative to the largest logit, over both images."""
    differences = []
    for number in range(2):
        images = read_results()[f"images_{number}"].transpose(0, 2, 3, 1)
        expected = read_results()[f"{name}_{form}_{number}"]
        actual = model(images, training=False).numpy()
        differences.append(np.abs(actual - expected).max() / np.abs(expected).max())
    return max(differences)
