"""The page that export/main.py --report writes: complete, self-contained, and well laid out in a browser."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import tf_keras as keras
from helpers.networks import random_images, small_repvgg

from tf_repvgg import report, runs, tflite
from tf_repvgg.layers import RepVGGBlock
from tf_repvgg.quantization import ptq
from tf_repvgg.report.histograms import make_histograms
from tf_repvgg.report.records import find_pareto_front

SECTIONS = ("training", "accuracy", "weights", "cost", "layers", "images", "targets")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(html.parser.HTMLParser):
    """Every start tag and its attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def find_all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def exported(run_forked, trained_digits, digits, tmp_path_factory):
    """The folder of an export with a report: 8 and 3 bits, and TFLite Micro."""
    run = tmp_path_factory.mktemp("report") / "run"
    run.mkdir()
    trained_digits.save(run / runs.MODEL_NAME)
    (run / runs.INPUT_NAME).write_text(json.dumps(digits.metadata()))
    (run / runs.CONFIG_NAME).write_text("--variant=digits\n--norm=oabn\n--oabn_k=0.1\n--novalidation\n")
    epochs = [
        {"epoch": number, "seconds": 1.0, "loss": 1 / number, "top1_percent": 90 + number} for number in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    (run / "result.json").write_text(json.dumps({"top1_percent": 98.0, "training_seconds": 3.0}))
    flags = (
        "--weight_bits=4,3",
        "--ptq=codebook",
        "--granularity=per_tensor",
        "--targets=litert_int8,tflm_lut,edge_tpu",
    )
    result = run_forked("export/main.py", f"--workdir={run}", *flags, "--report")
    assert result.status == 0, result.stderr[-3000:]
    return run / "export"


@pytest.fixture(scope="module")
def page(exported):
    return Page((exported / "report.html").read_text(encoding="utf-8"))


def test_page_is_complete(page, exported):
    assert {section["id"] for section in page.find_all("section")} == set(SECTIONS)
    text = " ".join("".join(page.texts).split())
    record = json.loads((exported / "export.json").read_text())
    for entry in record["files"]:
        assert f"{entry['top1_percent']:.2f}" in text and f"{entry['file_bytes']:,}" in text
        for layer in entry["layers"]:
            assert layer["layer"] in text and f"{layer['weight_sqnr_db']:.1f}" in text
    # Accuracy, training, four histograms, outliers, sizes, latencies, confusion matrix.
    figures = page.find_all("svg")
    assert len(figures) == 10 and all(len(figure["aria-label"]) > 10 and figure["role"] == "img" for figure in figures)
    assert {"merged", "conv3x3", "identity", "centroids", "Pareto front"} <= {piece.strip() for piece in page.texts}
    changed = re.search(r"Quantization changed (\d+) of 360 predictions", text)
    pictures = [image for image in page.find_all("img") if image["src"].startswith("data:image/png;base64,")]
    assert len(pictures) == min(int(changed[1]), 12) + len(record["extreme_images"])
    assert all(image["alt"] for image in pictures)
    first, *others = record["extreme_images"]
    factors = [max(image["factors"].values()) for image in record["extreme_images"]]
    assert len(others) == 5 and factors == sorted(factors, reverse=True)
    (layer,) = (name for name, factor in first["factors"].items() if factor == factors[0])
    (statistics,) = (entry for entry in record["activations"] if entry["name"] == layer)
    assert statistics["image"] == first["image"]
    assert f"{factors[0]:.1f} {layer}" in text and f"Calibration image {first['image']}" in str(pictures)
    assert "tflm_lut" in text and "edge_tpu" in text


def test_page_is_self_contained(page):
    """Nothing is loaded from elsewhere, names within the page are unique, and each reference has a target."""
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href"):
            if key in attributes and attributes[key] is not None:
                target = attributes[key]
                assert target.startswith("data:") or (target.startswith("#") and target[1:] in names), (tag, target)
        for target in re.findall(r"url\(#?([^)]*)\)", " ".join(filter(None, attributes.values()))):
            assert target in names
    assert not page.find_all("script")


# Defects of a layout: text on text within a figure, text outside it, and a page wider than the screen.
CHECK = """<script>
const overlaps = [], cut = [];
for (const svg of document.querySelectorAll("svg")) {
  const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent.trim(), text.getBoundingClientRect()]);
  const frame = svg.getBoundingClientRect();
  cut.push(...boxes.filter(([, box]) => box.left < frame.left || box.right > frame.right + 1).map(([text]) => text));
  boxes.forEach(([text, a], i) => boxes.slice(i + 1).forEach(([otherText, b]) => {
    const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (width > 1 && height > 3) overlaps.push(text + " / " + otherText);
  }));
}
const layout = {overlaps, cut, width: document.documentElement.scrollWidth, screen: innerWidth};
document.body.dataset.layout = JSON.stringify(layout);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the PATH, which is not installed here")
@pytest.mark.parametrize("width", [500, 1280])  # headless windows of Chromium are no narrower than 500
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(exported, tmp_path, width, dark):
    content = (exported / "report.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(content.replace("</body>", CHECK), encoding="utf-8")
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"),
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        (tmp_path / "page.html").as_uri(),
    ]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in outcome.stderr
    (body,) = Page(outcome.stdout).find_all("body")
    layout = json.loads(body["data-layout"])
    assert layout["overlaps"] == [] and layout["cut"] == []
    assert layout["width"] <= layout["screen"] <= width


def test_without_the_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs matplotlib; install it with: pip install 'tf_repvgg\[figures\]'"):
        report.write(tmp_path / "report.html", [])


def test_pareto():
    points = [(10, 80.0), (5, 70.0), (20, 79.0), (10, 75.0), (30, 90.0)]
    assert find_pareto_front(points) == [1, 0, 4]


def test_layers_of_a_file():
    """Names in order; more noise with fewer bits; codebooks where weights share few values."""
    model, batch = small_repvgg(), random_images(8)
    noise = {}
    for bits in (8, 4):
        layers = tflite.layers(tflite.convert(model, batch, False, weight_bits=bits), model, batch)
        assert [layer.layer for layer in layers] == ["first", "second", "logits"]
        assert all(layer.weight_bits <= bits and layer.entropy_bits <= layer.weight_bits for layer in layers)
        noise[bits] = np.array([[layer.weight_sqnr_db, layer.activation_sqnr_db] for layer in layers])
    assert np.all(noise[8] > noise[4] + 10) and np.all(noise[8] > 25)
    network = ptq.quantize_network(model, "equalize+codebook", 2, False, batch)
    layers = tflite.layers(tflite.convert(network.quantized), network.float, batch)
    assert [len(layer.codebook) for layer in layers] == [4, 4, 4] and layers[0].codes_used == 4
    assert all(layer.weight_sqnr_db > 5 for layer in layers)  # of the equalized weights, which were rounded
    trained = tflite.layers(tflite.convert(network.quantized), network.quantized, batch)
    assert all(layer.weight_sqnr_db is None and layer.activation_sqnr_db is None for layer in trained)


def test_sqnr():
    assert tflite.fidelity.sqnr_db(np.float32([3, 4]), np.float32([3, 4.5])) == pytest.approx(20)
    assert tflite.fidelity.sqnr_db(np.float32([3, 4]), np.float32([3, 4])) is None


def test_codebooks_belong_to_layers_of_nested_models_by_their_unique_names():
    inputs = keras.Input((8, 8, 4))
    features = inputs
    for name in ("left", "right"):
        inner = keras.Input((8, 8, 4))
        features = keras.Model(inner, RepVGGBlock(4, name="block")(inner), name=name)(features)
    codebooks = {"left_block": [-1.0, 1.0], "right_block": [-2.0, 2.0]}
    histograms = make_histograms(keras.Model(inputs, features), codebooks)
    assert [histogram.layer for histogram in histograms] == ["left_block", "right_block"]
    first, second = (histogram.codebook for histogram in histograms)
    assert first[1] == -first[0] and second[1] == -second[0] and first != second
