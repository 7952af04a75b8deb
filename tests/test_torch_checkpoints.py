"""Checkpoints of PyTorch networks: the same logits, the way back, and everything that is refused. Needs no PyTorch."""

import dataclasses
import os
import pickle
import zipfile

import numpy as np
import pytest
import tf_keras as keras
from helpers import torch_references
from helpers.torch_references import REFERENCES, path_of
from safetensors.numpy import load_file, save_file

from tf_repvgg import fusion
from tf_repvgg.checkpoints import LoadedWeights, load_torch, save_torch
from tf_repvgg.models import build_repvgg

REPVGG = load_file(path_of("repvgg"))


@pytest.fixture(scope="module")
def training_model():
    return torch_references.build("repvgg")


@pytest.fixture(scope="module")
def deploy_model(training_model):
    return fusion.fuse(training_model)


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_are_those_of_pytorch_and_the_way_back_is_exact(name, tmp_path):
    """In training form, fused here, and in deploy form; for images of odd and of even size, no squares."""
    model = torch_references.build(name)
    assert load_torch(path_of(name), model) == LoadedWeights(name.removesuffix("_se"), "training")
    fused = fusion.fuse(model)
    assert torch_references.measure_difference(name, "training", model) < 2e-6
    assert torch_references.measure_difference(name, "training", fused) < 2e-6
    fused.set_weights([np.zeros_like(array) for array in fused.get_weights()])
    deploy_layout = REFERENCES[name][2]
    assert load_torch(path_of(name, "deploy"), fused) == LoadedWeights(deploy_layout, "deploy")
    assert torch_references.measure_difference(name, "deploy", fused) < 2e-6
    for form, saved, layout in (("training", model, name.removesuffix("_se")), ("deploy", fused, deploy_layout)):
        save_torch(saved, tmp_path / "back.safetensors", layout)
        original, back = load_file(path_of(name, form)), load_file(tmp_path / "back.safetensors")
        assert back.keys() == original.keys()
        for key, array in original.items():
            is_counter = key.endswith("num_batches_tracked")
            np.testing.assert_array_equal(back[key], np.zeros_like(array) if is_counter else array, strict=True)


def test_same_padding_is_accepted_where_it_is_symmetric(training_model, tmp_path):
    """For 33 pixels all strided blocks read odd sizes; for 34 or an unknown size they would be off by one."""
    model = torch_references.build("repvgg", shape=(33, 33, 3), padding="same")
    load_torch(path_of("repvgg"), model)
    load_torch(path_of("repvgg"), training_model)
    images = np.random.default_rng(0).standard_normal((1, 33, 33, 3)).astype("float32")
    np.testing.assert_allclose(model(images), training_model(images), rtol=1e-5)
    even = torch_references.build("repvgg_se", shape=(34, 34, 3), padding="same")
    for form, model in (("training", even), ("deploy", fusion.fuse(even))):
        with pytest.raises(ValueError, match="'stem' pads as Keras does, PyTorch pads symmetrically"):
            load_torch(path_of("repvgg_se", form), model)
        with pytest.raises(ValueError, match="padding='symmetric'"):
            save_torch(model, tmp_path / "x.safetensors")


def write_npz(path, arrays):
    np.savez(path, **arrays)
    return path


def test_prefixes_types_and_formats(training_model, tmp_path):
    """A prefix before every key, and numbers of 16 and 64 bits in an .npz, as float32."""
    arrays = {f"module.model.{key}": array for key, array in REPVGG.items()}
    arrays["module.model.stage0.rbr_1x1.conv.weight"] = arrays["module.model.stage0.rbr_1x1.conv.weight"].astype("f2")
    arrays["module.model.linear.bias"] = arrays["module.model.linear.bias"].astype("f8")
    loaded = load_torch(write_npz(tmp_path / "weights.npz", arrays), training_model)
    assert (loaded.layout, loaded.notes) == ("repvgg", ())
    assert torch_references.measure_difference("repvgg", "training", training_model) < 1e-2

    bfloat16 = {key: array if array.dtype == "i8" else array.astype("bfloat16") for key, array in REPVGG.items()}
    save_file(bfloat16, tmp_path / "weights.safetensors")
    load_torch(tmp_path / "weights.safetensors", training_model)
    kernel = training_model.get_layer("stem").conv3x3.kernel.numpy()
    expected = bfloat16["stage0.rbr_dense.conv.weight"].astype("f4").transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel, expected)


def test_a_head_of_other_classes_stays_fresh():
    model = torch_references.build("repvgg", num_classes=3)
    kernel = model.get_layer("logits").get_weights()[0]
    loaded = load_torch(path_of("repvgg"), model)
    assert loaded.fresh_layers == ("logits",)
    assert loaded.notes == ("layer 'logits' keeps its own weights: the file has another number of classes",)
    np.testing.assert_array_equal(model.get_layer("logits").get_weights()[0], kernel)

    features = model.get_layer("pool").output
    model = keras.Model(model.inputs, keras.layers.Dense(2, name="mine")(features))
    loaded = load_torch(path_of("repvgg"), model)
    assert loaded.fresh_layers == ("mine",)
    assert loaded.notes == (
        "the model has no layer 'logits', so the last layer in the file is not used",
        "layer 'mine' keeps its own weights: the file has none for it",
    )


