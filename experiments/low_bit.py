"""Few weight states on CIFAR-10: ClusterQAT, and beside it LSQ and tfmot, fine-tuned for three epochs each.

python experiments/low_bit.py --data_dir=...  takes about 10 hours; starts from the checkpoints in results/checkpoints
where they are. Learning rates, from the same grid for every method, and whether to distill are chosen on held-out
images with a model that has not seen them; then all is trained on the 50,000 images and tested once. Leaves
results/low_bit.json and results/low_bit.md, as far as it came, and in the end results/low_bit.png. Resumable at any
point, on another machine too: the JSON holds every fine-tuning that has ended, with what it got right, image by image.
"""

import base64
import functools
import hashlib
import itertools
import json
from typing import NamedTuple

import numpy as np
from absl import app, flags
from harness.commands import ROOT, Diverged, export, train
from harness.low_bit import figure
from harness.tables import write_results
from tabulate import tabulate

from tf_repvgg import provenance, runs
from tf_repvgg.quantization.uniform import GRANULARITIES

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/low_bit", "Folder of the fine-tuning runs.")

CONFIG = "cifar10_fine_tuning"
LEARNING_RATES = (0.002, 0.008, 0.032, 0.128)
HEADLINE = (  # states, granularity, largest drop asked for
    (16, "per_tensor", 0.1),
    (8, "per_tensor", 0.3),
    (8, "per_channel", 0.2),
    (6, "per_tensor", 0.6),
    (5, "per_tensor", 1.0),
    (4, "per_tensor", 2.0),
    (4, "per_channel", 1.0),
    (3, "per_channel", 3.0),
)
MODELS = {"OABN": "cifar10_oabn", "OABN, seed 1": "cifar10_oabn_seed1"}
OTHERS = {"BN": "cifar10_bn", "QARepVGG": "cifar10_qarepvgg", "no identity branch": "cifar10_no_identity"}
IMAGES = {"test": 10_000, "validation": 5_000}
_TWO_SIDED_95 = 1.96


class Method(NamedTuple):
    """A way to fewer states.

    Attributes:
      runs: (states by layer pattern, granularity) -> flags of train/main.py, one training after the other.
      rate: what its optimizer's learning rate is multiplied with.
    """

    runs: callable
    rate: float = 1


def _bits(states):
    return ",".join(f"{name}={int(count).bit_length() - 1}" for name, count in states.items())


def _clusters(states):
    return ",".join(f"{name}={count}" for name, count in states.items())


def _clusterqat(states, granularity, **more):
    own = {"quantize": "clusterqat", "number_of_clusters": _clusters(states), "granularity": granularity}
    return [own | FROZEN_AT_LAST | more]


def _lsq(states, granularity, **more):
    return [{"quantize": "lsq", "weight_bits": _bits(states), "granularity": granularity} | FROZEN_AT_LAST | more]


def _from_ptq(make_runs, method, **more):
    """Starting from a method of post-training quantization, on more images than ranges alone need."""
    return functools.partial(make_runs, ptq_start=method, calibration_images=1024, **more)


def _tfmot(states, granularity):
    """An epoch of clustering and two of cluster-preserving quantization, with AdamW.

    The second sums a centroid's gradient over its weights, which leads SGD astray at any rate that suits the rest;
    AdamW does not mind, and its rates are about a twentieth.
    """
    clustering = {"number_of_clusters": _clusters(states), "granularity": granularity}
    clustering |= {"quantize": "tfmot_clustering", "cluster_gradient_aggregation": "avg", "epochs": 1}
    quantization = {"quantize": "tfmot_quantization", "epochs": 2}
    return [flags | {"optimizer": "adamw"} for flags in (clustering, quantization)]


