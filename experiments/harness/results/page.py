"""results/README.md: the questions that have been measured, with their answers."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2

from harness.any_model import page as any_model_page
from harness.commands import CHECKPOINTS
from harness.fit import page as fit_page
from harness.low_bit import page as low_bit_page
from harness.mobileone import page as mobileone_page
from harness.oabn_limit import clip_page, codebook_page
from harness.pages import int8_collapse as int8_collapse_page
from harness.pages import min_max as min_max_page
from harness.pages import mobileone_cifar as mobileone_cifar_page
from harness.pages import recipes as recipes_page
from harness.pages import targets as targets_page
from harness.ptq import page as ptq_page
from harness.reliability import page as reliability_page
from harness.results import cost_tables, headline, sources
from harness.results.fit_source import Fit
from harness.results.mobileone_source import MobileOneCifar, MobileOneImageNet
from harness.tables import make_bits_table, wrap_page

_TEMPLATE = "page.md.jinja"
_CONTENTS = "[contents]"
_DEMO_BITS = (8, 7, 6, 5, 4, 3)
_OABN = "cifar10_oabn"


class OutdatedSentence(ValueError):
    """A sentence of the template does not follow from the results any more."""


def render(results: Mapping[str, dict], folder: Path) -> str:
    """The page in Markdown.

    Args:
      results: Contents of the JSON files in results/ by name.
      folder: The folder results/, for the fine-tunings in low_bit/.

    Raises:
      OutdatedSentence: If a sentence of the template does not follow from the results.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        extensions=["jinja2.ext.do"],
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        autoescape=False,
    )
    for decimals in range(4):
        environment.filters[f"f{decimals}"] = _make_format(decimals)
    environment.filters |= {"span": cost_tables.format_span, "pair": _join_pair, "thousands": "{:,}".format}
    text = environment.get_template(_TEMPLATE).render(
        require=_require, tables=_make_tables(results), **_make_sources(results, folder)
    )
    text = wrap_page(re.sub(r"\n{3,}", "\n\n", text).strip())
    return text.replace(_CONTENTS, _list_contents(text))


def _make_sources(results, folder):
    min_max = sources.Exports(results["min_max"])
    seed1 = sources.read_json(CHECKPOINTS / "cifar10_oabn_seed1" / "result.json")
    return {
        "contents": _CONTENTS,
        "headline_table": headline.make_headline_table(results),
        "headline_note": headline.make_note(results),
        "min_max": min_max,
        "images": min_max.images,
        "blocks": len(min_max.exports["OABN"]["outliers"]) - 1,  # the classifier is the other layer
        "standard_error": sources.estimate_standard_error(min_max.fp32("OABN"), min_max.images),
        "seed1": {
            "minutes": seed1["training_seconds"] / 60,
            "top1": seed1["top1_percent"],
            "machine": sources.name_machines([seed1["machine"]]),
        },
        "collapse": sources.Int8Collapse(results["int8_collapse"]),
        "clip_limit": results["clip_limit"] | {"machine": sources.name_machines([results["clip_limit"]["machine"]])},
        "ptq": sources.Ptq(results["ptq"]),
        "any_model": sources.AnyModel(results["any_model"]),
        "reliability": sources.Reliability(results["reliability"]),
        "ptq_methods": headline.count_ptq_methods(results["ptq"]),
        "targets": sources.Targets(results["targets"]),
        "imagenet": MobileOneImageNet(results["mobileone"]),
        "fit": Fit(results["fit"]),
        "mobileone_cifar": MobileOneCifar(results["mobileone_cifar"]),
        "low_bit": sources.LowBit(results["low_bit"], folder / "low_bit"),
        "codebook_limit": sources.CodebookLimit(results["codebook_limit"]),
        "recipes": sources.Recipes(results["recipes"]),
        "demo": sources.Exports(results["demo"]["models"]),
        "demo_seconds": results["demo"]["seconds"],
        "train_step": sources.TrainStep(results["train_step"]),
        "inference": sources.Inference(results["inference"]),
        "cluster_step": sources.ClusterStep(results["cluster_step"]),
        "adaquant_time": results["adaquant_time"]
        | {"machine": sources.name_machines([results["adaquant_time"]["machine"]])},
    }


def _make_tables(results):
    low_bit = sources.LowBit(results["low_bit"], Path())
    models = results["ptq"]["models"]
    learned = ("ClusterQAT, 8 states, per tensor, distilled", "ClusterQAT, 4 states, per tensor, distilled")
    k_means = ("ClusterQAT from k-means, 8 states", "ClusterQAT from k-means, 4 states")
    validation = {
        "starts": (*learned, *k_means, "LSQ"),
        "teacher": ("ClusterQAT, 8 states, per tensor",),
        "remedies": tuple(label for label in low_bit.validation_top1 if "16 states, per channel" in label),
        "forms": (*k_means, "ClusterQAT in training form"),
    }
    return {
        "min_max": min_max_page.make_models_table(results["min_max"]),
        "int8_collapse": int8_collapse_page.make_accuracy_table(results["int8_collapse"]["models"]),
        "clip_limit": clip_page.make_limit_table(results["clip_limit"]),
        "ptq_methods": ptq_page.make_methods_table(models[_OABN]),
        "ptq_best": ptq_page.make_best_table(models),
        "toolkits": ptq_page.make_toolkits_table(models),
        "any_model": any_model_page.make_outcomes_table(results["any_model"]["random"]),
        "networks": any_model_page.make_applications_table(results["any_model"]["applications"]["networks"]),
        "reliability": reliability_page.make_total_table(results["reliability"]),
        "targets": targets_page.make_runtimes_table(results["targets"]),
        "imagenet": mobileone_page.make_methods_table(results["mobileone"]["rows"]),
        "fit": fit_page.make_tables(results["fit"], "tflm_lut"),
        "mobileone_cifar": mobileone_cifar_page.make_models_table(results["mobileone_cifar"]),
        "mobileone_weights": mobileone_cifar_page.make_weights_table(results["mobileone_cifar"]),
        "lead": low_bit_page.make_lead_table(results["low_bit"]["peers"]),
        **{part: low_bit_page.make_rows_table(results["low_bit"][part]) for part in ("headline", "edges", "others")},
        **{
            name: low_bit_page.make_rates_table(low_bit.pick_validation(*starts)) for name, starts in validation.items()
        },
        "codebook_limit": codebook_page.make_codebook_table(results["codebook_limit"]),
        "recipes": recipes_page.make_recipes_table(results["recipes"]),
        "demo": make_bits_table(sources.Exports(results["demo"]["models"]).exports, _DEMO_BITS),
        "train_step": cost_tables.make_train_step_table(sources.TrainStep(results["train_step"])),
        "inference": cost_tables.make_inference_table(sources.Inference(results["inference"])),
        "cluster_step": cost_tables.make_cluster_step_table(sources.ClusterStep(results["cluster_step"])),
    }


def _require(condition):
    if not condition:
        raise OutdatedSentence(
            f"a sentence of {_TEMPLATE} does not follow from the results; the traceback names the line"
        )


def _make_format(decimals):
    return lambda value: f"{value:.{decimals}f}"


def _join_pair(values: Iterable[float], decimals=1):
    return " / ".join(f"{value:.{decimals}f}" for value in values)


def _list_contents(text):
    """Links to all questions, under their parts."""
    lines = []
    for level, title in re.findall(r"^(##+) (.+)$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        lines.append(f"{'  ' * (len(level) - 2)}- [{title}](#{anchor})")
    return "\n".join(lines)
