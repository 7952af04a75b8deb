"""Writes results/README.md, results/headline.md and results/headline.png: python experiments/results_page.py

Reads the JSON files that the other experiments and the benchmarks have left in results/, and two of the checkpoints
there; measures nothing. The prose is in experiments/harness/results/page.md.jinja, and every number in it is computed.
About 20 seconds.
"""

from absl import app, flags
from harness.commands import CHECKPOINTS, ROOT
from harness.results import headline, headline_figure, page
from harness.results.sources import load_results
from harness.tables import write_page

from tf_repvgg import runs

FLAGS = flags.FLAGS
flags.DEFINE_string("output", "results", "Folder to write to.")

DRAWN_MODELS = {"BN": "cifar10_bn", "OABN": "cifar10_oabn"}


def main(_):
    source, folder = ROOT / "results", ROOT / FLAGS.output
    folder.mkdir(parents=True, exist_ok=True)
    results = load_results(source)
    write_page(folder / "README.md", page.render(results, source))
    write_page(folder / "headline.md", headline.render(results))
    models = {title: runs.load_model(CHECKPOINTS / name) for title, name in DRAWN_MODELS.items()}
    exports = {title: model["export"] for title, model in results["min_max"].items()}
    headline_figure.draw(models, exports, folder / "headline.png")
    print(f"written to {folder}: README.md, headline.md and headline.png")


if __name__ == "__main__":
    app.run(main)
