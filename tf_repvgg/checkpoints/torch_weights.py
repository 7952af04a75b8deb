"""Weights of PyTorch networks into models of this package, and back, exactly."""

import dataclasses
import re
from pathlib import Path
from typing import NoReturn

import numpy as np
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.checkpoints import files, layouts
from tf_repvgg.checkpoints.slots import HEAD, Network, Slot, find_slots
from tf_repvgg.checkpoints.variants import list_variants
from tf_repvgg.layers import OutlierAwareBatchNormalization, RepVGGBlock

_FORM_NAMES = {"training": "in training form", "deploy": "in deploy form (merged)"}


@dataclasses.dataclass(frozen=True)
class LoadedWeights:
    """What `load_torch` has done.

    Attributes:
      layout: Name of the file's layout in `LAYOUTS`.
      form: Form of the network in the file and in the model: "training" or "deploy".
      fresh_layers: Names of layers that the file has no weights for, which keep theirs.
      notes: One sentence for each thing that a user should know, such as a head that was left fresh.

    Example:
      >>> from tf_repvgg.checkpoints import LoadedWeights
      >>> LoadedWeights("timm_repvgg", "deploy").fresh_layers
      ()
    """

    layout: str
    form: str
    fresh_layers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_torch(path: str | Path, model: keras.Model) -> LoadedWeights:
    """Sets the weights of a model from a checkpoint of a PyTorch network, so that both compute the same logits.

    The layout (see `LAYOUTS`) is found from the names in the file. Wrappers such as "state_dict" and prefixes such as
    "module." are removed; of a moving average and the plain weights, the moving average is taken. float16, bfloat16
    and float64 become float32. Nothing in a file is run. Strides, the spread of OABN's limits and the preprocessing of
    images are not in such files: the model decides on them.

    Args:
      path: A .safetensors or .npz file, or, where torch is installed, one that torch.save has written (.pth, .pt,
        .pth.tar, .bin, .ckpt).
      model: Model from `models.build_repvgg` with padding="symmetric" for weights in training form, and its fused form
        (`fusion.fuse`) for merged weights. It may be part of a larger model.

    Returns:
      The layout, the layers without weights in the file, and notes. A head with another number of classes keeps its
      fresh weights.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is damaged, asks to run code, holds numbers that no network has, or is of another network
        or form; or if the model would compute something else with these weights. The model is unchanged then.

    Example:
      >>> from tf_repvgg.checkpoints import load_torch, save_torch
      >>> from tf_repvgg.models import build_repvgg
      >>> source, target = (build_repvgg("digits", (8, 8, 1), 10, padding="symmetric") for _ in range(2))
      >>> save_torch(source, "digits.safetensors")
      >>> load_torch("digits.safetensors", target).layout
      'repvgg'
      >>> bool((source.get_weights()[0] == target.get_weights()[0]).all())
      True
    """
    network = find_slots(model)
    with files.open_weights(path) as (arrays, average):
        detected = layouts.detect(path, arrays, network.kind)
        _check_kind(path, detected, network)
        slots = _match_slots(path, arrays, detected, network)
        notes = [f"the file's moving average {average!r} was taken"] if average else []
        values = {key: _read_array(path, key, arrays[key]) for key in slots}
    for key, slot in slots.items():
        slot.write(values[key])
    fresh_layers = _list_fresh_layers(network, slots)
    notes += _note_layers(network, fresh_layers) + _note_strides(network) + _note_clipping(model)
    return LoadedWeights(detected.name, detected.form, fresh_layers, tuple(notes))


def _check_kind(path, detected, network):
    """Refuses weights of another form, or of other blocks."""
    layout = layouts.LAYOUTS[detected.name]
    if detected.form != network.form:
        advice = (
            "load them into a model in training form, and fuse that"
            if detected.form == "training"
            else "load them into the fused form of the model (fusion.fuse); they cannot be split into branches"
        )
        raise ValueError(
            f"{str(path)!r} holds weights {_FORM_NAMES[detected.form]}, the model is {_FORM_NAMES[network.form]}; "
            f"{advice}"
        )
    if (kind := layout.kind_in(detected.form)) != network.kind:
        raise ValueError(
            f"{str(path)!r} is of another network: it has blocks of the kind {kind!r}, the model has {network.kind!r}"
        )


def _match_slots(path, arrays, detected, network) -> dict[str, Slot]:
    """{key in the file: slot}, in order of execution, after comparing names, shapes and types."""
    layout = layouts.LAYOUTS[detected.name]
    slots = {detected.prefix + layout.key(slot): slot for slot in network.slots}
    remaining = {key: array for key, array in arrays.items() if not key.endswith(f".{layouts.COUNTER}")}
    head_keys = [f"{detected.prefix}{layout.head}.{leaf}" for leaf in ("weight", "bias")]
    if _has_other_classes(arrays, slots, head_keys):
        for key in head_keys:
            slots.pop(key, None)
    if not set(head_keys) & set(slots):  # whether the model has no such head, or one with other classes
        remaining = {key: array for key, array in remaining.items() if key not in head_keys}

    def refuse(reason) -> NoReturn:
        variants = list_variants(arrays, detected)
        hint = f" (its blocks are those of variant {' or '.join(variants)})" if variants else ""
        raise ValueError(f"{str(path)!r} is of another network{hint}: {reason}")

    for key, slot in slots.items():
        place = f"layer {HEAD!r}" if slot.block == HEAD else f"block {slot.block!r}"
        if key not in remaining:
            refuse(f"it lacks {key}, which {place} needs" + _list_leftovers(remaining, slots))
        if remaining[key].shape != slot.torch_shape:
            refuse(f"{key} has the shape {list(remaining[key].shape)}, {place} needs {list(slot.torch_shape)}")
        if not remaining[key].is_float:
            refuse(f"{key} holds numbers of type {remaining[key].dtype}; {place} needs floats of 16, 32 or 64 bits")
    if leftovers := _list_leftovers(remaining, slots):
        refuse(f"it fits until the end{leftovers}")
    return slots


