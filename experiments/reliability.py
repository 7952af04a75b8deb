"""What do the programs do when they are killed, out of disk, given damaged files, or run twice at once?

python experiments/reliability.py attacks them, drawn from --seed: kills and signals at random moments, faults at every
write, small disks, processes at once, mutated files and flags, and crafted model files. It uses no network, and writes
below --folder and --results only. Resumable: pieces that are done are kept. About an hour on one core; --minutes ends
it earlier, and --parts leaves the other parts as they are. Writes results/reliability.json and .md. Exit
status 1 if there is a fault.
"""

import sys
import time

from absl import app, flags
from harness.commands import ROOT
from harness.reliability.page import list_faults, render
from harness.reliability.parts import PART_NAMES, Size, run_part
from harness.reliability.programs import Arena
from harness.results.sources import read_json
from harness.tables import write_results

from tf_repvgg import cli, provenance
from tf_repvgg.storage import FinishedWork, claim_folder

FLAGS = flags.FLAGS
flags.DEFINE_integer("seed", 0, "Seed of all moments and mutations.", lower_bound=0)
flags.DEFINE_multi_enum("parts", list(PART_NAMES), PART_NAMES, "Part to run; give it several times for several.")
flags.DEFINE_integer("kills", 100, "Number of kills at random moments.", lower_bound=1)
flags.DEFINE_integer("signals", 200, "Number of signals at random moments.", lower_bound=1)
flags.DEFINE_integer("mutations", 4000, "Number of mutated files and flags.", lower_bound=1)
flags.DEFINE_float("minutes", 120, "Time after which no piece begins.", lower_bound=0)
flags.DEFINE_string("folder", "runs/reliability", "Folder to work in, which holds finished pieces too.")
flags.DEFINE_string("results", "results", "Folder of the results.")


def main(_):
    deadline = time.monotonic() + 60 * FLAGS.minutes
    with cli.bad_input_exits():
        folder = claim_folder(ROOT / FLAGS.folder)
    path = ROOT / FLAGS.results / "reliability.json"
    size = Size(FLAGS.seed, FLAGS.kills, FLAGS.signals, FLAGS.mutations)
    with Arena(folder / "arena") as arena:
        for name in FLAGS.parts:
            part = run_part(name, arena, size, FinishedWork(folder / "kept"), deadline)
            # Read again: another process may have run other parts meanwhile.
            parts = read_json(path)["parts"] if path.exists() else {}
            record = {"parts": parts | {name: part | {"machine": provenance.machine()}}}
            write_results(ROOT / FLAGS.results, "reliability", record, render(record))
    print(render(record))
    if faults := list_faults(record):
        sys.exit("\n".join(f"experiments/reliability.py: fault: {fault}" for fault in faults))


if __name__ == "__main__":
    app.run(main)
