"""Tables of the benchmarks, for results/README.md."""

from collections.abc import Sequence

from harness.results.sources import ClusterStep, Inference, TrainStep
from harness.tables import make_table

_CASES = {"CIFAR model, 32x32, batch 128": "CIFAR model", "RepVGG-A0, 224x224, batch 8": "A0"}


def format_span(values: Sequence[float]) -> str:
    """The smallest and the largest of several ratios."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def make_train_step_table(source: TrainStep) -> str:
    """One row per network and model."""
    rows = [
        [
            case,
            model,
            f"{row['step_time_over_bn']:.3f}",
            "{:.3f} .. {:.3f}".format(*row["step_time_over_bn_quartiles"]),
            f"{row['peak_memory_over_bn']:.3f}",
            f"{row['step_ms_p50']:.0f}",
            f"{row['peak_memory_mib']:.0f}",
        ]
        for case, models in source.cases.items()
        for model, row in models.items()
    ]
    return make_table(rows, ["network", "model", "time / BN", "quartiles", "memory / BN", "ms", "MiB"])


def make_inference_table(source: Inference) -> str:
    """One row per file."""
    rows = [
        [row["what"], f"{row['latency_ms_p50']:.2f}", f"{row['latency_ms_p90']:.2f}", f"{row['file_bytes']:,}"]
        for row in source.files.values()
    ]
    return make_table(rows, ["file", "p50 ms", "p90 ms", "bytes"])


def make_cluster_step_table(source: ClusterStep) -> str:
    """One row per method: times over all numbers of clusters, and memory, of each network."""
    names = dict.fromkeys(name for case in source.cases.values() for rows in case["times"].values() for name in rows)
    rows = []
    for name in names:
        times = [source.times(case, name) for case in _CASES]
        memory = [source.memory(case, name) for case in _CASES]
        rows.append([name, *(format_span(values) if values else "" for values in (*times, *memory))])
    headers = [f"{quantity}, {case}" for quantity in ("time", "memory") for case in _CASES.values()]
    return make_table(rows, ["", *headers])