def _has_other_classes(arrays, slots, head_keys):
    """Whether the file's head reads the same features but has another number of classes."""
    key = head_keys[0]
    if key not in slots or key not in arrays or len(arrays[key].shape) != 2:
        return False
    (classes, *features), (expected_classes, *expected_features) = arrays[key].shape, slots[key].torch_shape
    return classes != expected_classes and features == expected_features


def _list_leftovers(remaining, slots):
    leftovers = [key for key in remaining if key not in slots]
    if not leftovers:
        return ""
    more = f" and {len(leftovers) - 3} more" if len(leftovers) > 3 else ""
    return f"; it has {', '.join(leftovers[:3])}{more}, which the model has no place for"


def _read_array(path, key, stored) -> np.ndarray:
    """An array in float32, if a network can have it."""
    with np.errstate(over="ignore"):
        array = stored.read().astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{str(path)!r} is damaged: {key} holds numbers that are not finite")
    if key.endswith(".running_var") and (array < 0).any():
        raise ValueError(f"{str(path)!r} is damaged: {key} holds variances below 0")
    return array


def _list_fresh_layers(network: Network, slots: dict[str, Slot]) -> tuple[str, ...]:
    is_head_loaded = any(slot.block == HEAD for slot in slots.values())
    return (HEAD, *network.other_layers) if network.has_head and not is_head_loaded else network.other_layers


def _note_layers(network: Network, fresh_layers: tuple[str, ...]) -> list[str]:
    notes = [] if network.has_head else [f"the model has no layer {HEAD!r}, so the last layer in the file is not used"]
    for layer in fresh_layers:
        reason = "has another number of classes" if layer == HEAD else "has none for it"
        notes.append(f"layer {layer!r} keeps its own weights: the file {reason}")
    return notes


def _note_strides(network: Network) -> list[str]:
    """Published networks halve the image in the stem and in the first block of each stage."""
    others = [
        name
        for name, stride in network.strides.items()
        if stride != (2 if re.fullmatch(r"stem|stage\d+_block1(_depthwise)?", name) else 1)
    ]
    if not others:
        return []
    return [
        f"strides are not in the file; the model has other ones than published networks in {', '.join(others)}, so its "
        "outputs are those of the file's network only if that has them too"
    ]


def _note_clipping(model: keras.Model) -> list[str]:
    norms = graph.find_layers(model, OutlierAwareBatchNormalization)
    gammas = [(norm.gamma.numpy(), norm.effective_gamma().numpy()) for norm in norms]
    clipped = sum(int((stored != effective).sum()) for stored, effective in gammas)
    if not clipped:
        return []
    total = sum(stored.size for stored, _ in gammas)
    return [
        f"OABN clips {clipped} of {total} gammas, so the outputs are not those of the file's network before training"
    ]


def save_torch(model: keras.Model, path: str | Path, layout: str | None = None) -> None:
    """Writes the weights of a model as the code of another project names them, for its `load_state_dict`.

    The counters num_batches_tracked, which PyTorch writes but these networks do not use, are 0. OABN's clipped gammas
    are written as they are in force, so that a plain batch normalization computes the same.

    Args:
      model: Model from `models.build_repvgg` with padding="symmetric", or its fused form.
      path: Name of the file: .safetensors, or .pth where torch is installed. It is written whole or not at all.
      layout: Name in `LAYOUTS`; by default that of the project which published the blocks.

    Raises:
      ValueError: If the layout is unknown or cannot hold the model, the model would compute something else in PyTorch,
        or the name of the file ends otherwise.
      OSError: If the file cannot be written.

    Example:
      >>> from safetensors.numpy import load_file
      >>> from tf_repvgg import checkpoints, fusion, models
      >>> model = fusion.fuse(models.build_repvgg("digits", (8, 8, 1), 10, padding="symmetric"))
      >>> checkpoints.save_torch(model, "digits.safetensors", layout="timm_repvgg")
      >>> sorted(load_file("digits.safetensors"))[:3]
      ['head.fc.bias', 'head.fc.weight', 'stages.0.0.reparam_conv.bias']
    """
    network = find_slots(model)
    layout = layout or network.kind
    if layout not in layouts.LAYOUTS:
        raise ValueError(f"layout is {layout!r}; known: {', '.join(layouts.LAYOUTS)}")
    row = layouts.LAYOUTS[layout]
    if (kind := row.kind_in(network.form)) != network.kind:
        raise ValueError(f"layout {layout!r} is of blocks of the kind {kind!r}, but the model has {network.kind!r}")
    if network.other_layers:
        raise ValueError(f"layer {network.other_layers[0]!r} has weights that layout {layout!r} has no names for")
    if cut := _find_missing_identity(model):
        raise ValueError(f"block {cut!r} has no identity branch, but in layout {layout!r} its block has one")
    arrays = {}
    for slot in network.slots:
        arrays[row.key(slot)] = slot.read()
        if slot.leaf == "moving_variance":
            arrays[f"{row.module(slot.block, slot.part)}.{layouts.COUNTER}"] = np.array(0, np.int64)
    files.write_weights(path, arrays)


def _find_missing_identity(model: keras.Model) -> str | None:
    """Name of a block that keeps the shape of its input and yet has no identity branch."""
    for block in graph.find_layers(model, RepVGGBlock):
        if block.norm_identity is None and block.may_have_identity:
            return block.name
    return None