# For the last tenth of three epochs clusters, where there are any, and ranges of activations rest.
FROZEN_AT_LAST = {"freeze_epochs": 0.3}
METHODS = {
    "float": Method(lambda states, granularity: [{"quantize": "float"}]),
    "ClusterQAT": Method(_from_ptq(_clusterqat, "codebook_adaquant")),
    "LSQ": Method(_lsq),
    "tfmot": Method(_tfmot, rate=0.05),
    "ClusterQAT from k-means": Method(_clusterqat),
    "LSQ from AdaQuant": Method(_from_ptq(_lsq, "adaquant")),
    "ClusterQAT with trained centroids": Method(
        _from_ptq(_clusterqat, "codebook_adaquant", train_centroids=True, cluster_gradient_aggregation="avg")
    ),
    "ClusterQAT resting for an epoch": Method(_from_ptq(_clusterqat, "codebook_adaquant", freeze_epochs=1.0)),
    "ClusterQAT, seed 1": Method(_from_ptq(_clusterqat, "codebook_adaquant", seed=1)),
    "ClusterQAT, seed 2": Method(_from_ptq(_clusterqat, "codebook_adaquant", seed=2)),
    **{
        f"ClusterQAT in training form, statistics {statistics}": Method(
            functools.partial(_clusterqat, batch_norm_statistics=statistics)
        )
        for statistics in ("frozen", "running")
    },
}
# What is compared on validation data only, with the methods that it explains: where training starts and in which form,
# and, with 16 states per channel, where ClusterQAT was behind at the rate for 8 per tensor, what might help it.
VARIANTS = [name for name in METHODS if " from " in name or "training form" in name]
REMEDIES = ["ClusterQAT from k-means", "ClusterQAT with trained centroids", "ClusterQAT resting for an epoch"]
# The same training again; over these, the rate for 16 states per channel is chosen.
SEEDS = ["ClusterQAT", "ClusterQAT, seed 1", "ClusterQAT, seed 2"]


class Result:
    """What a fine-tuned network gets right.

    Attributes:
      is_right: bool [images], of the integer file, or of the float network.
      top1: in percent; 0 if training diverged, which then is right of no image.
      fidelity: of the integer file to the model that was trained: "agreement_percent" of their classes, and
        "trained_model_top1_percent"; empty for float, None after training that diverged.
    """

    def __init__(self, is_right, fidelity=None):
        self.is_right = is_right
        self.top1 = 100 * float(np.mean(is_right))
        self.fidelity = fidelity or {}

    def as_record(self):
        bits = base64.b64encode(np.packbits(self.is_right)).decode("ascii")
        top1 = {"top1_percent": round(self.top1, 3), "images": len(self.is_right)}
        return top1 | {"fidelity": self.fidelity, "is_right_packed_bits": bits}

    @classmethod
    def from_record(cls, record):
        packed = np.frombuffer(base64.b64decode(record["is_right_packed_bits"]), np.uint8)
        return cls(np.unpackbits(packed, count=record["images"]).astype(bool), record["fidelity"])

    @property
    def has_diverged(self):
        return not self.is_right.any()

    @classmethod
    def of_diverged(cls, split):
        return cls(np.zeros(IMAGES[split], bool), {"agreement_percent": None, "trained_model_top1_percent": None})

    @classmethod
    def of_export(cls, folder, report):
        """From a finished export and what its export.json says."""
        with np.load(folder / "predictions.npz") as classes:
            if "trained_model" not in classes:
                return cls(classes["float_fused"] == classes["labels"])
            (file,) = report["files"]
            fidelity = {
                "agreement_percent": file["agreement_with_trained_model_percent"],
                "trained_model_top1_percent": report["trained_model_top1_percent"],
            }
            return cls(classes[file["file"]] == classes["labels"], fidelity)


def fine_tune(record, method, base, states, granularity, rate, distill, split="test", edges=None) -> Result:
    """Trains and exports, unless the record has the result, or the workdir a finished export.

    Args:
      record: whose "fine_tunings" has the results of this base and these flags; a new one is added.
      method: of `METHODS`.
      base: workdir of the float run.
      states: of every layer; of `edges`, stem and classifier, if that is given.
      granularity, rate: of weights; learning rate.
      distill: whether the float run teaches.
      split: "test", or "validation" for a base that has not seen those images.
    """
    by_layer = ({"stem": edges, "logits": edges} if edges else {}) | {".*": states}
    words = [base.rpartition("/")[2], method, states or "", granularity, rate, "distilled" if distill else "", edges]
    name = "_".join(str(word) for word in words if word).replace(" ", "_").replace(",", "")
    common = {"learning_rate": rate * METHODS[method].rate, "validation": split == "validation"}
    trainings = [common | flags for flags in METHODS[method].runs(by_layer, granularity)]
    made_from = {"base_sha256": runs.model_sha256(ROOT / base), "flags_sha256": _flags_sha256(trainings)}
    found = record["fine_tunings"].get(name)
    if found and made_from.items() <= found.items():
        return Result.from_record(found)
    workdir = f"{FLAGS.runs}/{name}_{'_'.join(sha256[:8] for sha256 in made_from.values())}"
    path = ROOT / workdir / "export" / "export.json"  # written last
    try:
        if not path.exists():
            _train_and_export(workdir, trainings, base, distill, split)
        report = json.loads(path.read_text(encoding="utf-8"))
        result, machine = Result.of_export(path.parent, report), report["machine"]
    except Diverged:
        result, machine = Result.of_diverged(split), provenance.machine()
    record["fine_tunings"][name] = made_from | {"machine": machine} | result.as_record()
    write(record)
    return result


