"""MkDocs hooks: fill the generated parts of the documentation, and check the site that was built.

A line `<!-- generated: NAME ARGUMENT -->` in a page becomes what `GENERATORS[NAME]` returns, so that flags and tables
cannot be out of date.
"""

import concurrent.futures
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("train/main.py", "export/main.py", "export/benchmark.py")

# Packages whose public classes and functions the API reference must describe.
PUBLIC_MODULES = (
    *("layers", "models", "checkpoints", "fusion", "outliers", "tflite", "tflite.targets", "data", "report"),
    *("quantization", "quantization.qat", "quantization.qat.clustering", "quantization.ptq", "quantization.fitting"),
)

# Whatever a page loads by itself; links to follow may lead anywhere.
_ASSET = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=[\"']?https?://[^\"' >]*")
_CSS_ASSET = re.compile(r"(?:url\(|@import )[\"']?https?://[^\"')]*")
_MARKER = re.compile(r"^<!-- generated: (\w+)(?: (\S+))? -->$", re.MULTILINE)


@functools.cache
def read_flags() -> dict[str, list[dict]]:
    """{program: its flags}, as docs/list_flags.py prints them; all programs at once, since importing takes seconds."""

    def read(program):
        command = [sys.executable, "docs/list_flags.py", program]
        outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if outcome.returncode:
            raise RuntimeError(f"the flags of {program} could not be read:\n{outcome.stderr}")
        return json.loads(outcome.stdout)

    with concurrent.futures.ThreadPoolExecutor(len(PROGRAMS)) as pool:
        return dict(zip(PROGRAMS, pool.map(read, PROGRAMS), strict=True))


def tabulate_flags(program: str) -> str:
    """The flags of a program as Markdown, one table for each file that defines some of them."""
    flags = read_flags()[program]
    files = dict.fromkeys(flag["file"] for flag in flags)
    parts = []
    for file in files:
        if len(files) > 1:
            parts.append(f"Flags of `{file}`:\n")
        parts.append("| flag | default | meaning |\n|---|---|---|")
        parts += [_flag_row(flag) for flag in flags if flag["file"] == file]
        parts.append("")
    return "\n".join(parts)


def _flag_row(flag):
    default = "required" if flag["is_required"] else f"`{flag['default']}`" if flag["default"] else ""
    name = f"--[no]{flag['name']}" if flag["is_switch"] else f"--{flag['name']}"
    meaning = re.sub(r"^<[^>]*>: ", "", flag["help"])  # the choices, which absl puts in front
    meaning = meaning.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")
    if flag["choices"]:
        meaning += f" Choices: {', '.join(f'`{choice}`' for choice in flag['choices'])}."
    return f"| `{name}` | {default} | {meaning} |"


def tabulate_methods() -> str:
    """The methods of post-training quantization as a Markdown table."""
    from tf_repvgg.quantization.ptq import METHODS

    rows = ["| `--ptq` | what it does | images | learns | source |", "|---|---|---|---|---|"]
    for name, method in METHODS.items():
        images, learns = ("yes" if value else "no" for value in (method.needs_calibration, method.learns))
        source = f"[arXiv:{method.source}](https://arxiv.org/abs/{method.source})" if method.source else ""
        rows.append(f"| `{name}` | {method.summary} | {images} | {learns} | {source} |")
    return "\n".join(rows)


def tabulate_variants() -> str:
    """The networks of `tf_repvgg.models.VARIANTS` as a Markdown table."""
    from tf_repvgg.models import VARIANTS

    headers = ["variant", "family", "stem", "widths", "blocks", "groups", "branches", "squeeze-and-excite"]
    rows = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    for name, variant in VARIANTS.items():
        stem = f"{variant.stem_width}, stride {variant.stem_stride}"
        widths, depths = (", ".join(map(str, numbers)) for numbers in (variant.widths, variant.depths))
        squeeze_excite = str(variant.se_reduction or "")
        if variant.se_depths is not None:
            squeeze_excite += f" in the last {', '.join(map(str, variant.se_depths))} blocks"
        cells = [f"`{name}`", variant.family, stem, widths, depths, variant.groups, variant.conv_branches]
        rows.append(f"| {' | '.join(map(str, [*cells, squeeze_excite]))} |")
    return "\n".join(rows)


GENERATORS = {
    "flags": tabulate_flags,
    "methods": tabulate_methods,
    "variants": tabulate_variants,
}


def on_page_markdown(markdown: str, **_) -> str:
    """Called by MkDocs for every page."""

    def generate(match):
        name, argument = match.groups()
        return GENERATORS[name](*([argument] if argument else []))

    return _MARKER.sub(generate, markdown)


def on_post_build(config: dict, **_) -> None:
    """Called by MkDocs when the site is built.

    Raises:
      PluginError: If a page would load something from a network, or a public name has no entry in the API reference.
    """
    site = Path(config["site_dir"])
    for path in (*site.rglob("*.html"), *site.rglob("*.css")):
        pattern = _ASSET if path.suffix == ".html" else _CSS_ASSET
        if asset := pattern.search(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path.relative_to(site)} loads from a network: {asset[0]}")
    pages = "".join(path.read_text(encoding="utf-8") for path in site.glob("api/*.html"))
    described = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="(tf_repvgg\.[\w.]+)"', pages)}
    if missing := sorted(public_names() - described):
        raise PluginError(f"the API reference does not describe {', '.join(missing)}; add them in docs/api/")


def public_names() -> set[str]:
    """Names of the public classes and functions of `PUBLIC_MODULES`, without those of tfmot that they pass on."""
    names = set()
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(f"tf_repvgg.{module_name}")
        for name in getattr(module, "__all__", None) or _own_names(module):
            value = getattr(module, name)
            is_own = getattr(value, "__module__", "").startswith("tf_repvgg")
            if is_own and (inspect.isclass(value) or inspect.isfunction(value)):
                names.add(name)
    return names


def _own_names(module):
    defined = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    return [name for name in defined if not name.startswith("_")]
