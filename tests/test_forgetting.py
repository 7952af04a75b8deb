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
