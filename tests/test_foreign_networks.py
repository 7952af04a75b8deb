"""Networks from elsewhere on the command line of export/main.py, and class numbers from a file."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import checkpoints, fusion, runs
from tf_repvgg.data import ClassificationData, ClassNumbers, Preprocessing
from tf_repvgg.models import build_repvgg

CLASSIFIER = Path(__file__).parent / "reference" / "keras3" / "classifier.keras"  # 16x16 pixels, 10 classes
REFUSED = CLASSIFIER.with_name("refused_lambda.keras")
EXPORT = "export/main.py"
QUICK = ("--calibration_images=4", "--latency_runs=0")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with photographs of two of ten classes, whose alphabetical order is not that of their numbers."""
    folder = tmp_path_factory.mktemp("foreign")
    generator = np.random.default_rng(0)
    for split, label in (("train", "n02"), ("train", "n01"), ("test", "n02"), ("test", "n01"), ("test", "n03")):
        (folder / "photos" / split / label).mkdir(parents=True)
        for index in range(3):
            png = tf.io.encode_png(generator.integers(0, 256, (18, 16, 3), np.uint8)).numpy()
            (folder / "photos" / split / label / f"{index}.png").write_bytes(png)
    (folder / "labels.csv").write_text("folder,number,name\nn01,7,a cat\nn02,2,a dog\n\nn03,0,\n")
    (folder / "list.txt").write_text("n03\nx1\nn02\nx3\nx4\nx5\nx6\nn01\nx8\nx9\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "short.csv").write_text("n01,7\nn03,1\n")
    (folder / "twice.csv").write_text("n01,7\nn02,2\nn01,3\n")
    (folder / "large.csv").write_text("n01,10\nn02,2\n")
    (folder / "short.txt").write_text("n01\nn02\nn03\n")
    (folder / "damaged.keras").write_bytes(CLASSIFIER.read_bytes()[:9000])
    keras.Sequential([keras.Input([16]), keras.layers.Dense(10)]).save(folder / "vectors.keras")
    images = keras.Input([16, 16, 3])
    features = keras.layers.Lambda(lambda x: 2 * x, name="code")(keras.layers.Conv2D(4, 3, name="conv")(images))
    keras.Model(images, keras.layers.GlobalAveragePooling2D()(features)).save(folder / "code.keras")
    network = build_repvgg("digits", (16, 16, 3), 10, padding="symmetric")
    checkpoints.save_torch(network, folder / "training.safetensors")
    checkpoints.save_torch(fusion.fuse(network), folder / "deploy.safetensors", "timm_repvgg")
    return folder


def flags_of(here, init_from, *more, labels="labels.csv"):
    return [
        f"--init_from={init_from}",
        f"--dataset=folder:{here / 'photos'}",
        f"--labels={here / labels}",
        *QUICK,
        *more,
    ]


def test_a_file_of_keras_3_becomes_an_integer_file_and_a_run(here, tmp_path, run_forked):
    """Images have the model's size, and classes the numbers of the file; the network is written as that of a run."""
    outcome = run_forked(EXPORT, *flags_of(here, CLASSIFIER, "--normalization=none", f"--output={tmp_path / 'first'}"))
    assert outcome.status == 0, outcome.stderr[-2000:]
    record = json.loads((tmp_path / "first" / "export.json").read_text())
    assert record["input"]["size"] == [16, 16]
    assert record["input"]["labels"] == ["n03", "1", "n02", "3", "4", "5", "6", "n01", "8", "9"]
    predictions = dict(np.load(tmp_path / "first" / "predictions.npz"))
    assert sorted(predictions["labels"]) == [0, 0, 0, 2, 2, 2, 7, 7, 7]
    workdir = tmp_path / "first" / "network"
    preprocessing = Preprocessing.from_metadata(runs.read_input(workdir))
    assert preprocessing == Preprocessing((16, 16), 0.0, 1.0)
    numbers = ClassNumbers.read(here / "list.txt", 10)
    data = ClassificationData(f"folder:{here / 'photos'}", None, preprocessing, hold_out=False, class_numbers=numbers)
    images, labels = next(data.evaluation("test").as_numpy_iterator())
    np.testing.assert_array_equal(labels, predictions["labels"])
    expected = np.argmax(checkpoints.load_keras(CLASSIFIER)(images), axis=1)
    np.testing.assert_array_equal(predictions["float_fused"], expected)
    np.testing.assert_array_equal(np.argmax(runs.load_model(workdir)(images), axis=1), expected)


def test_outliers_of_a_pytorch_network_need_no_images(here, run_forked):
    """In deploy form."""
    outcome = run_forked(EXPORT, f"--init_from={here / 'deploy.safetensors'}", "--variant=digits", "--outliers_only")
    assert outcome.status == 0, outcome.stderr[-2000:]
    assert [line.split()[0] for line in outcome.stdout.splitlines()[2:5]] == ["stem", "stage1_block1", "stage1_block2"]


def test_trusted_files_may_hold_code(here, run_forked):
    outcome = run_forked(EXPORT, f"--init_from={here / 'code.keras'}", "--trust_model", "--outliers_only")
    assert outcome.status == 0, outcome.stderr[-2000:]
    assert [line.split()[0] for line in outcome.stdout.splitlines()[2:]] == ["conv"]


def test_a_pytorch_network_is_exported(here, tmp_path, run_forked):
    flags = ["--variant=digits", "--normalization=imagenet", "--image_size=16", "--evaluation_resize=18"]
    outcome = run_forked(EXPORT, *flags_of(here, here / "training.safetensors", *flags, f"--output={tmp_path}"))
    assert outcome.status == 0, outcome.stderr[-2000:]
    record = json.loads((tmp_path / "export.json").read_text())
    assert record["float_training_form_top1_percent"] == record["float_fused_top1_percent"]
    assert record["input"]["resize_shorter_side"] == 18
    source, target = (
        runs.load_model(tmp_path / "network"),
        build_repvgg("digits", (16, 16, 3), 10, padding="symmetric"),
    )
    checkpoints.load_torch(here / "training.safetensors", target)
    for actual, expected in zip(source.get_weights(), target.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)


# {case: (flags in place of those of a network that is exported, text in the error)}; None leaves a flag out.
BAD_FLAGS = {
    "neither": ({"init_from": None}, "give either --workdir, the folder of a run, or --init_from"),
    "folder": ({"init_from": "photos"}, "photos is a folder; name the file of a network, or give a run as --workdir="),
    "missing file": ({"init_from": "nothing.keras"}, "no model at"),
    "damaged file": ({"init_from": "damaged.keras"}, "damaged.keras' is not a whole Keras model"),
    "refused layer": ({"init_from": REFUSED}, "layer 'double' (Lambda): it holds code of its own"),
    "code of its own": (
        {"init_from": "code.keras"},
        "layer 'code' names the class 'Lambda'; if you trust whoever made it",
    ),
    "no classifier of images": ({"init_from": "vectors.keras"}, "takes classifiers of images"),
    "no normalization": (
        {"normalization": None},
        "--normalization is missing; give what the network expects: symmetric",
    ),
    "no dataset": ({"dataset": None}, "--dataset is missing"),
    "no output": ({"output": None}, "--output is missing"),
    "other size": ({"image_size": "8"}, "the model takes images of shape (16, 16, 3)"),
    "variant of a Keras file": ({"variant": "A0"}, "--variant=A0 is for checkpoints of PyTorch"),
    "no variant": ({"init_from": "training.safetensors"}, "--variant is missing; name the network of"),
    "other variant": (
        {"init_from": "training.safetensors", "variant": "cifar-s", "image_size": "16"},
        "is of another network",
    ),
    "no labels": ({"labels": None}, "has the class 'n03' in test but not in train"),
    "missing labels": ({"labels": "nothing.csv"}, "nothing.csv"),
    "empty labels": ({"labels": "empty.txt"}, "empty.txt' names no class"),
    "labels without a class of the folder": (
        {"labels": "short.csv"},
        "dataset 'folder:photos' has the class 'n02', which is not among the 2 classes of the labels ('n01', 'n03'",
    ),
    "class twice": ({"labels": "twice.csv"}, "names the class 'n01' twice, as 7 and 3"),
    "number beyond the outputs": ({"labels": "large.csv"}, "gives the number 10 to the class 'n01'"),
    "list that is too short": ({"labels": "short.txt"}, "lists 3 classes, but the model distinguishes 10"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_give_one_line(case, here, tmp_path, run_forked):
    changes, message = BAD_FLAGS[case]
    flags = {
        "init_from": CLASSIFIER,
        "dataset": f"folder:{here / 'photos'}",
        "labels": "labels.csv",
        "normalization": "none",
        "output": tmp_path / "output",
        **changes,
    }
    for name in {"init_from", "labels"} & {name for name, value in flags.items() if value}:
        flags[name] = here / flags[name]
    outcome = run_forked(EXPORT, *(f"--{name}={value}" for name, value in flags.items() if value), *QUICK)
    assert outcome.status == 2, outcome.stderr[-2000:]
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"{EXPORT}: error: ") and message in line
    assert not (tmp_path / "output").exists()


def test_names_of_classes_in_files(tmp_path):
    path = tmp_path / "synsets.txt"
    path.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n\n", encoding="utf-8-sig")
    assert ClassNumbers.read(path, 2).labels == ("n01440764", "n01443537")
    path = tmp_path / "table.csv"
    for content, message in {
        "cat,0\ndog,0\n": "gives the number 0 to two classes, 'cat' and 'dog'",
        "name,number\ncat,x\n": "line 2 of .* is 'cat,x'; write the name of a class, a comma, and its number",
        "cat\n": "line 1 of .* is 'cat'",
        "cat,-1\ndog,-2\n": "line 2 of .* is 'dog,-2'",
        "name,number\n": "names no class",
    }.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            ClassNumbers.read(path, 2)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no text file in UTF-8"):
        ClassNumbers.read(path, 2)