def _flags_sha256(trainings):
    lines = (ROOT / "configs" / f"{CONFIG}.flags").read_text(encoding="utf-8").splitlines()
    common = [line for line in lines if line.startswith("--")]
    return hashlib.sha256(json.dumps([common, trainings], sort_keys=True).encode()).hexdigest()


def _train_and_export(workdir, trainings, base, distill, split):
    teacher = {"distill_from": base} if distill else {}
    for number, its_flags in enumerate(trainings, 1):
        is_last = number == len(trainings)
        its_workdir = workdir if is_last else f"{workdir}_run{number}"
        train(CONFIG, its_workdir, init_from=base, data_dir=FLAGS.data_dir, **teacher, **its_flags)
        base = its_workdir
    export(workdir, evaluation_split=split, data_dir=FLAGS.data_dir)


def base_run(config):
    """The workdir of a float run, trained unless it is there or committed."""
    workdir = f"runs/cifar10/{config}"
    if not (ROOT / workdir / runs.MODEL_NAME).exists():
        train(config, workdir, data_dir=FLAGS.data_dir)
    return workdir


def chosen(results):
    """The key of the largest of {key: top-1}."""
    return max(results, key=results.get)


class Choices:
    """What is chosen on validation data, by a network that has not seen them; measured when it is asked for.

    Args:
      record: whose "choices" tell of it.
    """

    def __init__(self, record):
        self._tune = functools.partial(fine_tune, record, base=base_run("cifar10_oabn_validation"), split="validation")
        self._write = functools.partial(write, record)
        self._validation = record["choices"]["validation_top1_percent"] = {}
        best = {distill: max(self._of_grid("ClusterQAT", 8, distill).values()) for distill in (False, True)}
        self.distill = record["choices"]["distill"] = chosen(best)

    def _measured(self, rates, method, states, distill, granularity="per_tensor"):
        """{rate: top-1}, which the record then tells of, too."""
        found = {
            rate: self._tune(method, states=states, rate=rate, distill=distill, granularity=granularity).top1
            for rate in rates
        }
        words = [method, f"{states} states, {granularity.replace('_', ' ')}" if states else "", "distilled" * distill]
        of_name = self._validation.setdefault(", ".join(filter(None, words)), {})
        of_name |= {str(rate): round(top1, 2) for rate, top1 in found.items()}
        self._write()
        return found

    def _of_grid(self, method, states, distill):
        """{rate: top-1} per tensor: of the grid's two middle rates and the one beyond the better."""
        lowest, low, high, highest = LEARNING_RATES
        found = self._measured((low, high), method, states, distill)
        beyond = lowest if chosen(found) == low else highest
        return found | self._measured([beyond], method, states, distill)

    def rate(self, method, states, granularity):
        """The learning rate of a method: that for 8 states per tensor serves all from 5 on, that for 4 the others.

        With 16 states per channel, ClusterQAT has one of its own. Behind the others there on test images, it was looked
        at with more seeds on validation data, where it diverges with one of three at the rate of 8 states per tensor.
        """
        if (method, states, granularity) == ("ClusterQAT", 16, "per_channel"):
            found = [self._measured(LEARNING_RATES[1:3], seed, states, self.distill, granularity) for seed in SEEDS]
            return chosen({rate: sum(of_seed[rate] for of_seed in found) for rate in found[0]})
        states = 0 if method == "float" else 8 if states > 4 else 4
        return chosen(self._of_grid(method, states, self.distill))

    def compare(self, method, states, granularity):
        """Measures a method at the grid's two middle rates."""
        self._measured(LEARNING_RATES[1:3], method, states, self.distill, granularity)


