"""Weights of other frameworks: checkpoints of PyTorch networks into models of this package, and back."""

from tf_repvgg.checkpoints.files import is_torch_file
from tf_repvgg.checkpoints.inspection import TorchNetwork, inspect_torch
from tf_repvgg.checkpoints.keras_file import load_keras
from tf_repvgg.checkpoints.layouts import LAYOUTS, Layout
from tf_repvgg.checkpoints.torch_weights import LoadedWeights, load_torch, save_torch

__all__ = [
    "LAYOUTS",
    "Layout",
    "LoadedWeights",
    "TorchNetwork",
    "inspect_torch",
    "is_torch_file",
    "load_keras",
    "load_torch",
    "save_torch",
]
