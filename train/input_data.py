"""The data of a run: its flags, and the pipeline that they describe."""

import os
from pathlib import Path

from absl import flags

from tf_repvgg import image_flags
from tf_repvgg.data import ClassificationData, rand_augment
from tf_repvgg.data.augmentation import CROPS
from tf_repvgg.data.image_folder import PREFIX

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "dataset",
    "digits",
    "TFDS name of an image classification dataset ('digits' comes with the package), or folder:PATH for images in "
    "PATH/train/<label>/ and PATH/test/<label>/.",
)
image_flags.define_image_flags("symmetric")
flags.DEFINE_enum(
    "crop",
    "pad",
    CROPS,
    "Random crops for training: of the padded image, or of a random window of the stored image, resized.",
)
flags.DEFINE_integer("crop_padding", 2, "Pixels that --crop=pad adds on every side.", lower_bound=0, upper_bound=1024)
flags.DEFINE_boolean("flip", None, "Mirror half of the training images; by default all datasets but those of digits.")
flags.DEFINE_integer(
    "randaugment",
    0,
    "Number of operations that RandAugment applies to each image; 0 for none.",
    lower_bound=0,
    upper_bound=rand_augment.MAX_OPERATIONS,
)
flags.DEFINE_float(
    "randaugment_magnitude",
    9,
    "Strength of the operations of RandAugment.",
    lower_bound=0,
    upper_bound=rand_augment.MAX_MAGNITUDE,
)
flags.DEFINE_float("mixup", 0.0, "Alpha of mixup; 0 for none.", lower_bound=0)
flags.DEFINE_boolean(
    "validation", True, "Hold out validation data and evaluate on them; otherwise train on all and evaluate on test."
)


def portable_dataset_name() -> str:
    """The name of the dataset on every machine: for a folder of images, without the path to it."""
    if not FLAGS.dataset.startswith(PREFIX):
        return FLAGS.dataset
    folder = Path(FLAGS.data_dir or "", FLAGS.dataset.removeprefix(PREFIX)).expanduser()
    return PREFIX + os.path.basename(os.path.abspath(folder))


def load_data(seed: int) -> ClassificationData:
    """Loads the dataset; downloads or generates it first, if need be.

    Args:
      seed: Seed of shuffling and augmentation.

    Raises:
      ValueError: If the dataset is unknown, or does not fit the flags.
      FileNotFoundError: If the dataset is missing.
    """
    return ClassificationData(
        FLAGS.dataset,
        FLAGS.data_dir,
        image_flags.read_preprocessing(),
        hold_out=FLAGS.validation,
        crop=FLAGS.crop,
        crop_padding=FLAGS.crop_padding,
        flip=FLAGS.flip,
        rand_augment_operations=FLAGS.randaugment,
        rand_augment_magnitude=FLAGS.randaugment_magnitude,
        mixup_alpha=FLAGS.mixup,
        seed=seed,
        bad_images=FLAGS.bad_images,
        max_megapixels=FLAGS.max_megapixels,
    )


def evaluation_split() -> str:
    """The split on which the run reports its accuracy."""
    return "validation" if FLAGS.validation else "test"
