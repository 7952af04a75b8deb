"""The packages of tf_repvgg and their imports, read from the source: python docs/figures/architecture.py"""

import ast
import functools
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / "docs" / "images" / "architecture.svg"
PACKAGE = "tf_repvgg"
# Packages drawn apart from the package around them.
WINGS = ("quantization.fitting", "quantization.ptq", "quantization.qat", "tflite.targets")
PROGRAMS = ("train/", "export/", "experiments/", "benchmarks/")

WIDTH, ROW, BOX_HEIGHT, MARGIN = 900, 92, 40, 20
# Fill and border.
BLUE, GREEN = ("#dfe8f3", "#3b6ea5"), ("#dcebdf", "#3d8f5f")
ORANGE, GREY = ("#f6e7d8", "#b5793a"), ("#eeeeee", "#8a8a8a")

Arrows = Mapping[str, set[str]]


def find_arrows() -> dict[str, set[str]]:
    """{package: the packages whose modules it imports}, without imports for type checkers and __init__.py itself."""
    modules = {_module_name(path): path for path in (ROOT / PACKAGE).rglob("*.py")}
    arrows: dict[str, set[str]] = {}
    for name, path in modules.items():
        if name == PACKAGE:
            continue
        source = _package_of(name)
        arrows.setdefault(source, set())
        for imported in _imports(ast.parse(path.read_text(encoding="utf-8")), modules):
            target = _package_of(imported)
            if target not in (source, ""):
                arrows[source].add(target)
    return arrows


def _module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _package_of(module):
    inner = module.removeprefix(f"{PACKAGE}.") if module != PACKAGE else ""
    return next((wing for wing in WINGS if f"{inner}.".startswith(f"{wing}.")), inner.split(".")[0])


def _imports(node, modules):
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in modules else node.module
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, modules)


def reduce_arrows(arrows: Arrows) -> dict[str, set[str]]:
    """The arrows that do not follow from others: A -> C goes where A -> B -> C is there.

    Raises:
      ValueError: If arrows form a circle; names a package in it.
    """

    @functools.cache
    def reachable(name):
        below = set(arrows[name])
        for target in arrows[name]:
            below |= reachable(target)
        return below

    try:
        indirect = {name: set().union(*(reachable(target) for target in arrows[name])) for name in arrows}
    except RecursionError:
        raise ValueError("imports between packages form a circle") from None
    return {name: arrows[name] - indirect[name] for name in arrows}


def place_packages(arrows: Arrows) -> dict[str, tuple[float, int]]:
    """{package: (x, level)}: a package is one level above the highest one that it imports."""

    @functools.cache
    def level(name):
        return 1 + max((level(target) for target in arrows[name]), default=-1)

    rows: dict[int, list[str]] = {}
    for name in sorted(arrows):
        rows.setdefault(level(name), []).append(name)
    places: dict[str, tuple[float, int]] = {}
    for height in sorted(rows):
        below = {name: [places[target][0] for target in arrows[name]] for name in rows[height]}
        ordered = sorted(rows[height], key=lambda name: sum(below[name]) / len(below[name]) if below[name] else 0)
        for index, name in enumerate(ordered):
            places[name] = (WIDTH * (index + 0.5) / len(ordered), height)
    return places


def render() -> str:
    """The picture as SVG."""
    every_arrow = find_arrows()
    ground = sorted(name for name in every_arrow if not every_arrow[name])
    arrows = {name: every_arrow[name] - set(ground) for name in every_arrow if name not in ground}
    reduced, places = reduce_arrows(arrows), place_packages(arrows)
    top = max(level for _, level in places.values())
    bottom = (top + 2) * ROW + MARGIN

    def y(level):
        return (top + 1 - level) * ROW + MARGIN

    height = bottom + BOX_HEIGHT + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="15">',
        "<title>Packages of tf_repvgg: an arrow points to what is imported</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#55606e"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *draw_box(WIDTH / 2, MARGIN, WIDTH - 2 * MARGIN, "   ".join(PROGRAMS), *ORANGE),
        _note(MARGIN + BOX_HEIGHT + 20, "programs import the library; nothing in the library imports a program"),
        _note(bottom - 12, "modules that import nothing of the package, and that any package may import:"),
        *draw_box(WIDTH / 2, bottom, WIDTH - 2 * MARGIN, "   ".join(ground), *GREY),
    ]
    for name, targets in sorted(reduced.items()):
        for target in sorted(targets):
            (x1, level1), (x2, level2) = places[name], places[target]
            y1, y2 = y(level1) + BOX_HEIGHT, y(level2) - 2
            parts.append(
                f'<path d="M{x1:.0f} {y1} C{x1:.0f} {y1 + 40} {x2:.0f} {y2 - 40} {x2:.0f} {y2}" fill="none" '
                'stroke="#55606e" stroke-width="1.2" marker-end="url(#tip)"/>'
            )
    for name, (x, level) in sorted(places.items()):
        parts += draw_box(x, y(level), max(70, 9 * len(name) + 16), name, *(GREEN if "." in name else BLUE))
    return "\n".join([*parts, "</svg>", ""])


def _note(y, text):
    return f'<text x="{WIDTH / 2}" y="{y}" text-anchor="middle" font-size="13" fill="#55606e">{text}</text>'


def draw_box(x, y, width, text, fill, stroke):
    return (
        f'<rect x="{x - width / 2:.0f}" y="{y}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="6" fill="{fill}" '
        f'stroke="{stroke}"/>',
        f'<text x="{x:.0f}" y="{y + BOX_HEIGHT / 2 + 5:.0f}" text-anchor="middle" xml:space="preserve">{text}</text>',
    )


if __name__ == "__main__":
    IMAGE.write_text(render(), encoding="utf-8")
    print(IMAGE.relative_to(ROOT))
