"""How few weight clusters does a network need that others trained?

python experiments/mobileone_low_bit.py --data_dir=...

MobileOne-S0 with ImageNet's weights gets a head for the ten classes of Imagenette and is fine-tuned at 128 pixels: in
float, and then for two epochs with ClusterQAT, LSQ and tfmot at 16, 8 and 4 clusters, per tensor and per channel.
Learning rates are chosen on held-out training photographs; then everything is trained on all of them and tested once.
--data_dir holds mobileone_s0/ and imagenette2-224/. About two hours on 2 cores. Resumable; results/mobileone_low_bit
holds each fine-tuning that has ended. Writes results/mobileone_low_bit.json and .md, as far as it has come.
"""

import itertools
from pathlib import Path

from absl import app, flags
from harness.commands import ROOT, train
from harness.low_bit.fine_tunings import FineTunings, Task
from harness.low_bit.rows import Rows
from harness.mobileone.fine_tuning import Choices, write_start
from harness.mobileone.network import FILE
from harness.pages.mobileone_low_bit import render
from harness.tables import write_results

from tf_repvgg import cli, provenance
from tf_repvgg.quantization.uniform import GRANULARITIES

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of the network and the photographs.")
flags.DEFINE_string("runs", "runs/mobileone_low_bit", "Folder of the fine-tuning runs.")
flags.DEFINE_list("clusters", ["16", "8", "4"], "Numbers of clusters.")

IMAGENETTE = Task("imagenette_fine_tuning", {"test": 3925, "validation": 947})
MODEL = "MobileOne-S0"
# Of the head, which is new; the other layers have no batch normalization that would bear more.
BASE_RATE = 1e-3
METHODS = ("ClusterQAT", "LSQ", "tfmot in two epochs")


def train_base(start: str, validation: bool) -> str:
    """Makes sure that the float run is there; returns its workdir."""
    workdir = f"{FLAGS.runs}/base{'_validation' if validation else ''}"
    options = {"learning_rate": BASE_RATE, "quantize": "float", "validation": validation}
    train(IMAGENETTE.config, workdir, init_from=start, data_dir=FLAGS.data_dir, **options)
    return workdir


def main(_):
    with cli.bad_input_exits():
        if FLAGS.data_dir is None or not Path(FLAGS.data_dir, FILE).exists():
            raise FileNotFoundError(f"--data_dir is {FLAGS.data_dir!r}; it must name the folder that holds {FILE}")
        clusters = [int(number) for number in FLAGS.clusters]
    start = f"{FLAGS.runs}/start.npz"
    if not (ROOT / start).exists():
        write_start(FLAGS.data_dir, ROOT / start)
    fine_tunings = FineTunings(ROOT / "results" / "mobileone_low_bit", FLAGS.runs, FLAGS.data_dir, IMAGENETTE)
    choices = Choices(fine_tunings, train_base(start, validation=True))
    rows = Rows(fine_tunings, choices, {MODEL: train_base(start, validation=False)})
    record = {
        "validation_top1_percent": choices.validation_top1_percent,
        "rows": [],
        "machine": provenance.machine(),
    }
    for number, granularity, method in itertools.product(clusters, GRANULARITIES, METHODS):
        record["rows"].append(rows.make([MODEL], method, number, granularity, with_lead=True))
        write_results(ROOT / "results", "mobileone_low_bit", record, render(record))
    print(render(record))


if __name__ == "__main__":
    app.run(main)
