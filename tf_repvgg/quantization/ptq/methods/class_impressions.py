"""Class impressions (Mopuri 2018, arXiv:1808.01153): calibration images that show the network every class it knows.

Methods that learn fit the classes of the calibration images and forget all others. Images need no labels, and need not
look like anything, for a network to see a class in them: gradients of its own outputs find such images. In contrast to
the paper, they start from crops of the calibration images, so that what the first layers see stays natural.
"""

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization.ptq.network import Network

_BATCH = 32
_STEPS = 8
# Of a step, in standard deviations of the calibration images, and the most that one value may move, relative to it.
_STEP_SIZE, _LARGEST_MOVE = 0.02, 3.0
# Sides of crops, relative to the image; shifts before each step, as a divisor of the side: without shifts, gradients
# leave patterns of the network's strides.
_SMALLEST_CROP, _SHIFTS = 3 / 7, 56
# Impressions for each calibration image, and the share of the images that stay. With photographs of a few classes as a
# quarter of all images, a network of 1000 classes still forgets the others; without any, it is worse on photographs.
_IMPRESSIONS, _KEPT = 1.5, 1 / 16


def class_impressions(network: Network) -> None:
    """Replaces the calibration images by impressions of random classes, one and a half for each; one in 16 stays.

    An impression is a random crop of a calibration image after gradient steps of the float network that raise the
    probability of a class. Classes are drawn evenly. Left out, with a note, for networks that do not have one image as
    input and scores of at least three classes as output, and for those without gradients.
    """
    calibration, model = network.calibration, network.float
    reason = _find_obstacle(model, calibration.inputs)
    if reason:
        network.notes.append(f"class impressions: left out, {reason}; the calibration images stay as they are")
        return
    images, classes = calibration.inputs[0], model.outputs[0].shape[-1]
    generator = np.random.default_rng(network.options.seed)
    count = round(_IMPRESSIONS * len(images))
    targets, sources = generator.integers(0, classes, count), generator.permutation(count) % len(images)
    step = _make_step(model, images)
    batch, parts = model.inputs[0].shape[0] or _BATCH, []
    for start in network.show_progress(range(0, count, batch), "class impressions", unit="batch"):
        crops = tf.stack([_crop(images[source], generator) for source in sources[start : start + batch]])
        for _ in range(_STEPS):
            shift = generator.integers(0, 1 + images.shape[1] // _SHIFTS, 2)
            crops = step(crops, tf.constant(targets[start : start + batch]), tf.constant(shift, tf.int32))
        parts.append(crops.numpy())
    kept = images[generator.choice(len(images), round(_KEPT * len(images)), replace=False)]
    network.replace_calibration([np.concatenate([kept, *parts])])


def _find_obstacle(model, inputs):
    """Why a network has no class impressions; None if it has."""
    if len(inputs) > 1 or inputs[0].ndim != 4 or inputs[0].dtype.kind != "f":
        return "the network's input is not one image"
    if len(model.outputs) > 1 or len(model.outputs[0].shape) != 2 or (model.outputs[0].shape[1] or 0) < 3:
        return "the network's output is not one score for each of three classes or more"
    with tf.GradientTape() as tape:
        image = tf.constant(inputs[0][: model.inputs[0].shape[0] or 1])
        tape.watch(image)
        outputs = _run(model, image)
    return None if tape.gradient(outputs, image) is not None else "the network has no gradient"


def _run(model, images):
    return model(graph.pack_inputs(model, [images]), training=False)


def _make_step(model, images):
    """A step that makes images look more like classes to the network."""
    lowest, highest, size = images.min(), images.max(), _STEP_SIZE * images.std()
    outputs = _run(model, tf.constant(images[: model.inputs[0].shape[0] or _BATCH])).numpy()
    are_probabilities = outputs.min() >= 0 and np.allclose(outputs.sum(axis=-1), 1, atol=1e-3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=not are_probabilities, reduction="sum")

    @tf.function
    def step(values, classes, shift):
        with tf.GradientTape() as tape:
            tape.watch(values)
            error = loss(classes, tf.nest.flatten(_run(model, tf.roll(values, shift, [1, 2])))[0])
        gradient = tape.gradient(error, values)
        gradient /= tf.reduce_mean(tf.abs(gradient), [1, 2, 3], keepdims=True) + 1e-12
        moved = values - size * tf.clip_by_value(gradient, -_LARGEST_MOVE, _LARGEST_MOVE)
        return tf.clip_by_value(moved, lowest, highest)

    return step


def _crop(image, generator):
    """A random square of an image, as large as the image."""
    height, width = image.shape[:2]
    side = generator.uniform(_SMALLEST_CROP, 1.0)
    rows, columns = max(1, round(side * height)), max(1, round(side * width))
    top, left = generator.integers(0, height - rows + 1), generator.integers(0, width - columns + 1)
    return tf.image.resize(image[top : top + rows, left : left + columns], [height, width])
