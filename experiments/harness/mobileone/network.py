"""MobileOne-S0 (arXiv:2206.04040) in deploy form, with weights that were trained on ImageNet by others."""

from pathlib import Path

import numpy as np
import tf_keras as keras

FILE = "mobileone_s0/mobileone_s0_deploy_imagenet.npz"
SIZE, CLASSES = 224, 1000


def load_network(data_dir: str | Path) -> keras.Model:
    """The float network, from normalized images [batch, 224, 224, 3] to 1000 logits.

    Args:
      data_dir: Folder that holds `FILE`, as the published repository awkrail/mobileone.c stores it.

    Raises:
      FileNotFoundError: If the file is missing.
    """
    path = Path(data_dir, FILE)
    if not path.exists():
        raise FileNotFoundError(f"{FILE} is missing in {str(data_dir)!r}; --data_dir names the folder that holds it")
    with np.load(path, allow_pickle=False) as arrays:
        weights = dict(arrays)
    inputs = keras.Input((SIZE, SIZE, 3), name="image")
    features = _convolve(inputs, weights, "stage0", stride=2)
    for stage in range(1, 5):
        layers = sum(name.startswith(f"stage{stage}.") and name.endswith(".weight") for name in weights)
        for index in range(layers):
            features = _convolve(features, weights, f"stage{stage}.{index}", stride=2 if index == 0 else 1)
    features = keras.layers.GlobalAveragePooling2D(name="pool")(features)
    logits = keras.layers.Dense(CLASSES, name="logits")
    outputs = logits(features)
    logits.set_weights([weights["linear.weight"].T, weights["linear.bias"]])
    return keras.Model(inputs, outputs, name="mobileone_s0")


def _convolve(features, weights, key, stride):
    """A convolution with ReLU and PyTorch's symmetric padding; depthwise where a filter reads one channel of many."""
    kernel, bias = weights[f"{key}.weight"].transpose(2, 3, 1, 0), weights[f"{key}.bias"]
    name = key.replace(".", "_")
    if kernel.shape[0] > 1:
        features = keras.layers.ZeroPadding2D(kernel.shape[0] // 2, name=f"{name}_padding")(features)
    options = {"strides": stride, "activation": "relu", "name": name}
    if kernel.shape[2] == 1 and features.shape[-1] > 1:
        layer = keras.layers.DepthwiseConv2D(kernel.shape[0], **options)
        kernel = kernel.transpose(0, 1, 3, 2)
    else:
        layer = keras.layers.Conv2D(kernel.shape[3], kernel.shape[0], **options)
    outputs = layer(features)
    layer.set_weights([kernel, bias])
    return outputs
