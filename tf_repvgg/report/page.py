"""A report's page: figures and tables put into `page.html`."""

import jinja2
import markupsafe

from tf_repvgg.report import figures
from tf_repvgg.report.gather import File, Run, featured
from tf_repvgg.version import __version__

_LARGEST_CONFUSION = 20
_LARGEST_BARS = 12
# Flags that say what kind of network it is and how it was trained; all the others are one click away.
_TOLD_SETTINGS = (
    *("variant", "block", "norm", "oabn_k", "identity", "epochs", "batch_size", "optimizer", "learning_rate"),
    *("weight_decay", "merged_weight_decay", "label_smoothing", "init_from", "quantize", "number_of_clusters", "seed"),
)
# Of what a target says; the rest is in export.json.
_TARGET_FACTS = {
    "top1_percent": "top-1 %",
    "equal_to_int8_file_on_same_kernels_percent": "equal to int8 file %",
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


def render(runs: list[Run]) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tf_repvgg", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": _number, "svg": markupsafe.Markup}
    name = featured(runs)
    detailed = [run for run in runs if name in run.found]
    return environment.get_template("page.html").render(
        version=__version__,
        runs=runs,
        first=runs[0],
        featured=max((run.file(name) for run in detailed), key=lambda file: file.top1),
        settings=_settings(runs),
        accuracy=figures.accuracy_by_bits(
            runs, height=_height(len({file.series for run in runs for file in run.files}))
        ),
        training=figures.training(runs) if any(run.epochs for run in runs) else None,
        histograms=_histograms(runs),
        outliers=figures.outliers(runs, height=1.2 + 0.22 * max(len(run.exports[0]["outliers"]) for run in runs)),
        sizes=figures.size_and_accuracy(runs, height=_height(2 * len(runs) + 1)),
        latencies=_latencies(runs, name),
        details=[_detail(run, run.file(name)) for run in detailed],
        targets=_targets(runs),
        machine=runs[0].exports[0]["machine"],
    )


def _number(value, digits=2):
    """A number as a table shows it; a dash where there is none."""
    if value is None or value == "":
        return "\N{EN DASH}"
    return f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"


def _settings(runs):
    """Rows (name, value of each run) of how the runs were trained, without those that none has."""
    rows = [("dataset", [run.exports[0]["input"]["dataset"] for run in runs])]
    rows += [(name, [_setting(run, name) for run in runs]) for name in _TOLD_SETTINGS]
    rows += [
        ("training time, s", [_number(run.result.get("training_seconds"), 0) for run in runs]),
        ("top-1 before quantization, %", [_number(run.reference_top1) for run in runs]),
    ]
    return [(name, values) for name, values in rows if any(values)]


def _setting(run, name):
    """A flag's value; empty where it means nothing for the run."""
    value = run.settings.get(name, "")
    return "" if value == "0.0" else value


def _histograms(runs):
    """Figures layer by layer, the runs beside each other where they have the layer."""
    layers = list(dict.fromkeys(histogram.layer for run in runs for histogram in run.histograms))
    return [
        figures.weights(histogram, ", ".join(filter(None, [run.title, layer])), height=2.5)
        for layer in layers
        for run in runs
        for histogram in run.histograms
        if histogram.layer == layer
    ]


def _latencies(runs: list[Run], name):
    """Figures of what was timed, and of what Vela estimates: all files, or those shown in detail if they are many."""
    files = [file for run in runs for file in run.files]
    if len(files) > _LARGEST_BARS:
        files = [file for file in files if file.name == name]
    timed = [(_label(file), file.record["latency_ms_p50"], file.record["latency_ms_p90"]) for file in files]
    for file in files:
        for target, facts in file.record["targets"].items():
            if "latency_ms_p50" in facts:
                timed.append((f"{_label(file)}, {target}", facts["latency_ms_p50"], facts["latency_ms_p90"]))
    record = files[0].record
    title = f"LiteRT, {record['latency_threads']} thread{'s' * (record['latency_threads'] > 1)}"
    found = [figures.latency(timed, title, height=_bars_height(timed))]
    estimated = [
        (f"{_label(file)}, {target}", facts["inference_ms_estimated"], facts["inference_ms_estimated"])
        for file in files
        for target, facts in file.record["targets"].items()
        if "inference_ms_estimated" in facts
    ]
    if estimated:
        found.append(figures.latency(estimated, "Ethos-U, estimated by Vela", height=_bars_height(estimated)))
    return found


def _height(entries):
    """Inches of a figure whose legend has so many entries, two in a row."""
    return 2.7 + 0.18 * ((entries + 1) // 2)


def _targets(runs):
    """{target: (headings, rows of (file, values))} of what other runtimes make of the files."""
    found = {}
    for run in runs:
        for file in run.files:
            for target, facts in file.record["targets"].items():
                if target != "litert_int8":  # the file itself
                    found.setdefault(target, []).append((_label(file), facts))
    tables = {}
    for target, rows in found.items():
        keys = [key for key in _TARGET_FACTS if any(key in facts for _, facts in rows)]
        values = [(label, [facts.get(key) for key in keys]) for label, facts in rows]
        tables[target] = [_TARGET_FACTS[key] for key in keys], values
    return tables


def _bars_height(bars):
    return 0.9 + 0.38 * len(bars)


def _label(file: File):
    return ", ".join(filter(None, [file.run, file.label]))


def _detail(run: Run, file: File):
    """What the page shows of single images in one file."""
    counts, title = run.confusion(file.name), _label(file)
    is_small = len(run.labels) <= _LARGEST_CONFUSION
    wrong = [
        (int(counts[truth, found]), run.labels[truth], run.labels[found])
        for truth, found in zip(*counts.nonzero(), strict=True)
        if truth != found
    ]
    return {
        "title": title,
        "confusion": figures.confusion(counts, run.labels, title, height=4.4) if is_small else None,
        "confused": sorted(wrong, reverse=True)[:10],
        "changed": {kind: len(indices) for kind, indices in run.changed(file.name).items()},
        "images": run.changed_images(file.name),
        "total": len(run.truth),
    }
