"""The methods that experiments/low_bit.py compares, as flags of train/main.py."""

import functools
from collections.abc import Callable
from typing import NamedTuple

CONFIG = "cifar10_fine_tuning"
# The grid that every method tries; `Method.rate_scale` fits it to the optimizer.
LEARNING_RATES = (0.002, 0.008, 0.032, 0.128)
# Of the three epochs, the last tenth trains with frozen clusters, where there are any, and frozen activation ranges.
_FROZEN_AT_LAST = {"freeze_epochs": 0.3}


class Method(NamedTuple):
    """A way to few weight levels.

    Attributes:
      make_trainings: Function from {layer pattern: number of weight levels} and a granularity to a list of trainings,
        which run one after the other; each is a dictionary of flags.
      rate_scale: Factor between the learning rates of the grid and those of the method's optimizer.
    """

    make_trainings: Callable[[dict[str, int], str], list[dict]]
    rate_scale: float = 1


def _join_bits(clusters):
    return ",".join(f"{name}={int(count).bit_length() - 1}" for name, count in clusters.items())


def _join_clusters(clusters):
    return ",".join(f"{name}={count}" for name, count in clusters.items())


def _make_float_trainings(clusters, granularity):
    return [{"quantize": "float"}]


def _make_clusterqat_trainings(clusters, granularity, **options):
    flags = {"quantize": "clusterqat", "number_of_clusters": _join_clusters(clusters), "granularity": granularity}
    return [flags | _FROZEN_AT_LAST | options]


def _make_lsq_trainings(clusters, granularity, **options):
    flags = {"quantize": "lsq", "weight_bits": _join_bits(clusters), "granularity": granularity}
    return [flags | _FROZEN_AT_LAST | options]


def _make_tfmot_trainings(clusters, granularity, epochs=3):
    """An epoch of clustering, and cluster-preserving quantization in the others, with AdamW.

    The second sums a centroid's gradient over its weights, with which SGD diverges at any rate that suits the other
    weights; AdamW normalizes that sum, and needs about a twentieth of the rates.
    """
    clustering = {
        "quantize": "tfmot_clustering",
        "number_of_clusters": _join_clusters(clusters),
        "granularity": granularity,
        "cluster_gradient_aggregation": "avg",
        "epochs": 1,
    }
    quantization = {"quantize": "tfmot_quantization", "epochs": epochs - 1}
    return [flags | {"optimizer": "adamw"} for flags in (clustering, quantization)]


def _start_from(ptq_method):
    """Flags of training that starts from post-training quantization, on more images than ranges alone need."""
    return {"ptq_start": ptq_method, "calibration_images": 1024}


def _make_clusterqat(**options):
    """ClusterQAT from learned codebooks."""
    return Method(functools.partial(_make_clusterqat_trainings, **_start_from("codebook_adaquant"), **options))


# Names are keys of low_bit.json and parts of file names, and stay: resting clusters are frozen ones.
METHODS = {
    "float": Method(_make_float_trainings),
    "ClusterQAT": _make_clusterqat(),
    "LSQ": Method(_make_lsq_trainings),
    "tfmot": Method(_make_tfmot_trainings, rate_scale=0.05),
    "tfmot in two epochs": Method(functools.partial(_make_tfmot_trainings, epochs=2), rate_scale=0.05),
    "ClusterQAT from k-means": Method(_make_clusterqat_trainings),
    "LSQ from AdaQuant": Method(functools.partial(_make_lsq_trainings, **_start_from("adaquant"))),
    "ClusterQAT with trained centroids": _make_clusterqat(train_centroids=True, cluster_gradient_aggregation="avg"),
    "ClusterQAT resting for an epoch": _make_clusterqat(freeze_epochs=1.0),
    "ClusterQAT, seed 1": _make_clusterqat(seed=1),
    "ClusterQAT, seed 2": _make_clusterqat(seed=2),
    **{
        f"ClusterQAT in training form, statistics {statistics}": Method(
            functools.partial(_make_clusterqat_trainings, batch_norm_statistics=statistics)
        )
        for statistics in ("frozen", "running")
    },
}
# Variants that are compared on validation data only: other starting points, and fine-tuning in training form.
VARIANTS = [name for name in METHODS if " from " in name or "training form" in name]
# Variants that might help ClusterQAT with 16 clusters per channel, where it was behind at the rate of 8 per tensor.
REMEDIES = ["ClusterQAT from k-means", "ClusterQAT with trained centroids", "ClusterQAT resting for an epoch"]
# The same training with three seeds, which together choose the rate of 16 clusters per channel.
SEEDS = ["ClusterQAT", "ClusterQAT, seed 1", "ClusterQAT, seed 2"]
