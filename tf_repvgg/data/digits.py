"""The 1,797 handwritten digits of scikit-learn, as a TFDS builder that needs no network."""

import numpy as np
import tensorflow_datasets as tfds

_DESCRIPTION = """\
8x8 grey images of handwritten digits: the test part of the "Optical Recognition of Handwritten Digits" dataset, as
shipped with scikit-learn. Grey levels 0 to 16 are spread over 0 to 255.
"""
_HOMEPAGE = "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits"
_CITATION = """\
@misc{optical_recognition_of_handwritten_digits_80,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {{Optical Recognition of Handwritten Digits}},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49}
}
"""
_TEST_EXAMPLES = 360
_SPLIT_SEED = 0


class Digits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the digits: 1,437 training and 360 test images, uint8 [8, 8, 1], in ten classes.

    Example:
      >>> from tf_repvgg.data import Digits
      >>> features = Digits().info.features
      >>> features["image"].shape, features["label"].num_classes
      ((8, 8, 1), 10)
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
            ),
            supervised_keys=("image", "label"),
            homepage=_HOMEPAGE,
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager):
        order = np.random.default_rng(_SPLIT_SEED).permutation(1797)
        return {
            "train": self._generate_examples(order[_TEST_EXAMPLES:]),
            "test": self._generate_examples(order[:_TEST_EXAMPLES]),
        }

    def _generate_examples(self, indices):
        from sklearn.datasets import load_digits  # slow to import, and needed only while the set is written

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
        for index in indices:
            yield int(index), {"image": images[index], "label": int(digits.target[index])}
