"""Whole networks of timm and of the original repositories beside ours, and PyTorch's own files; needs PyTorch and timm.

    pip install 'tf_repvgg[torch]'
    python -m pytest -rP tests/test_torch_networks.py  # prints the relative differences

The networks run in a process of their own: a part of PyTorch that timm imports (Triton) crashes where TensorFlow is.
"""

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tf_keras as keras
from helpers import torch_references
from helpers.torch_references import path_of
from safetensors.numpy import load_file

from tf_repvgg import fusion
from tf_repvgg.checkpoints import load_torch, save_torch
from tf_repvgg.models import VARIANTS, build_network, find_variant

NEEDS = "needs PyTorch and timm: pip install 'tf_repvgg[torch]'"
torch = pytest.importorskip("torch", reason=NEEDS)
if not importlib.util.find_spec("timm"):
    pytest.skip(NEEDS, allow_module_level=True)

SCRIPT = torch_references.FOLDER.parent / "make_torch_references.py"
TIMM_NAMES = [f"repvgg_{name}" for name in ["a0", "a1", "a2", "b0", "b1", "b1g4", "b2", "b2g4", "b3", "b3g4", "d2se"]]
TIMM_NAMES += [f"mobileone_s{number}" for number in range(5)]
ORIGINAL_NAMES = [name for name in VARIANTS if name[0] in "ABDS"]
# With random weights their logits move by percents where an image moves by a millionth, so that float32 decides them.
SENSITIVE = ("D2se", "S4")
# Inputs and logits of our networks are float32 in any case.
TOLERANCES = {"float32": 1e-4, "float64": 1e-5}


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    gc.collect()


def write_network(folder, builder, **arguments):
    command = [sys.executable, SCRIPT, folder, builder, json.dumps(arguments)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]


def check_network(folder, form, model, layout):
    """Loads weights into the model, compares logits, and compares what is written back."""
    loaded = load_torch(folder / f"{form}.safetensors", model)
    assert (loaded.layout, loaded.form, loaded.notes) == (layout, form, ())
    results = load_file(folder / f"{form}_results.safetensors")
    for number in range(2):  # images of odd and of even size
        expected = results[f"logits_{number}"]
        actual = model(results[f"images_{number}"].transpose(0, 2, 3, 1), training=False).numpy()
        difference = np.abs(actual - expected).max() / np.abs(expected).max()
        print(f"{layout}, {form}, image {number}: relative difference {difference:.1e}")
        assert difference < TOLERANCES[keras.mixed_precision.global_policy().compute_dtype]
    save_torch(model, folder / "back.safetensors", layout)
    original, back = load_file(folder / f"{form}.safetensors"), load_file(folder / "back.safetensors")
    assert original.keys() == back.keys()
    for key, array in original.items():
        assert key.endswith("num_batches_tracked") or np.array_equal(back[key], array), key


def build_model(variant, num_classes):
    """A model that computes in float64 if it is sensitive."""
    is_sensitive = variant in map(VARIANTS.get, SENSITIVE)
    keras.mixed_precision.set_global_policy("float64" if is_sensitive else "float32")
    return build_network(variant, (None, None, 3), num_classes, padding="symmetric")


def fuse(model):
    """The deploy form, in the type of the model; `fusion.fuse` merges in float32."""
    precision = keras.mixed_precision.global_policy().compute_dtype
    if precision == "float32":
        return fusion.fuse(model)
    config = model.get_config()
    for layer in config["layers"]:
        layer["config"]["dtype"] = "float32"
    config = fusion.fuse(keras.Model.from_config(config)).get_config()
    for layer in config["layers"]:
        layer["config"]["dtype"] = precision
    return keras.Model.from_config(config)


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_network_of_timm(name, tmp_path):
    write_network(tmp_path, "timm.create_model", model_name=name)
    layout, _, variant = f"timm_{name}".rpartition("_")
    model = build_model(find_variant(variant), 1000)
    check_network(tmp_path, "training", model, layout)
    fused = fuse(model)
    del model
    check_network(tmp_path, "deploy", fused, layout)


