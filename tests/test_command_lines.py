"""Bad input: one clear line on stderr, exit status 2, nothing half-written."""

import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from absl import flags as absl_flags
from PIL import Image

from tf_repvgg import cli, runs, storage
from tf_repvgg.fusion import fuse
from tf_repvgg.models import build_repvgg
from tf_repvgg.quantization import ptq

TRAIN, EXPORT = "train/main.py", "export/main.py"

# {case: (program, flags, what the line must say)}; "{here}" is the folder that the fixture prepares, "{new}" one that
# does not exist yet and must not hold anything afterwards.
CASES = {
    "unknown flag value": (TRAIN, ["--workdir={new}", "--norm=gn"], r"norm", "bn|oabn"),
    "unknown variant": (TRAIN, ["--workdir={new}", "--variant=A9"], "variant", "A0"),
    "unknown flag": (TRAIN, ["--workdir={new}", "--varient=A0"], "varient", "Unknown"),
    "flag of another type": (TRAIN, ["--workdir={new}", "--epochs=many"], "epochs", "many"),
    "flag out of range": (TRAIN, ["--workdir={new}", "--epochs=0"], "epochs", "0"),
    "seed of more than 32 bits": (TRAIN, ["--workdir={new}", "--seed=4294967296"], "seed", "4294967295"),
    "images of no size": (TRAIN, ["--workdir={new}", "--image_size=0"], "image_size", "0"),
    "empty workdir": (TRAIN, ["--workdir="], "name of the workdir is empty", "folder"),
    "no workdir": (TRAIN, [], "workdir", "required|None"),
    "no such flagfile": (TRAIN, ["--flagfile={new}/x.flags"], "x.flags", ""),
    "unknown dataset": (TRAIN, ["--workdir={new}", "--dataset=digitz"], "'digitz' is not in TFDS", "digits, cifar10"),
    "data_dir without the dataset": (
        TRAIN,
        ["--workdir={new}", "--dataset=cifar10", "--data_dir={here}/empty"],
        "does not hold the dataset 'cifar10'",
        "empty",
    ),
    "word that is no flag": (TRAIN, ["--workdir={new}", "digits"], "'digits' is no flag", "--name=value"),
    "crops larger than the images": (
        TRAIN,
        ["--workdir={new}", "--early_epochs=1", "--early_crop=9"],
        "--early_crop=9 is larger than the images",
        "8",
    ),
    "k of zero": (TRAIN, ["--workdir={new}", "--norm=oabn", "--oabn_k=0"], "k is '0'", "above 0"),
    "negative k": (TRAIN, ["--workdir={new}", "--norm=oabn", "--oabn_k=-0.5"], "k is '-0.5'", "above 0"),
    "k of zero without OABN": (TRAIN, ["--workdir={new}", "--oabn_k=0"], "k is '0'", "above 0"),
    "k that names no block": (
        TRAIN,
        ["--workdir={new}", "--norm=oabn", "--oabn_k=stage1.*=0.1"],
        "no pattern of k matches",
        "stem",
    ),
    "options that do not go together": (
        TRAIN,
        ["--workdir={new}", "--block=qarepvgg", "--norm=oabn"],
        "block='qarepvgg'",
        "use norm='bn'",
    ),
    "batch larger than the set": (
        TRAIN,
        ["--workdir={new}", "--batch_size=5000"],
        "batch size 5000 is larger than",
        "digits",
    ),
    "more steps than batches": (
        TRAIN,
        ["--workdir={new}", "--steps_per_epoch=1000"],
        "--steps_per_epoch=1000 is more than",
        "batches of one pass",
    ),
    "centre larger than the image": (
        TRAIN,
        ["--workdir={new}", "--image_size=8", "--evaluation_resize=7"],
        "size (8, 8) does not fit",
        "7",
    ),
    "colours of grey images": (TRAIN, ["--workdir={new}", "--normalization=imagenet"], "of 3 channels", "have 1"),
    "no such folder": (
        TRAIN,
        ["--workdir={new}", "--dataset=folder:{here}/nothing"],
        "no folder",
        "give --dataset=folder:PATH",
    ),
    "folder without training images": (
        TRAIN,
        ["--workdir={new}", "--dataset=folder:{here}/empty"],
        "'empty' has no folder 'train'",
        "empty/train/<label>/",
    ),
    "folder without classes": (
        TRAIN,
        ["--workdir={new}", "--dataset=folder:{here}/no_classes"],
        "0 classes in train",
        "at least two",
    ),
    "folder with a bad image": (
        TRAIN,
        ["--workdir={new}", "--dataset=folder:photos", "--data_dir={here}", "--image_size=8"],
        "1 of the images of 'folder:photos' cannot be used",
        "--bad_images=skip",
    ),
    "checkpoint of another variant": (
        TRAIN,
        ["--workdir={new}", "--init_from={here}/other_variant.keras"],
        "checkpoint is of another network",
        "conv3x3/kernel",
    ),
    "truncated checkpoint": (
        TRAIN,
        ["--workdir={new}", "--init_from={here}/truncated.keras"],
        "truncated.keras' is not a whole Keras model",
        "",
    ),
    "unknown optimizer": (TRAIN, ["--workdir={new}", "--optimizer=adam"], "optimizer", "sgd|adamw"),
    "magnitude out of range": (TRAIN, ["--workdir={new}", "--randaugment_magnitude=31"], "randaugment_magnitude", "30"),
    "no such teacher": (TRAIN, ["--workdir={new}", "--distill_from={here}/gone"], "gone' does not exist", "workdir"),
    "teacher without input.json": (TRAIN, ["--workdir={new}", "--distill_from={here}/empty"], "input.json", "dataset"),
    "teacher that is not trained": (TRAIN, ["--workdir={new}", "--distill_from={here}/damaged_run"], "no model at", ""),
    "teacher of other classes": (
        TRAIN,
        ["--workdir={new}", "--distill_from={here}/other_labels_run"],
        "other_labels_run' tells 10 classes apart (zero, 1, 2, ...)",
        "has 10 (0, 1, 2, ...)",
    ),
    "teacher of fewer classes": (
        TRAIN,
        ["--workdir={new}", "--distill_from={here}/other_classes_run"],
        "tells 3 classes apart",
        "has 10",
    ),
    "teacher of other input": (
        TRAIN,
        ["--workdir={new}", "--distill_from={here}/run", "--image_size=12"],
        "size=(8, 8)",
        "size=(12, 12)",
    ),
    "teacher that is not finite": (
        TRAIN,
        ["--workdir={new}", "--distill_from={here}/nan_branches_run"],
        "nan_branches_run' cannot be fused",
        "was its training stable?",
    ),
    "temperature of zero": (
        TRAIN,
        ["--workdir={new}", "--distill_from={here}/run", "--distill_temperature=0"],
        "temperature of distillation is 0",
        "above 0",
    ),
    "no checkpoint": (TRAIN, ["--workdir={new}", "--init_from={here}/nothing.keras"], "no model at", "nothing.keras"),
    "nothing to evaluate": (TRAIN, ["--workdir={new}", "--evaluate_only"], "no model at", "train/main.py"),
    "evaluated on other classes": (
        TRAIN,
        ["--workdir={here}/other_classes_run", "--evaluate_only", "--novalidation"],
        "into 3 classes",
        "of 10 classes",
    ),
    "workdir is a file": (TRAIN, ["--workdir={here}/file"], "file' is a file; give a folder", ""),
    "workdir below a file": (TRAIN, ["--workdir={here}/file/run"], "cannot be written to", "file/run"),
    # Nobody can make a folder there, root included.
    "workdir that cannot be written": (TRAIN, ["--workdir=/proc/run"], "'/proc/run' cannot be written to", ""),
    "workdir of a run with other flags": (
        TRAIN,
        ["--workdir={here}/run", "--norm=oabn", "--epochs=3"],
        " epochs, norm",
        "run/config.flags to go on with that one",
    ),
    "finished run, truncated model": (TRAIN, ["--workdir={here}/truncated_run"], "not a whole Keras model", ""),
    "damaged training checkpoint": (TRAIN, ["--workdir={here}/damaged_run"], "checkpoint", "damaged"),
    "export: no run": (EXPORT, ["--workdir={new}"], "does not exist", "workdir of a run"),
    "export: no input.json": (EXPORT, ["--workdir={here}/empty"], "input.json", "dataset"),
    "export: truncated model": (EXPORT, ["--workdir={here}/truncated_run"], "not a whole Keras model", ""),
    "export: bits": (EXPORT, ["--workdir={here}/run", "--weight_bits=8,9"], "--weight_bits is '8,9'", "2 to 8"),
    "export: granularity": (
        EXPORT,
        ["--workdir={here}/run", "--granularity=per_layer"],
        "--granularity is 'per_layer'",
        "per_tensor, per_channel",
    ),
    "export: no granularity": (
        EXPORT,
        ["--workdir={here}/run", "--granularity="],
        "--granularity is ''",
        "per_tensor, per_channel",
    ),
    "export: PTQ method": (
        EXPORT,
        ["--workdir={here}/run", "--ptq=adaqaunt"],
        "PTQ method is 'adaqaunt'; known: min_max",
        "adaquant",
    ),
    "export: no statistics": (
        EXPORT,
        ["--workdir={here}/fused_run", "--ptq=dfq_data_free"],
        "needs the statistics of normalizations",
        "use dfq with calibration images",
    ),
    "export: NaN": (EXPORT, ["--workdir={here}/nan_run", "--ptq=mse"], "weight 'stem/bias", "infinities or NaN"),
    "export: bits of one": (EXPORT, ["--workdir={here}/run", "--ptq=mse", "--weight_bits=1"], "is '1'", "2 to 8"),
    "export: bits of a layer": (
        EXPORT,
        ["--workdir={here}/run", "--ptq=mse", "--layer_bits=stem=9"],
        "weight bits are '9'|weight bits are 9",
        "from 2 to 8",
    ),
    "export: few timed inferences": (EXPORT, ["--workdir={here}/run", "--latency_runs=10"], "latency_runs", "0, or 50"),
    "export: layers of other widths": (
        EXPORT,
        ["--workdir={here}/run", "--layer_bits=stm=8"],
        "pattern 'stm' of weight bits matches no layer; there are: stem",
        "",
    ),
    "export: too few calibration images": (
        EXPORT,
        ["--workdir={here}/run", "--calibration_images=5000"],
        "5000 calibration images asked for",
        "train",
    ),
    "export: bits of what was trained quantized": (
        EXPORT,
        ["--workdir={here}/quantized_run", "--weight_bits=4"],
        "--weight_bits=['4'] does not go with a model that was trained quantized",
        "",
    ),
    "nothing to quantize": (TRAIN, ["--workdir={new}", "--quantize=clusterqat"], "name its workdir by --init_from", ""),
    "quantized already": (
        TRAIN,
        ["--workdir={new}", "--quantize=clusterqat", "--init_from={here}/quantized_run"],
        "quantized_run is quantized already",
        "float run",
    ),
    "averages of clusters": (
        TRAIN,
        ["--workdir={new}", "--quantize=clusterqat", "--init_from={here}/run", "--ema=0.9"],
        "--ema=0.9 does not go with --quantize",
        "",
    ),
    "one cluster": (
        TRAIN,
        ["--workdir={new}", "--quantize=clusterqat", "--init_from={here}/run", "--number_of_clusters=1"],
        "numbers of clusters are 1; they must be a whole number from 2 to 256",
        "",
    ),
    "clusters of no layer": (
        TRAIN,
        ["--workdir={new}", "--quantize=clusterqat", "--init_from={here}/run", "--number_of_clusters=stm=256,.*=8"],
        "pattern 'stm' of numbers of clusters matches no layer; there are: stem",
        "",
    ),
    "states without quantization": (
        TRAIN,
        ["--workdir={new}", "--number_of_clusters=4"],
        "--number_of_clusters=4 has no effect with no --quantize; it is for clusterqat, tfmot_clustering",
        "",
    ),
    "bits of clusters": (
        TRAIN,
        ["--workdir={new}", "--quantize=clusterqat", "--init_from={here}/run", "--weight_bits=3"],
        "--weight_bits=3 has no effect with --quantize=clusterqat; it is for lsq",
        "",
    ),
    "bits of clusters, as by default": (
        TRAIN,
        ["--workdir={new}", "--quantize=clusterqat", "--init_from={here}/run", "--weight_bits=4"],
        "--weight_bits=4 has no effect with --quantize=clusterqat; it is for lsq",
        "",
    ),
    "gradient of centroids that do not train": (
        TRAIN,
        [
            "--workdir={new}",
            "--quantize=clusterqat",
            "--init_from={here}/run",
            "--cluster_gradient_aggregation=avg",
        ],
        "--cluster_gradient_aggregation=avg has no effect without --train_centroids",
        "",
    ),
    "fine-tuning what is not finite": (
        TRAIN,
        ["--workdir={new}", "--quantize=float", "--init_from={here}/nan_branches_run"],
        "nan_branches_run' cannot be fused",
        "was its training stable?",
    ),
    "frozen longer than trained": (
        TRAIN,
        ["--workdir={new}", "--quantize=clusterqat", "--init_from={here}/run", "--epochs=2", "--freeze_epochs=3"],
        "--ramp_epochs=0 and --freeze_epochs=3 are more than --epochs=2",
        "",
    ),
    "two starts of a codebook": (
        TRAIN,
        [
            "--workdir={new}",
            "--quantize=clusterqat",
            "--init_from={here}/run",
            "--ptq_start=codebook",
            "--cluster_centroids_init=linear",
        ],
        "--cluster_centroids_init=linear does not go with --ptq_start=codebook, which says where centroids start",
        "leave one out",
    ),
    "a start of codebooks for steps": (
        TRAIN,
        ["--workdir={new}", "--quantize=lsq", "--init_from={here}/run", "--ptq_start=codebook"],
        "--ptq_start=codebook does not go with --quantize=lsq; mse, octav, adaquant do",
        "",
    ),
    "quantization that never sets in": (
        TRAIN,
        [
            "--workdir={new}",
            "--quantize=clusterqat",
            "--init_from={here}/run",
            "--epochs=2",
            "--ramp_epochs=1.5",
            "--freeze_epochs=0.6",
        ],
        "--ramp_epochs=1.5 and --freeze_epochs=0.6 are more than --epochs=2",
        "",
    ),
    "nothing to mix": (
        TRAIN,
        [
            "--workdir={new}",
            "--quantize=clusterqat",
            "--init_from={here}/run",
            "--ptq_start=codebook",
            "--ramp_epochs=1",
        ],
        "--ramp_epochs=1.0 does not go with --ptq_start=codebook",
        "leave one out",
    ),
    "export: output is a file": (
        EXPORT,
        ["--workdir={here}/run", "--output={here}/file"],
        "file' is a file; give a folder",
        "",
    ),
    "export: other classes": (
        EXPORT,
        ["--workdir={here}/other_classes_run"],
        "into 3 classes",
        "of 10 classes",
    ),
    "export: same number of other classes": (
        EXPORT,
        ["--workdir={here}/other_labels_run"],
        "class 0 of the model is 'zero', but that of 'digits' is '0'",
        "",
    ),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory, digits):
    """A folder with runs and files in every state that the cases need."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "empty").mkdir()
    (folder / "file").write_text("not a folder")
    build_repvgg("cifar-s", (8, 8, 1), 10).save(folder / "other_variant.keras")
    model = build_repvgg("digits", (8, 8, 1), 10)
    model.save(folder / "model.keras")
    content = (folder / "model.keras").read_bytes()
    (folder / "truncated.keras").write_bytes(content[: len(content) // 2])
    facts = {"dataset": "digits", "size": [8, 8], "mean": 128.0, "std": 128.0, "validation_held_out": False}
    for name in (
        "run",
        "truncated_run",
        "fused_run",
        "nan_run",
        "nan_branches_run",
        "quantized_run",
        "other_classes_run",
        "damaged_run",
    ):
        (folder / name).mkdir()
        (folder / name / runs.INPUT_NAME).write_text(json.dumps(facts))
    shutil.copy(folder / "model.keras", folder / "run")
    (folder / "other_labels_run").mkdir()
    shutil.copy(folder / "model.keras", folder / "other_labels_run")
    labels = ["zero", *map(str, range(1, 10))]
    (folder / "other_labels_run" / runs.INPUT_NAME).write_text(json.dumps(facts | {"labels": labels}))
    (folder / "no_classes" / "train").mkdir(parents=True)
    for split, label in itertools.product(("train", "test"), ("cat", "dog")):
        (folder / "photos" / split / label).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / "photos" / split / label / "a.png")
    (folder / "photos" / "train" / "dog" / "b.png").write_bytes(b"")
    (folder / "run" / runs.CONFIG_NAME).write_text("--epochs=10\n--norm=bn\n")
    shutil.copy(folder / "truncated.keras", folder / "truncated_run" / runs.MODEL_NAME)
    fused = fuse(model)
    fused.save(folder / "fused_run" / runs.MODEL_NAME)
    broken = keras.models.clone_model(fused)
    broken.get_layer("stem").bias.assign(np.full(16, np.nan))
    broken.save(folder / "nan_run" / runs.MODEL_NAME)
    broken = keras.models.clone_model(model)
    broken.weights[0].assign(np.full(broken.weights[0].shape, np.nan))
    broken.save(folder / "nan_branches_run" / runs.MODEL_NAME)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1))
    ptq.quantize(fused, calibration=images).save(folder / "quantized_run" / runs.MODEL_NAME)
    build_repvgg("digits", (8, 8, 1), 3).save(folder / "other_classes_run" / runs.MODEL_NAME)
    checkpoint = folder / "damaged_run" / "checkpoints" / "ckpt-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.index").write_bytes(b"\0" * 40)
    (checkpoint / "state.data-00000-of-00001").write_bytes(b"\0" * 40)
    return folder


def content_of(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob("*"))}


@pytest.fixture(scope="module")
def outcomes(here, tmp_path_factory, run_forked):
    """What every case wrote and how it ended."""
    folder = tmp_path_factory.mktemp("outcomes")
    before = content_of(here)
    found = {}
    for index, (name, (program, arguments, *_)) in enumerate(CASES.items()):
        new = folder / f"new{index}"
        found[name] = run_forked(program, *(argument.format(here=here, new=new) for argument in arguments))
        found[name].new = new
    found["changed"] = content_of(here).items() ^ before.items()
    return found


@pytest.mark.parametrize("case", CASES)
def test_bad_input(outcomes, case):
    program, _, *wanted = CASES[case]
    outcome = outcomes[case]
    assert outcome.status == 2, outcome.stderr[-3000:]
    *named, line = outcome.stderr.splitlines()
    assert named == (["bad image 'train/dog/b.png': empty"] if case == "folder with a bad image" else [])
    assert line.startswith(f"{program}: error: ")
    for words in wanted:
        assert any(word in line for word in words.split("|")), line
    assert not outcome.new.exists()


def test_bad_input_changes_nothing(outcomes):
    """Not one file, but for locks, and for the flags of a run whose own checkpoints turn out to be damaged."""
    changed = {str(path.relative_to(path.parents[1])) for path, _ in outcomes["changed"] if path.name != ".lock"}
    assert changed <= {f"damaged_run/{runs.CONFIG_NAME}", f"damaged_run/{runs.INPUT_NAME}"}


def test_one_bad_command_as_a_user_runs_it(run_program, tmp_path):
    """Without the forking helper: the same line and status from a real process."""
    result = run_program(TRAIN, f"--workdir={tmp_path / 'run'}", "--dataset=digitz")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "train/main.py: error: dataset 'digitz' is not in TFDS; "
        "known here: digits, cifar10, folder:PATH, or any TFDS name"
    ]
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ValueError("first\n  second"), FileNotFoundError("gone"), PermissionError("no")])
def test_errors_become_one_line(error, capfd):
    with pytest.raises(SystemExit) as exit_, cli.bad_input_exits():
        raise error
    assert exit_.value.code == 2
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1
    assert printed.endswith(f"error: {' '.join(str(error).split())}\n")


@pytest.mark.parametrize(
    "error, status",
    [
        (OSError(28, "No space left on device"), 1),
        (FloatingPointError("No finite loss left on device"), 3),
        (tf.errors.ResourceExhaustedError(None, None, "{{node x}} /events; No space left on device\n\tmore"), 1),
    ],
)
def test_failed_work_gives_one_line_and_another_status(error, status, capfd):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as exit_:
        cli._run(main, [])
    assert exit_.value.code == status
    assert re.fullmatch(r"\S+: error: [^\n{}]* left on device\n", capfd.readouterr().err)


def test_interrupted_by_the_user(capfd):
    def main(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        cli._run(main, [])
    assert exit_.value.code == 130
    assert capfd.readouterr().err.endswith("error: interrupted; what was written before is whole\n")


def test_faults_of_the_program_are_not_bad_input():
    with pytest.raises(KeyError), cli.bad_input_exits():
        raise KeyError
    with pytest.raises(KeyError):
        cli._run(lambda _: {}[0], [])


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    storage.write_json(path, {"top1_percent": 1})
    with pytest.raises(TypeError):
        storage.write_json(path, {"top1_percent": object()})
    assert json.loads(path.read_text()) == {"top1_percent": 1}
    with pytest.raises(RuntimeError), storage.atomic_write(tmp_path / "model.bin") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["report.json"]
    storage.write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"


def test_weights_are_copied_between_equal_networks_only(tmp_path):
    source, target = (build_repvgg("digits", (8, 8, 1), 10, norm=norm) for norm in ("bn", "oabn"))
    runs.copy_weights(source, target)
    for mine, its in zip(target.get_weights(), source.get_weights(), strict=True):
        assert (mine == its).all()
    for other in (
        build_repvgg("digits", (8, 8, 1), 11),
        build_repvgg("digits", (8, 8, 1), 10, identity="none"),
        build_repvgg("digits", (8, 8, 1), 10, block="qarepvgg"),
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]),
    ):
        before = target.get_weights()
        with pytest.raises(ValueError, match="the checkpoint is of another network"):
            runs.copy_weights(other, target)
        assert all((mine == its).all() for mine, its in zip(target.get_weights(), before, strict=True))


def test_a_run_knows_its_flags_again(tmp_path, digits):
    """Also when the program has since learned another one, as long as that keeps its default."""

    def check(*words, younger=False):
        values = absl_flags.FlagValues()
        define = {"flag_values": values, "module_name": sys.argv[0]}  # absl calls the main module so
        absl_flags.DEFINE_integer("epochs", 10, "", **define)
        absl_flags.DEFINE_boolean("validation", True, "", **define)
        if younger:
            absl_flags.DEFINE_float("ema", 0.0, "", **define)
        values(["main", *words])
        run = runs.Run(tmp_path)
        run.check_config(values)
        return run, values

    run, values = check("--epochs=3")
    run.start(values, digits)
    check("--epochs=3")
    check("--epochs=3", "--ema=0", younger=True)
    for words in (["--epochs=4"], ["--epochs=3", "--novalidation"], ["--epochs=3", "--ema=0.9"]):
        changed = words[-1].lstrip("-").removeprefix("no").partition("=")[0]
        with pytest.raises(ValueError, match=f"other values of {changed};"):
            check(*words, younger=True)
    _, values = check("--epochs=3")
    values.validation = False
    run.check_config(values, but=["validation"])
    values.epochs = 4
    with pytest.raises(ValueError, match="other values of epochs;"):
        run.check_config(values, but=["validation"])
