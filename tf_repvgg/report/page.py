"""The page of a report: figures and tables put into `page.html`."""

from collections.abc import Sequence

import jinja2
import markupsafe

from tf_repvgg import outliers
from tf_repvgg.report import figures
from tf_repvgg.report.records import CHANGES, File, Run, choose_featured
from tf_repvgg.version import __version__

_LARGEST_CONFUSION = 20
_LARGEST_BARS = 12
# Flags that describe the network and its training; all others are one click away.
_SHOWN_SETTINGS = (
    *("variant", "block", "norm", "oabn_k", "identity", "epochs", "batch_size", "optimizer", "learning_rate"),
    *("weight_decay", "merged_weight_decay", "label_smoothing", "init_from", "quantize", "number_of_clusters", "seed"),
)
# {key of a target's entry in export.json: heading of its column}.
_TARGET_COLUMNS = {
    "top1_percent": "top-1 %",
    "equal_to_int8_file_on_same_kernels_percent": "outputs equal to int8 file %",
    "file_bytes": "file bytes",
    "file_over_bound": "file / bound",
    "weight_bytes": "weight bytes",
    "encoded_weight_bytes": "encoded weight bytes",
    "encoded_over_raw": "encoded / raw",
    "parameter_bytes": "parameter bytes",
    "arena_bytes": "arena bytes",
    "sram_bytes": "SRAM bytes",
    "flash_bytes": "flash bytes",
    "npu_operators": "operators on NPU",
    "mapped_operators": "operators on Edge TPU",
    "cpu_operators": "operators on CPU",
    "latency_ms_p50": "median ms",
    "inference_ms_estimated": "estimated ms",
}


def render(runs: Sequence[Run]) -> str:
    """Renders the whole page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tf_repvgg", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": _format_number, "svg": markupsafe.Markup}
    name = choose_featured(runs)
    detailed = [run for run in runs if name in run.predictions]
    series = {file.series for run in runs for file in run.files}
    layers = max(len(run.exports[0]["outliers"]) for run in runs)
    return environment.get_template("page.html").render(
        version=__version__,
        runs=runs,
        first=runs[0],
        featured=max((run.find_file(name) for run in detailed), key=lambda file: file.top1),
        settings=_tabulate_settings(runs),
        accuracy=figures.draw_accuracy_by_bits(runs, height=_height_with_legend(len(series))),
        training=figures.draw_training(runs) if any(run.epochs for run in runs) else None,
        histograms=_draw_histograms(runs),
        outliers=figures.draw_outliers(runs, height=1.2 + 0.22 * layers),
        sizes=figures.draw_size_and_accuracy(runs, height=_height_with_legend(2 * len(runs) + 1)),
        latencies=_draw_latencies(runs, name),
        fit_curves=_draw_fit_curves(runs),
        details=[_describe_predictions(run, run.find_file(name)) for run in detailed],
        targets=_tabulate_targets(runs),
        extreme_factor=outliers.EXTREME_FACTOR,
        machine=runs[0].exports[0]["machine"],
    )


def _format_number(value, digits=2):
    """A number as a table shows it; a dash for a missing one."""
    if value is None or value == "":
        return "\N{EN DASH}"
    return f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"


def _tabulate_settings(runs):
    """Rows (name, value of each run) of how the runs were trained, without those that are empty for every run."""
    rows = [("dataset", [run.exports[0]["input"]["dataset"] for run in runs])]
    rows += [(name, [_read_setting(run, name) for run in runs]) for name in _SHOWN_SETTINGS]
    rows += [
        ("training time, s", [_format_number(run.result.get("training_seconds"), 0) for run in runs]),
        ("top-1 before quantization, %", [_format_number(run.reference_top1) for run in runs]),
    ]
    return [(name, values) for name, values in rows if any(values)]


def _read_setting(run, name):
    """A flag's value; empty where the flag has no effect on the run."""
    value = run.settings.get(name, "")
    return "" if value == "0.0" else value


def _draw_histograms(runs):
    """Figures layer by layer, the runs beside each other where they have the layer."""
    layers = list(dict.fromkeys(histogram.layer for run in runs for histogram in run.histograms))
    return [
        figures.draw_weights(histogram, ", ".join(filter(None, [run.title, layer])), height=2.5)
        for layer in layers
        for run in runs
        for histogram in run.histograms
        if histogram.layer == layer
    ]


def _draw_latencies(runs, name):
    """Figures of measured latencies and of Vela's estimates, for all files; if they are many, for one of each run."""
    files = [file for run in runs for file in run.files]
    if len(files) > _LARGEST_BARS:
        files = [file for file in files if file.name == name]
    measured = [(file.full_label, file.record["latency_ms_p50"], file.record["latency_ms_p90"]) for file in files]
    estimated = []
    for file in files:
        for target, entry in file.record["targets"].items():
            label = f"{file.full_label}, {target}"
            if "latency_ms_p50" in entry:
                measured.append((label, entry["latency_ms_p50"], entry["latency_ms_p90"]))
            if "inference_ms_estimated" in entry:
                estimated.append((label, entry["inference_ms_estimated"], entry["inference_ms_estimated"]))
    threads = files[0].record["latency_threads"]
    titles = {f"LiteRT, {threads} thread{'s' * (threads > 1)}": measured, "Ethos-U, estimated by Vela": estimated}
    return [figures.draw_latency(bars, title, height=0.9 + 0.38 * len(bars)) for title, bars in titles.items() if bars]


def _draw_fit_curves(runs):
    """[(title of a run, figure)] of the exports that have measured budgets."""
    curves = [(run.title, export["fit_curve"]) for run in runs for export in run.exports if "fit_curve" in export]
    return [(title, figures.draw_fit_curve(curve, height=_height_with_legend(3))) for title, curve in curves]


def _height_with_legend(entries):
    """Height in inches of a figure with a legend of this number of entries, two in a row."""
    return 2.7 + 0.18 * ((entries + 1) // 2)


def _tabulate_targets(runs):
    """{target: (headings, rows of (file, values))} of the results of other runtimes."""
    entries: dict[str, list] = {}
    for run in runs:
        for file in run.files:
            for target, entry in file.record["targets"].items():
                if target != "litert_int8":  # the file itself
                    entries.setdefault(target, []).append((file.full_label, entry))
    tables = {}
    for target, rows in entries.items():
        keys = [key for key in _TARGET_COLUMNS if any(key in entry for _, entry in rows)]
        values = [(label, [entry.get(key) for key in keys]) for label, entry in rows]
        tables[target] = [_TARGET_COLUMNS[key] for key in keys], values
    return tables


def _describe_predictions(run: Run, file: File):
    """What the page shows of the predictions of one file."""
    counts = run.confusion(file.name)
    is_small = len(run.labels) <= _LARGEST_CONFUSION
    errors = [
        (int(counts[truth, prediction]), run.labels[truth], run.labels[prediction])
        for truth, prediction in zip(*counts.nonzero(), strict=True)
        if truth != prediction
    ]
    title = file.full_label
    return {
        "title": title,
        "confusion": figures.draw_confusion(counts, run.labels, title, height=4.4) if is_small else None,
        "errors": sorted(errors, reverse=True)[:10],
        "changes": {CHANGES[change]: len(indices) for change, indices in run.changes(file.name).items()},
        "examples": run.pick_examples(file.name),
        "total": len(run.truth),
    }
