"""Preprocessing against Pillow and published constants."""

import json

import numpy as np
import pytest
import tensorflow as tf
from helpers.datasets import read_all, write_pictures
from PIL import Image

from tf_repvgg.data import NORMALIZATIONS, ClassificationData, Preprocessing, preprocessing


@pytest.fixture(scope="module", params=["jpeg", "png"])
def pictures(request, tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp(request.param), request.param)


def test_preprocessing_maps_pixels_to_int8():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    normalised = Preprocessing((16, 16))(pixels).numpy()
    assert normalised.dtype == np.float32
    assert (normalised.min(), normalised.max()) == (-1, 127 / 128)
    # Scale 1/128 and zero point 0: the int8 code of pixel p is p - 128, exactly.
    np.testing.assert_array_equal(normalised * 128, pixels.astype(np.int64) - 128)
    np.testing.assert_allclose(Preprocessing((16, 16), mean=100.0, std=50.0)(pixels), (pixels - 100.0) / 50, rtol=1e-6)


def test_resizing():
    data = ClassificationData("digits", preprocessing=Preprocessing((17, 20)))
    assert data.image_shape == (17, 20, 1)
    assert data.preprocessing.size == (17, 20)
    images, _ = read_all(data.images("test").take(4))
    assert images.shape == (4, 17, 20, 1) and images.dtype == np.uint8
    originals, _ = read_all(ClassificationData("digits").images("test").take(4))
    expected = tf.image.resize(originals, (17, 20), antialias=True)
    np.testing.assert_allclose(images, expected, atol=0.51)


def test_resizing_the_shorter_side_and_cutting_out_the_centre(pictures):
    """Against Pillow's resize and crop, as torchvision's Resize and CenterCrop do it."""
    data = ClassificationData("tiny", pictures, Preprocessing((20, 18), resize_shorter_side=24))
    stored = data._images["test"].list_examples().map(lambda content, _: tf.io.decode_image(content))
    results = data.images("test").map(lambda image, _: image)
    for image, result in zip(stored.as_numpy_iterator(), results.as_numpy_iterator(), strict=True):
        height, width, _ = image.shape
        size = (24 * width // min(height, width), 24 * height // min(height, width))
        large = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        top, left = round((large.shape[0] - 20) / 2), round((large.shape[1] - 18) / 2)
        assert result.shape == (20, 18, 3)
        np.testing.assert_allclose(result, large[top : top + 20, left : left + 18].astype(int), atol=2)


@pytest.mark.parametrize("shape", [(4, 5001, 3), (5000, 4, 3)])
def test_long_images_are_not_resized_as_a_whole(shape, monkeypatch):
    """Resizing the shorter side would make the longer one 30,000 pixels long; the centre is the same."""
    image = np.zeros(shape, np.uint8)
    middle = tuple(slice(length // 2 - 2, length // 2 + 2) for length in shape[:2])
    image[middle] = 255
    sizes = []
    resize = preprocessing.resize_image
    monkeypatch.setattr(preprocessing, "resize_image", lambda x, size: sizes.append(np.max(size)) or resize(x, size))
    resized = Preprocessing((20, 20), resize_shorter_side=24).resize(tf.constant(image)).numpy()
    assert resized.shape == (20, 20, 3) and max(sizes) <= 8 * 24 + 6
    assert np.mean(resized) > 200


def test_normalization_per_channel(pictures):
    mean, std = NORMALIZATIONS["imagenet"]
    data = ClassificationData("tiny", pictures, Preprocessing((20, 18), mean, std))
    images, _ = read_all(data.images("test"))
    ((normalised, _),) = data.evaluation("test", 3).as_numpy_iterator()
    published = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalised, published, atol=1e-5)
    np.testing.assert_allclose(next(iter(data.calibration(1, "test"))), published[0], atol=1e-5)
    assert Preprocessing.from_metadata(json.loads(json.dumps(data.metadata()))) == data.preprocessing
    assert data.metadata()["labels"] == ["a", "b", "c"]
    # Older runs have no resize_shorter_side.
    old = {"dataset": "tiny", "size": [8, 8], "mean": 128.0, "std": 128.0}
    assert Preprocessing.from_metadata(old) == Preprocessing((8, 8))


def test_preprocessing_that_is_refused(pictures):
    with pytest.raises(ValueError, match=r"size \(20, 18\) does not fit .* shorter side is resized to 19"):
        Preprocessing((20, 18), resize_shorter_side=19)
    with pytest.raises(ValueError, match="needs a size"):
        Preprocessing(resize_shorter_side=19)
    with pytest.raises(ValueError, match="differ in their number of channels"):
        Preprocessing(mean=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="std is 0"):
        Preprocessing(std=0)
    with pytest.raises(ValueError, match="for images of 3 channels, but these have 1"):
        ClassificationData("digits", preprocessing=Preprocessing(None, *NORMALIZATIONS["imagenet"]))
    with pytest.raises(ValueError, match="crop is 'centre'; known: pad, random_resized"):
        ClassificationData("tiny", pictures, Preprocessing((8, 8)), crop="centre")