@pytest.mark.parametrize("name", ORIGINAL_NAMES)
def test_network_of_the_original_repository(name, tmp_path):
    variant = VARIANTS[name]
    options = {
        "repvgg": {"groups": variant.groups, "se": variant.se_reduction is not None},
        "mobileone": {"branches": variant.conv_branches, "se_blocks": variant.se_depths or [0] * len(variant.depths)},
    }[variant.family]
    shape = {"stem": variant.stem_width, "widths": variant.widths, "depths": variant.depths}
    write_network(tmp_path, variant.family, **shape, **options)
    check_network(tmp_path, "training", build_model(variant, 5), variant.family)


def read_state():
    return {key: torch.from_numpy(array) for key, array in load_file(path_of("repvgg")).items()}


@pytest.fixture(scope="module")
def model():
    return torch_references.build("repvgg")


def test_wrappers_prefixes_and_averages(model, tmp_path):
    """A moving average is preferred to the plain weights, and a note says so."""
    state = read_state()
    zeros = {key: torch.zeros_like(value) for key, value in state.items()}
    path = tmp_path / "checkpoint.pth.tar"
    contents = {
        "plain": (state, ()),
        "wrapped": ({"state_dict": state, "epoch": 3, "optimizer": {"lr": [0.1]}}, ()),
        "nested": ({"model": {"state_dict": {f"module.{key}": value for key, value in state.items()}}}, ()),
        "average": (
            {"state_dict": zeros, "state_dict_ema": {f"_orig_mod.{key}": value for key, value in state.items()}},
            ("the file's moving average 'state_dict_ema' was taken",),
        ),
        "bfloat16": ({"model": {**state, "linear.bias": state["linear.bias"].bfloat16().float().bfloat16()}}, ()),
    }
    for case, (content, notes) in contents.items():
        torch.save(content, path)
        assert load_torch(path, model).notes == notes, case
        tolerance = 1e-2 if case == "bfloat16" else 2e-6
        assert torch_references.measure_difference("repvgg", "training", model) < tolerance, case


def test_saved_pth_is_what_pytorch_loads(model, tmp_path):
    load_torch(path_of("repvgg"), model)
    save_torch(model, tmp_path / "weights.pth")
    back = torch.load(tmp_path / "weights.pth", weights_only=True)
    for key, value in read_state().items():
        assert back[key].shape == value.shape
        assert key.endswith("num_batches_tracked") or torch.equal(back[key], value), key


class Touch:
    """Its pickle makes a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
def test_code_in_a_pth_does_not_run(is_zip, model, tmp_path):
    path = tmp_path / "evil.pth"
    torch.save(
        {"state_dict": read_state() | {"x": Touch(tmp_path / "ran")}}, path, _use_new_zipfile_serialization=is_zip
    )
    with pytest.raises(ValueError, match=r"evil.pth' asks for posix.mkdir, which could run any code, so the file is"):
        load_torch(path, model)
    assert not (tmp_path / "ran").exists()


def test_other_files_of_pytorch_are_refused(model, tmp_path):
    path = tmp_path / "file.pt"

    torch.save(read_state(), path)
    whole = path.read_bytes()
    cases = {
        "asks for torch.nn.modules.linear.Linear": lambda: torch.save(torch.nn.Linear(2, 2), path),
        "asks for argparse.Namespace": lambda: torch.save({"args": argparse.Namespace(lr=1)}, path),
        "TorchScript": lambda: torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(path),
        "holds no weights": lambda: torch.save([1, 2], path),
        "is not a whole file of weights": lambda: path.write_bytes(whole[:-100]),
        "it ends too early": lambda: path.write_bytes(b""),
        "torch.save did not write it": lambda: path.write_bytes(b"\x80\x04weights"),
    }
    for message, write in cases.items():
        write()
        with pytest.raises(ValueError) as caught:
            load_torch(path, model)
        text = str(caught.value)
        assert message in text and str(path) in text
        assert "\n" not in text and "weights_only` to" not in text and len(text) < 300 + len(str(path))
