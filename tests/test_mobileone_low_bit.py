"""The experiment on few clusters in a network from ImageNet: its start, the choice of rates, its page."""

from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from tf_repvgg import checkpoints, fusion
from tf_repvgg.models import build_mobileone

METHODS = ("ClusterQAT", "LSQ", "tfmot in two epochs")


@pytest.fixture(scope="module")
def harness(experiments):
    """The parts of the experiment, importable as its program imports them."""
    from harness.low_bit.rows import Rows
    from harness.mobileone import fine_tuning, network
    from harness.pages.mobileone_low_bit import render

    return SimpleNamespace(Rows=Rows, fine_tuning=fine_tuning, network=network, render=render)


class FakeFineTunings:
    """Top-1 by a function of the setting."""

    def __init__(self, compute):
        self._compute = compute
        self.settings = []

    def measure(self, setting):
        self.settings.append(setting)
        is_right = np.arange(100) < self._compute(setting)
        fidelity = {"agreement_percent": 99.0, "trained_model_top1_percent": 50.0}
        return SimpleNamespace(top1=float(is_right.sum()), is_right=is_right, fidelity=fidelity, has_diverged=False)


def build_fused_network():
    return fusion.fuse(build_mobileone("cifar-mobileone", (32, 32, 3), 10, padding="symmetric"))


def test_the_start_is_a_checkpoint_of_mobileone(harness, tmp_path):
    """Arrays of the published file are called <block>.weight and <block>.bias."""
    network, path = build_fused_network(), tmp_path / harness.network.FILE
    path.parent.mkdir()
    checkpoints.save_torch(network, tmp_path / "whole.safetensors", layout="mobileone")
    arrays = load_file(tmp_path / "whole.safetensors")
    np.savez(path, **{key.replace(".reparam_conv", ""): values for key, values in arrays.items()})
    start, again = tmp_path / "runs" / "start.npz", build_fused_network()
    harness.fine_tuning.write_start(str(tmp_path), start)
    checkpoints.load_torch(start, again)
    for written, read in zip(network.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(read, written)


def test_rates_are_chosen_on_held_out_photographs_at_eight_clusters(harness):
    fine_tunings = FakeFineTunings(lambda setting: 90 - 1000 * abs(setting.rate - 2e-3))
    choices = harness.fine_tuning.Choices(fine_tunings, "base")
    assert choices.find_rate("LSQ", 4, "per_channel") == choices.find_rate("float", 0, "per_tensor") == 2e-3
    assert {setting.split for setting in fine_tunings.settings} == {"validation"}
    assert {(s.method, s.clusters, s.granularity) for s in fine_tunings.settings} == {
        ("LSQ", 8, "per_tensor"),
        ("float", 0, "per_tensor"),
    }
    assert choices.validation_top1_percent["LSQ"] == {"0.0005": 89.0, "0.002": 90.0, "0.008": 84.0}


def test_the_page_compares_methods(harness):
    lead = {"ClusterQAT": 90, "LSQ": 85, "tfmot in two epochs": 70, "float": 95}
    fine_tunings = FakeFineTunings(lambda setting: lead[setting.method])
    choices = harness.fine_tuning.Choices(fine_tunings, "base")
    rows = harness.Rows(fine_tunings, choices, {"MobileOne-S0": "base"})
    record = {
        "rows": [rows.make(["MobileOne-S0"], method, 8, "per_tensor", with_lead=True) for method in METHODS],
        "validation_top1_percent": choices.validation_top1_percent,
    }
    page = harness.render(record)
    assert "| 5.00 ± 4.27" in page and "| 20.00 ± 7.84" in page
    assert "lead over tfmot in two epochs" in page
