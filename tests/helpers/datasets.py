"""Small TFDS datasets, and what tests read from pipelines."""

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

IMAGE = tfds.features.Image(shape=(6, 6, 3))


def read_all(dataset):
    """All images and all labels of a dataset of single examples, as two arrays."""
    images, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return np.stack(images), np.array(labels)


def hashable(images):
    """Images as bytes, by which they can be compared and looked up."""
    return [image.tobytes() for image in images]


def read_epochs(data, epochs, first_epoch=0, batch_size=256):
    """All training batches of the epochs from `first_epoch` to before `epochs`."""
    batches = list(data.training(batch_size, range(first_epoch, epochs)).as_numpy_iterator())
    assert len(batches) == data.steps_per_epoch(batch_size) * (epochs - first_epoch)
    return batches


def assert_same_batches(expected, actual):
    for (expected_images, expected_labels), (images, labels) in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(images, expected_images)
        np.testing.assert_array_equal(labels, expected_labels)


def write_dataset(folder, splits, features, make_image=lambda index: np.full((6, 6, 3), index, np.uint8)):
    """Writes an unregistered TFDS dataset called 'tiny' and returns its folder."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(count) for name, count in splits.items()}

        def _generate_examples(self, count):
            for index in range(count):
                example = {name: index % 3 for name in features if name != "image"}
                yield index, {"image": make_image(index), **example}

    Tiny(data_dir=str(folder)).download_and_prepare()
    return str(folder)


def make_picture(index):
    """Noise, smooth enough that JPEG keeps it; the size depends on the index."""
    generator = np.random.default_rng(index)
    coarse = generator.integers(0, 256, (4, 5, 3)).astype(np.float32)
    image = tf.image.resize(coarse, (40 + 3 * index % 17, 30 + 7 * index % 23))
    return tf.cast(image, tf.uint8).numpy()


def write_pictures(folder, encoding="jpeg"):
    """Writes a TFDS dataset of pictures that differ in size, and returns its folder."""
    features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format=encoding),
        "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
    }
    return write_dataset(folder, {"train": 24, "test": 3}, features, make_picture)
