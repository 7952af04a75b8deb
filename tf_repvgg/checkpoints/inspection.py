"""What a checkpoint of a PyTorch network says about the network, before a model for it exists."""

import dataclasses
from pathlib import Path

from tf_repvgg.checkpoints import files, layouts


@dataclasses.dataclass(frozen=True)
class TorchNetwork:
    """The network of a checkpoint.

    Attributes:
      layout: Name of the layout in `LAYOUTS`.
      form: "training" or "deploy".
      kind: Kind of its blocks, see `Layout.kind`; in deploy form that of its merged layers.
      num_classes: Number of logits.

    Example:
      >>> from tf_repvgg.checkpoints import TorchNetwork
      >>> TorchNetwork("timm_repvgg", "deploy", "repvgg", num_classes=1000).form
      'deploy'
    """

    layout: str
    form: str
    kind: str
    num_classes: int


def inspect_torch(path: str | Path) -> TorchNetwork:
    """Finds out which kind of network a checkpoint is of, from names and shapes alone.

    Args:
      path: File as for `load_torch`.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is damaged, asks to run code, is of no known layout, or has no head.

    Example:
      >>> from tf_repvgg.checkpoints import inspect_torch, save_torch
      >>> from tf_repvgg.models import build_repvgg
      >>> save_torch(build_repvgg("digits", (8, 8, 1), 10, padding="symmetric"), "digits.safetensors")
      >>> inspect_torch("digits.safetensors")
      TorchNetwork(layout='repvgg', form='training', kind='repvgg', num_classes=10)
    """
    with files.open_weights(path) as (arrays, _):
        detected = layouts.detect(path, arrays)
        layout = layouts.LAYOUTS[detected.name]
        head = f"{detected.prefix}{layout.head}.weight"
        if head not in arrays or len(arrays[head].shape) != 2:
            raise ValueError(f"{str(path)!r} has no head ({head}), so it classifies nothing")
        return TorchNetwork(detected.name, detected.form, layout.kind_in(detected.form), arrays[head].shape[0])