def drop_and_interval(references, results):
    """Drop in points, the mean over models, and half its paired 95 % interval over the images."""
    lost = np.mean([r.is_right.astype(float) - q.is_right for r, q in zip(references, results, strict=True)], axis=0)
    return 100 * float(np.mean(lost)), 100 * _TWO_SIDED_95 * float(np.std(lost) / np.sqrt(len(lost)))


def measure(record):
    """Fills the record's rows one by one."""
    choices = Choices(record)
    bases = {name: base_run(config) for name, config in (MODELS | OTHERS).items()}

    @functools.cache
    def tested(model, method, states=0, granularity="per_tensor", edges=None, highest=None):
        """The result, and its learning rate: the highest, by default the chosen one, that does not diverge."""
        highest = highest or choices.rate(method, states, granularity)
        for rate in sorted((rate for rate in LEARNING_RATES if rate <= highest), reverse=True):
            result = fine_tune(record, method, bases[model], states, granularity, rate, choices.distill, edges=edges)
            if not result.has_diverged:
                break
        return result, METHODS[method].rate * rate

    def add(part, models, method, states, granularity, edges=None, rate=None, asked=None):
        references = [tested(model, "float")[0] for model in models]
        found = (tested(model, method, states, granularity, edges, rate) for model in models)
        results, rates = zip(*found, strict=True)
        drop, half = drop_and_interval(references, results)
        row = {
            "models": list(models),
            "method": method,
            "states": states,
            "granularity": granularity,
            "stem_and_classifier_states": edges or states,
            "reference_top1_percent": [round(r.top1, 2) for r in references],
            "integer_top1_percent": [round(r.top1, 2) for r in results],
            "drop": round(drop, 3),
            "half_interval": round(half, 3),
            "learning_rates": list(rates),
            "agreement_percent": [r.fidelity["agreement_percent"] for r in results],
            "trained_model_top1_percent": [r.fidelity["trained_model_top1_percent"] for r in results],
        }
        if asked is not None:
            row |= {"asked": asked, "is_met": bool(drop - half <= asked)}
        if part == "peers":
            ours = [tested(model, "ClusterQAT", states, granularity)[0] for model in models]
            ahead, half = drop_and_interval(ours, results)
            row |= {"clusterqat_ahead": round(ahead, 3), "clusterqat_ahead_half_interval": round(half, 3)}
        record[part].append(row)
        write(record)

    for states, granularity, asked in HEADLINE:
        add("headline", MODELS, "ClusterQAT", states, granularity, asked=asked)
    for states, granularity in itertools.product((16, 8, 4), GRANULARITIES):
        for method in ("ClusterQAT", "LSQ", "tfmot"):
            add("peers", MODELS, method, states, granularity)
    common_rate = choices.rate("ClusterQAT", 8, "per_tensor")
    add("common_rate", MODELS, "ClusterQAT", 16, "per_channel", rate=common_rate)
    for states, granularity in itertools.product((8, 4), GRANULARITIES):
        add("edges", ["OABN"], "ClusterQAT", states, granularity, edges=256)
    for model, states in itertools.product(OTHERS, (8, 4)):
        add("others", [model], "ClusterQAT", states, "per_tensor")
    for states in (16, 8, 4):
        choices.compare("ClusterQAT", states, "per_channel")
    for method, states in itertools.product(VARIANTS, (4, 8)):
        choices.compare(method, states, "per_tensor")
    for method in REMEDIES:
        choices.compare(method, 16, "per_channel")


PARTS = {
    "headline": "ClusterQAT of every layer: two OABN models, one fine-tuning each",
    "peers": "The same steps by other methods",
    "common_rate": "ClusterQAT with 16 states per channel at its rate for 8 per tensor, which was tested first",
    "edges": "Stem and classifier with 256 states, the other layers with fewer",
    "others": "ClusterQAT without OABN",
}