def test_oabn_says_what_it_clips_and_writes_what_is_in_force(training_model, tmp_path):
    model = torch_references.build("repvgg", norm="oabn", oabn_k=0.5)
    (note,) = load_torch(path_of("repvgg"), model).notes
    assert "OABN clips" in note
    save_torch(model, tmp_path / "clipped.safetensors")
    assert load_torch(tmp_path / "clipped.safetensors", training_model).notes == ()
    images = torch_references.read_results()["images_0"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(model(images), training_model(images), rtol=1e-5)


def test_other_strides_are_noted():
    """They are not in a file, and the same shapes with another stride are another network."""
    variant = dataclasses.replace(REFERENCES["repvgg"][0], stem_stride=1)
    model = build_repvgg(variant, (None, None, 3), 5, padding="symmetric")
    (note,) = load_torch(path_of("repvgg"), model).notes
    assert "other ones than published networks in stem," in note


class Touch:
    """Its pickle makes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_safetensors(path, arrays):
    save_file(arrays, path)
    return path


def replace(key, array):
    return REPVGG | {key: np.asarray(array, REPVGG[key].dtype)}


def make_hostile_file(case, folder):
    """A file that must be refused, and what the message must say."""
    whole, path = path_of("repvgg").read_bytes(), folder / f"{case.replace(' ', '_')}.safetensors"
    mean, kernel = "stage1.0.rbr_dense.bn.running_mean", "stage0.rbr_dense.conv.weight"
    poisoned = REPVGG[mean].copy()
    poisoned[3] = np.nan
    if case == "pickled objects":
        path = path.with_suffix(".npz")
        return write_npz(path, REPVGG | {kernel: np.array(Touch(folder / "ran"), object)}), "pickled objects"
    if case == "pickle":
        path = path.with_suffix(".pth")
        path.write_bytes(pickle.dumps({"state_dict": Touch(folder / "ran")}, protocol=2))
        return path, "needs PyTorch; install it|asks for posix.mkdir, which could run any code"
    if case == "no such file":
        return folder / "gone.safetensors", "no file of weights at"
    if case == "another kind of file":
        return write_safetensors(path.with_suffix(".h5"), REPVGG), "it must end in .safetensors, .npz, .pth"
    if case == "array shorter than its header says":
        path = path.with_suffix(".npz")
        header = np.lib.format.header_data_from_array_1_0(REPVGG[kernel])
        with zipfile.ZipFile(path, "w") as archive:
            for key, array in REPVGG.items():
                with archive.open(f"{key}.npy", "w") as file:
                    if key == kernel:
                        np.lib.format.write_array_header_1_0(file, header)
                    else:
                        np.lib.format.write_array(file, array)
        return path, f"'{kernel}.npy' in|is damaged: its header states another size than the file has"
    contents = {"empty": b"", "truncated": whole[:-1], "header of 2 GiB": (2**31).to_bytes(8, "little") + whole}
    if case in contents:
        path.write_bytes(contents[case])
        return path, "is not a whole file of weights"
    arrays, message = {
        "no weights": ({}, "holds no weights"),
        "not a number": (replace(mean, poisoned), f"damaged: {mean} holds numbers that are not finite"),
        "too large for float32": (
            REPVGG | {kernel: np.full(REPVGG[kernel].shape, 1e39)},
            f"damaged: {kernel} holds numbers that are not finite",
        ),
        "variance below 0": (
            replace("stage1.0.rbr_dense.bn.running_var", -np.ones(8)),
            "rbr_dense.bn.running_var holds variances below 0",
        ),
        "whole numbers": (
            REPVGG | {kernel: np.ones(REPVGG[kernel].shape, "i1")},
            f"{kernel} holds numbers of type I8; block 'stem' needs floats",
        ),
        "another width": (
            replace("stage2.0.rbr_dense.conv.weight", np.zeros((12, 8, 3, 3))),
            "stage2.0.rbr_dense.conv.weight has the shape [12, 8, 3, 3], block 'stage2_block1' needs [16, 8, 3, 3]",
        ),
        "key too few": (
            {key: array for key, array in REPVGG.items() if key != "stage1.1.rbr_identity.bias"},
            "lacks stage1.1.rbr_identity.bias, which block 'stage1_block2' needs",
        ),
        "key too many": (
            REPVGG | {"stage1.1.alpha": np.ones(1)},
            "it has stage1.1.alpha, which the model",
        ),
        "other features": (replace("linear.weight", np.ones((5, 7))), "linear.weight has the shape [5, 7]"),
        "scalar for a head": (replace("linear.weight", 1), "linear.weight has the shape []"),
        "unknown names": (
            {"features.0.weight": np.ones(3)},
            "(features.0.weight, ...) are of no known layout",
        ),
        "two networks": (
            {f"{prefix}.{key}": array for prefix in ("student", "teacher") for key, array in REPVGG.items()},
            "several networks, under 'student.', 'teacher.'",
        ),
    }[case]
    return write_safetensors(path, arrays), message


@pytest.mark.parametrize(
    "case",
    [
        *("pickled objects", "pickle", "no such file", "another kind of file", "array shorter than its header says"),
        *("empty", "truncated", "header of 2 GiB", "no weights", "not a number", "too large for float32"),
        *("variance below 0", "whole numbers", "another width", "key too few", "key too many", "other features"),
        *("scalar for a head", "unknown names", "two networks"),
    ],
)
def test_hostile_files_are_refused_in_one_line(case, training_model, tmp_path):
    """The line names the file; no code in the file has run, and the model is unchanged."""
    path, message = make_hostile_file(case, tmp_path)
    before = training_model.get_weights()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_torch(path, training_model)
    assert str(path) in str(caught.value)
    assert any(alternative in str(caught.value) for alternative in message.split("|")), caught.value
    assert len(str(caught.value)) < 400 + len(str(path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    for array, expected in zip(training_model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_other_networks_are_refused(training_model, deploy_model):
    refusals = {
        ("repvgg", "deploy", "holds weights in deploy form (merged), the model is in training form"): training_model,
        ("repvgg", "training", "load them into a model in training form, and fuse that"): deploy_model,
        ("qarepvgg", "training", "it has blocks of the kind 'qarepvgg', the model has 'repvgg'"): training_model,
        ("repvgg_se", "training", "stage0.rbr_dense.conv.weight has the shape [16, 3, 3, 3]"): training_model,
        ("repvgg", "training", "epsilon 0.001, PyTorch's have 1e-05"): torch_references.build("repvgg", epsilon=1e-3),
        ("repvgg", "training", "stage1.1.rbr_identity"): torch_references.build("repvgg", identity="none"),
        ("repvgg", "training", "no layers named stem"): keras.Sequential([keras.layers.Dense(2, input_shape=[3])]),
    }
    for (name, form, message), model in refusals.items():
        with pytest.raises(ValueError) as caught:
            load_torch(path_of(name, form), model)
        assert message in str(caught.value)


def test_the_refusal_of_another_variant_names_it(training_model, tmp_path):
    """From the widths, depths, groups and branches in the file."""
    save_torch(build_repvgg("digits", (8, 8, 3), 10, padding="symmetric"), tmp_path / "x.safetensors", "timm_repvgg")
    with pytest.raises(ValueError, match=r"of another network .its blocks are those of variant digits.: stem.conv_kxk"):
        load_torch(tmp_path / "x.safetensors", training_model)


def test_saving_refuses_what_the_other_project_could_not_load(training_model, tmp_path):
    path = tmp_path / "x.safetensors"
    refusals = [
        (training_model, path, "nfnet", "layout is 'nfnet'; known: repvgg, qarepvgg, timm_repvgg, mobileone"),
        (training_model, path, "qarepvgg", "of blocks of the kind 'qarepvgg', but the model has 'repvgg'"),
        (training_model, tmp_path / "x.h5", None, "must end in .safetensors"),
        (torch_references.build("repvgg", identity="none"), path, None, "'stage1_block2' has no identity branch"),
        (torch_references.build("repvgg", identity="constant"), path, None, "has a constant identity branch"),
    ]
    for model, target, layout, message in refusals:
        with pytest.raises(ValueError) as caught:
            save_torch(model, target, layout)
        assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


FINE_TUNING = """
import sys
import numpy as np
import new_network
from absl import flags
from tf_repvgg import checkpoints, fusion, models
from tf_repvgg.data import ClassificationData

flags.FLAGS(["train", "--padding=symmetric", "--variant=digits"])
data, path = ClassificationData("digits"), sys.argv[1]
source = models.build_network("digits", data.image_shape, data.num_classes, padding="symmetric")
images = np.random.default_rng(0).standard_normal((2, *data.image_shape)).astype("float32")
for model in (source, fusion.fuse(source)):
    checkpoints.save_torch(model, path)
    loaded = new_network.load_torch_network(path, data, seed=1)
    assert loaded.count_params() == model.count_params()
    np.testing.assert_allclose(loaded(images), source(images), rtol=1e-3, atol=1e-4)
print("both forms")
"""


def test_train_takes_both_forms_to_fine_tune_with_quantization(run_forked, tmp_path):
    (tmp_path / "script.py").write_text(FINE_TUNING)
    outcome = run_forked(tmp_path / "script.py", tmp_path / "weights.safetensors", import_from="train")
    assert outcome.stdout.endswith("both forms\n"), outcome.stderr
