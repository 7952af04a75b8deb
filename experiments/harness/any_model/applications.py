"""Networks of keras.applications with random weights: how often their integer files agree with the float network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from harness.any_model import judge
from tf_repvgg import fusion, graph, native_output, tflite
from tf_repvgg.quantization import cluster_quantize, ptq, strip_cluster_quantize

_MODULES = {
    "MobileNet": "mobilenet",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV3Small": "mobilenet_v3",
    "EfficientNetV2B0": "efficientnet_v2",
    "ResNet50V2": "resnet_v2",
    "DenseNet121": "densenet",
}
NETWORKS = tuple(_MODULES)
TENSORFLOW = "TensorFlow"

_SIZE, _CLASSES = 96, 10
# Rounding adds up over the 270 layers of this network.
_FUSION_TOLERANCES = {"EfficientNetV2B0": 1e-3}

# {way: function (fused model, calibration) -> file}
WAYS: dict[str, Callable[[keras.Model, np.ndarray], bytes]] = {
    "convert": tflite.convert,
    "min_max": lambda model, images: tflite.convert(
        ptq.quantize(model, "min_max", per_channel=True, calibration=images)
    ),
    "mse": lambda model, images: tflite.convert(ptq.quantize(model, "mse", per_channel=True, calibration=images)),
    "relative": lambda model, images: tflite.convert(
        ptq.quantize(model, "relative", per_channel=True, calibration=images)
    ),
    "ClusterQAT": lambda model, images: tflite.convert(
        strip_cluster_quantize(cluster_quantize(model, 64, cluster_per_channel=True, calibration=images))
    ),
}


def load_photographs(folder: Path, count: int) -> np.ndarray:
    """Photographs of all classes as pixels from 0 to 255, float32 [count, 96, 96, 3].

    Args:
      folder: Folder with a folder of JPEG files for each class.
      count: Number of photographs.

    Raises:
      FileNotFoundError: If there are fewer.
    """
    classes = [sorted(path.glob("*.JPEG")) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    rounds = max(map(len, classes), default=0)
    paths = [files[index] for index in range(rounds) for files in classes if index < len(files)][:count]
    if len(paths) < count:
        raise FileNotFoundError(f"{str(folder)!r} has {len(paths)} photographs in folders of classes, not {count}")
    images = [tf.io.decode_jpeg(tf.io.read_file(str(path)), channels=3) for path in paths]
    return np.stack([tf.image.resize(image, [_SIZE, _SIZE]).numpy() for image in images])


def make_network(name: str, pixels: np.ndarray) -> keras.Model:
    """A network with random weights, batch normalizations that fit the photographs, and logits that depend on them.

    Args:
      name: Name in `NETWORKS`.
      pixels: Photographs [count, 96, 96, 3].
    """
    keras.utils.set_random_seed(0)
    build = getattr(keras.applications, name)
    network = build(weights=None, input_shape=(_SIZE, _SIZE, 3), classes=_CLASSES, classifier_activation=None)
    for norm in graph.find_layers(network, keras.layers.BatchNormalization):
        norm.momentum = 0.0
    images = preprocess(name, pixels)
    network(images, training=True)
    # Features of random weights have a large common part: without this, one class would win on every image.
    classifier = [layer for layer in graph.leaves(network) if getattr(layer, "use_bias", False)][-1]
    classifier.bias.assign_sub(np.mean(network(images, training=False), axis=0).ravel())
    return network


def preprocess(name: str, pixels: np.ndarray) -> np.ndarray:
    """Photographs as a network takes them."""
    return getattr(keras.applications, _MODULES[name]).preprocess_input(pixels.copy())


def measure(name: str, calibration: np.ndarray, photographs: np.ndarray) -> dict[str, Any]:
    """The outcome of every way for one network.

    Args:
      name: Name in `NETWORKS`.
      calibration: Photographs for normalizations and calibration, pixels [count, 96, 96, 3].
      photographs: Photographs to classify.

    Returns:
      {"classes": number of classes that the float network predicts, "tolerance": that of the fusion, "ways": {way or
      TENSORFLOW: {"agreement_percent": share of images with the float network's class} or {"refused": reason}}}.
    """
    network = make_network(name, calibration)
    images, calibration_images = preprocess(name, photographs), preprocess(name, calibration)
    expected = np.argmax(network.predict(images, verbose=0), axis=-1)
    tolerance = _FUSION_TOLERANCES.get(name, 1e-4)
    fused = fusion.fuse(network, tolerance)
    ways: dict[str, Any] = {}
    for way, convert in {TENSORFLOW: _convert_by_tensorflow, **WAYS}.items():
        try:
            outputs = tflite.predict(convert(fused, calibration_images), images)
        except ValueError as error:
            verdict = judge.judge_error(error, is_early=True)
            ways[way] = {verdict.outcome: verdict.detail}
            continue
        agreement = np.argmax(np.reshape(outputs, [len(images), -1]), axis=-1) == expected
        ways[way] = {"agreement_percent": 100 * float(np.mean(agreement))}
    return {"classes": len(np.unique(expected)), "tolerance": tolerance, "ways": ways}


def _convert_by_tensorflow(model, images):
    """TensorFlow's own integer file of the fused float model, per channel."""
    function = tf.function(lambda image: model(image, training=False)).get_concrete_function(
        tf.TensorSpec((1, *images.shape[1:]), tf.float32)
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[np.newaxis]] for image in images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    with native_output.hide():
        return converter.convert()