def write(record):
    page = [
        "# Few weight states on CIFAR-10",
        "`python experiments/low_bit.py`: three epochs of fine-tuning, 8-bit activations, top-1 in percent of the",
        "integer file in LiteRT on all 10,000 test images. Drop: in points, against the same network fine-tuned in",
        "float for the same steps; with its paired 95 % interval. Agrees: percent of images on which the file finds",
        "the class that the trained model finds in TensorFlow, and what its top-1 gains on the model's in points;",
        "LiteRT's kernels are XNNPACK's, its default. ClusterQAT starts from codebooks that codebook_adaquant learns",
        "layer by layer on 1,024 images, LSQ and tfmot as their authors have them start. Images: JPEG re-encodings",
        "(quality 75) of CIFAR-10 where --data_dir points at the project's shared copy.",
    ]
    for part, title in PARTS.items():
        if record[part]:
            page += ["", f"## {title}", "", _table(record[part])]
        if part == "peers" and record[part]:
            page += ["", "How many points ClusterQAT is ahead, with the paired 95 % interval:", ""]
            page += [_comparison(record[part])]
    if choices := record["choices"].get("validation_top1_percent"):
        rows = [[name, *(_percent(found.get(str(rate))) for rate in LEARNING_RATES)] for name, found in choices.items()]
        page += ["", "## On validation data: learning rates and distillation, which are chosen here, and variants", ""]
        page += [
            "OABN model, top-1 in percent on 5,000 held-out images. SGD at these rates; tfmot by AdamW, at a twentieth",
            "of them. What is chosen per tensor serves per channel too, where ClusterQAT alone was looked at; what is",
            "chosen with 8 states serves all from 5 on; what is chosen on OABN the other models too, or the next rate",
            "below where that diverges. ClusterQAT with 16 states per channel was tested at that rate first, and then",
            "had the better one over three seeds, of which one diverges at the other.",
            "",
        ]
        page.append(tabulate(rows, ["", *map(str, LEARNING_RATES)], tablefmt="github", disable_numparse=True))
    write_results(ROOT / "results", "low_bit", record, "\n".join(page))


def _table(rows):
    has_goal = "asked" in rows[0]
    cells = [
        [
            ", ".join(row["models"]),
            row["method"],
            row["states"],
            row["granularity"].replace("_", " "),
            " / ".join(dict.fromkeys(f"{rate:g}" for rate in row["learning_rates"])),
            " / ".join(map(_percent, row["reference_top1_percent"])),
            " / ".join(map(_percent, row["integer_top1_percent"])),
            f"{row['drop']:.2f} ± {row['half_interval']:.2f}",
            " / ".join(map(_percent, row["agreement_percent"])),
            _gains(row),
            *([f"{row['asked']:.1f}", "yes" if row["is_met"] else "no"] if has_goal else []),
        ]
        for row in rows
    ]
    headers = ["model", "method", "states", "weights", "rate", "float", "integer", "drop", "agrees", "gains"]
    headers += ["asked", "met"] if has_goal else []
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def _comparison(rows):
    """Methods side by side, the first compared with the others; of what all of them have been measured with."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = []
    for (states, granularity), group in itertools.groupby(rows, lambda row: (row["states"], row["granularity"])):
        group = list(group)
        if len(group) == len(methods):
            top1 = (" / ".join(map(_percent, row["integer_top1_percent"])) for row in group)
            ahead = (
                f"{row['clusterqat_ahead']:.2f} ± {row['clusterqat_ahead_half_interval']:.2f}" for row in group[1:]
            )
            cells.append([states, granularity.replace("_", " "), *top1, *ahead])
    headers = ["states", "weights", *methods, *(f"ahead of {method}" for method in methods[1:])]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def _gains(row):
    """Of each integer file on the trained model, in points."""
    pairs = zip(row["integer_top1_percent"], row["trained_model_top1_percent"], strict=True)
    return " / ".join("-" if trained is None else f"{top1 - trained:+.2f}" for top1, trained in pairs)


def _percent(value):
    """In two decimals; of what was not measured, or diverged, it says so."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value else "diverged"


def main(_):
    path = ROOT / "results" / "low_bit.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"fine_tunings": {}}
    record = {"choices": {}} | {part: [] for part in PARTS} | {"fine_tunings": earlier["fine_tunings"]}
    measure(record)
    figure.draw(record, ROOT / "results" / "low_bit.png")
    print((ROOT / "results" / "low_bit.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    app.run(main)
