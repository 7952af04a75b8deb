"""A user's own model: the blocks in the encoder of a segmentation network, from training to the integer file."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import fusion, graph, tflite
from tf_repvgg.layers import RepVGGBlock
from tf_repvgg.quantization import quantize_min_max

SIZE = (32, 24, 3)


def squares(count, seed):
    """Noise with a brighter rectangle in each image, and the mask of the rectangles as integer classes 0 and 1."""
    generator = np.random.default_rng(seed)
    images = generator.normal(-0.3, 0.2, (count, *SIZE)).astype("float32")
    masks = np.zeros((count, *SIZE[:2]), np.int32)
    for image, mask in zip(images, masks, strict=True):
        top, left = generator.integers(0, 16, 2)
        area = slice(top, top + generator.integers(6, 16)), slice(left, left + generator.integers(6, 16))
        image[area] += 0.7
        mask[area] = 1
    return images, masks


def segmentation_model():
    """Encoder of blocks with OABN, squeeze-and-excite in the deepest; a head with bilinear and nearest upsampling,
    skip connections by concatenation and by sum, normalized plain and depthwise convolutions, two outputs."""
    inputs = keras.Input(SIZE, name="picture")
    oabn = {"norm": "oabn", "oabn_k": 0.1}
    full = RepVGGBlock(8, name="full", **oabn)(inputs)
    half = RepVGGBlock(12, strides=2, name="half", **oabn)(full)
    quarter = RepVGGBlock(16, strides=2, padding="symmetric", name="quarter", **oabn)(half)
    quarter = RepVGGBlock(16, se_reduction=4, name="deepest", **oabn)(quarter)
    coarse = keras.layers.Conv2D(2, 1, name="coarse")(quarter)
    features = keras.layers.UpSampling2D(interpolation="bilinear")(quarter)
    features = keras.layers.Concatenate()([features, half])
    features = keras.layers.Conv2D(8, 3, padding="same", use_bias=False, name="mix")(features)
    features = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.8)(features))
    features = keras.layers.UpSampling2D()(features) + full
    features = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="smooth")(features)
    features = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.8)(features))
    return keras.Model(inputs, {"mask": keras.layers.Conv2D(2, 1, name="mask")(features), "coarse": coarse})


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    model = segmentation_model()
    optimizer = keras.optimizers.Adam(0.01)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(images, masks):
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = cross_entropy(masks, logits["mask"]) + 0.2 * cross_entropy(masks[:, 2::4, 2::4], logits["coarse"])
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    losses = [float(step(*squares(8, seed))) for seed in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    return model


def test_segmentation_model_from_training_to_int8(trained):
    images, masks = squares(12, seed=1000)
    expected = {name: logits.numpy() for name, logits in trained(images, training=False).items()}
    assert np.mean(expected["mask"].argmax(axis=-1) == masks) > 0.95

    fused = fusion.fuse(trained)
    assert not graph.find_layers(fused, keras.layers.BatchNormalization)
    for name, logits in fused(images).items():
        np.testing.assert_allclose(logits, expected[name], atol=1e-4 * np.max(np.abs(expected[name])))

    calibration, _ = squares(32, seed=2000)
    for per_channel in (True, False):
        file = tflite.convert(fused, calibration, per_channel=per_channel)
        outputs = tflite.predict(file, images)
        assert outputs["mask"].shape == (12, *SIZE[:2], 2)
        for name, logits in outputs.items():
            agreement = np.mean(logits.argmax(axis=-1) == expected[name].argmax(axis=-1))
            assert agreement > 0.98
        names = {operator.name for operator in tflite.operators(file)}
        assert {"RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "CONCATENATION", "ADD", "DEPTHWISE_CONV_2D"} <= names
        assert "DEQUANTIZE" not in names
        # Every kernel of the model is in the file, code for code.
        in_file = {(codes.codes.tobytes(), codes.scale.tobytes()) for codes in tflite.weight_codes(file)}
        for layer in fused.layers:
            if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
                kernel = layer.get_weights()[0]
                if isinstance(layer, keras.layers.DepthwiseConv2D):
                    kernel = kernel.reshape(3, 3, 1, -1)
                quantized = quantize_min_max(kernel, per_channel=per_channel)
                assert (quantized.codes.tobytes(), quantized.scale.tobytes()) in in_file
