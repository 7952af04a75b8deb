"""How data flow from a dataset to the files of each runtime: python docs/figures/data_flow.py"""

from architecture import BLUE, BOX_HEIGHT, GREEN, GREY, ORANGE, ROOT, draw_box

IMAGE = ROOT / "docs" / "images" / "data_flow.svg"
WIDTH, HEIGHT = 900, 560
BOXES = {  # name: (x, y, width, text, colours)
    "dataset": (95, 20, 150, "TFDS set or folder", GREY),
    "pipeline": (285, 20, 150, "tf.data pipeline", BLUE),
    "training": (505, 20, 210, "training form: BN or OABN", BLUE),
    "fusion": (785, 20, 190, "fuse: plain 3x3 convs", GREEN),
    "min_max": (110, 150, 180, "min-max calibration", BLUE),
    "ptq": (330, 150, 180, "PTQ: mse, adaquant, …", BLUE),
    "qat": (560, 150, 200, "QAT: LSQ, tfmot", BLUE),
    "clusterqat": (790, 150, 180, "ClusterQAT", BLUE),
    "quantized": (450, 265, 860, "quantized Keras model: codes, scales, activation ranges", GREEN),
    "file": (450, 365, 420, "integer .tflite file, code for code", GREEN),
    "int8": (110, 470, 180, "LiteRT int8", ORANGE),
    "int4": (290, 470, 140, "LiteRT int4", ORANGE),
    "lut": (470, 470, 180, "TFLite Micro tables", ORANGE),
    "ethos": (655, 470, 150, "Arm Ethos-U", ORANGE),
    "edge_tpu": (810, 470, 140, "Edge TPU check", ORANGE),
}
ACROSS = [("dataset", "pipeline"), ("pipeline", "training"), ("training", "fusion")]
DOWN = [
    *(("fusion", name) for name in ("min_max", "ptq", "qat", "clusterqat")),
    *((name, "quantized") for name in ("min_max", "ptq", "qat", "clusterqat")),
    ("quantized", "file"),
    *(("file", name) for name in ("int8", "int4", "lut", "ethos", "edge_tpu")),
]


def render() -> str:
    """The picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="14">',
        "<title>From a dataset to the files of each runtime</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#55606e"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for source, target in ACROSS:
        (x1, y, width1, *_), (x2, _, width2, *_) = BOXES[source], BOXES[target]
        start, end, height = x1 + width1 / 2, x2 - width2 / 2 - 2, y + BOX_HEIGHT / 2
        parts.append(_arrow(f"M{start:.0f} {height:.0f} L{end:.0f} {height:.0f}"))
    for source, target in DOWN:
        (x1, y1, *_), (x2, y2, width2, *_) = BOXES[source], BOXES[target]
        y1, y2 = y1 + BOX_HEIGHT, y2 - 2
        # An arrow into a wide box goes straight down where it can.
        half = width2 / 2 - 12
        end = min(max(x1, x2 - half), x2 + half)
        parts.append(_arrow(f"M{x1:.0f} {y1} C{x1:.0f} {y1 + 40} {end:.0f} {y2 - 40} {end:.0f} {y2}"))
    for x, y, width, text, colours in BOXES.values():
        parts += draw_box(x, y, width, text, *colours)
    checks = "measured on every file: accuracy, agreement with the Keras model, latency, size, layers -> export.json"
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle" fill="#55606e">{checks}</text>')
    return "\n".join([*parts, "</svg>", ""]).replace("->", "→")


def _arrow(path):
    return f'<path d="{path}" fill="none" stroke="#55606e" stroke-width="1.2" marker-end="url(#tip)"/>'


if __name__ == "__main__":
    IMAGE.write_text(render(), encoding="utf-8")
    print(IMAGE.relative_to(ROOT))
