"""Fusion refuses models that it cannot fuse, and results that are not the same function."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from helpers.fusion import assert_same_function, images
from helpers.random_weights import randomize

from tf_repvgg.fusion import fuse
from tf_repvgg.layers import RepVGGBlock


def test_refuses_what_it_cannot_fuse():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.block = RepVGGBlock(4)

        def call(self, inputs):
            return self.block(inputs)

    subclassed = Subclassed()
    subclassed(images(8, 8, 4))
    with pytest.raises(ValueError, match=r"fuse needs a functional Keras 2 model, but got Subclassed"):
        fuse(subclassed)
    with pytest.raises(ValueError, match="but got RepVGGBlock"):
        fuse(RepVGGBlock(4))
    plain = keras.Sequential([keras.Input((8, 8, 4)), keras.layers.Conv2D(3, 3)], name="plain")
    with pytest.raises(ValueError, match="model 'plain' contains no re-parameterized block"):
        fuse(plain)
    inputs = keras.Input((3, 8, 8, 4))
    wrapped = keras.Model(inputs, keras.layers.TimeDistributed(RepVGGBlock(4, name="hidden"))(inputs))
    with pytest.raises(ValueError, match="block 'hidden' is inside another layer"):
        fuse(wrapped)


class LyingBlock(RepVGGBlock):
    """Says its merged kernel is one per cent smaller than it is."""

    def branches(self):
        return {name: (0.99 * kernel, 0.99 * bias) for name, (kernel, bias) in super().branches().items()}


def test_inexact_results_are_refused_with_their_error():
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, LyingBlock(4, activation=None)(inputs), name="liar")
    randomize(model)
    with pytest.raises(ArithmeticError, match=r"model 'liar' changed its output 'lying_block.*' by 1\.00e-02 of its"):
        fuse(model)
    assert_same_function(model, fuse(model, tolerance=0.02), images(8, 8, 4), tolerance=0.02)


def test_every_output_is_compared_by_itself():
    """An output a million times larger hides nothing, and an output of classes is compared too."""
    inputs = keras.Input((8, 8, 4))
    wrong = LyingBlock(4, activation=None, name="wrong")(inputs)
    large = keras.layers.Rescaling(1e6, name="large")(RepVGGBlock(4)(inputs))
    classes = keras.layers.Lambda(lambda x: tf.argmax(x, axis=-1), name="classes")(large)
    model = keras.Model(inputs, [large, classes, wrong])
    randomize(model)
    with pytest.raises(ArithmeticError, match=r"changed its output 'wrong' by 1\.00e-02"):
        fuse(model)
    assert fuse(keras.Model(inputs, [large, classes]))(images(8, 8, 4))[1].dtype == tf.int64


def test_refuses_outputs_that_are_not_finite():
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, RepVGGBlock(4, name="block")(inputs))
    model.get_layer("block").norm3x3.gamma.assign([np.nan] * 4)
    with pytest.raises(ArithmeticError, match="changed its output 'block' by nan"):
        fuse(model)


def test_comparison_runs_on_the_inputs_given():
    """A fault that random images do not show is found on the user's own input."""

    class FaultOnLarge(RepVGGBlock):
        def call(self, inputs, training=None):
            outputs = super().call(inputs, training=training)
            return tf.where(tf.reduce_max(inputs) > 100, outputs * 2, outputs)

    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, FaultOnLarge(4)(inputs))
    fuse(model)
    with pytest.raises(ArithmeticError):
        fuse(model, check_inputs=images(8, 8, 4) * 1000)


def test_models_that_overflow_on_large_inputs_are_checked_on_smaller_ones():
    inputs = keras.Input((8, 8, 3))
    features = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(inputs))
    model = keras.Model(inputs, tf.exp(100.0 * features))
    assert len(fuse(model).weights) < len(model.weights)
