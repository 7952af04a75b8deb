"""Methods that learn say where they serve the images they learned from better than others."""

import numpy as np
import tf_keras as keras
from helpers.ptq import network_of

from tf_repvgg.quantization.ptq import METHODS


def adaquant_notes(images):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([64]), keras.layers.Dense(32, name="dense")])
    network = network_of(model, 3, False, images, iterations=200)
    METHODS["adaquant"].function(network)
    return [note for note in network.notes if "layers that serve the images they learned from" in note]


def test_layers_that_serve_only_what_they_learned_from_are_named():
    """A classifier of 64 inputs sees 32 images that have little in common, or that are mixtures of three."""
    generator = np.random.default_rng(0)
    unrelated, mixtures = (
        (generator.uniform(0, 1, (40, kinds)) @ generator.uniform(-1, 1, (kinds, 64))).astype("float32")
        for kinds in (60, 3)
    )
    (note,) = adaquant_notes(unrelated)
    assert note.startswith("AdaQuant: ") and note.endswith(": dense")
    assert adaquant_notes(mixtures) == []


def test_few_images_are_not_held_out():
    network = network_of(keras.Sequential([keras.Input([2]), keras.layers.Dense(2)]), 8, False, np.ones([4, 2]))
    learned, held_out = network.calibration.split(seed=0)
    assert set(learned) == set(held_out) == {0, 1, 2, 3}


def make_classifier(classes=10, activation=None):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((16, 16, 3)), keras.layers.Conv2D(16, 3, 2, activation="relu"), keras.layers.Flatten()]
    return keras.Sequential([*layers, keras.layers.Dense(classes, activation)])


def make_impressions(model, images):
    network = network_of(model, 4, False, images)
    assert network.reference_outputs[0].shape[0] == len(images)
    METHODS["class_impressions"].function(network)
    assert network.reference_outputs[0].shape[0] == network.calibration.count
    return network


def test_impressions_show_all_classes():
    """Images of one class become images of ten, within the images' range; probabilities serve as well as logits."""
    generator = np.random.default_rng(0)
    images = (generator.uniform(-1, 1, (1, 16, 16, 3)) + generator.normal(0, 0.05, (40, 16, 16, 3))).astype("float32")
    network = make_impressions(make_classifier(), images)
    (impressions,) = network.calibration.inputs
    assert impressions.shape == (2 + 60, 16, 16, 3) and impressions.dtype == np.float32
    assert all(np.any(np.all(image == images, axis=(1, 2, 3))) for image in impressions[:2])
    assert images.min() <= impressions.min() and impressions.max() <= images.max()
    counts = np.bincount(np.argmax(network.reference_outputs[0], axis=1), minlength=10)
    assert len(np.unique(np.argmax(make_classifier()(images), axis=1))) <= 2 and np.all(counts >= 1)
    others = make_impressions(make_classifier(activation="softmax"), images)
    np.testing.assert_allclose(others.calibration.inputs[0], impressions, atol=1e-3)
    assert network.notes == others.notes == []


def test_networks_without_classes_have_no_impressions():
    images = np.ones([5, 16, 16, 3], np.float32)
    for model, batch, reason in (
        (make_classifier(classes=1), images, "one score for each of three classes"),
        (keras.Sequential([keras.Input([64]), keras.layers.Dense(5)]), np.ones([5, 64], np.float32), "not one image"),
    ):
        network = make_impressions(model, batch)
        (note,) = network.notes
        assert reason in note and network.calibration.count == 5
