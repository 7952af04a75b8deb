"""The data of a run: its flags, and the pipeline that they describe."""

import os
from pathlib import Path

from absl import flags

from tf_repvgg.data import NORMALIZATIONS, ClassificationData, Preprocessing, rand_augment
from tf_repvgg.data.augmentation import CROPS
from tf_repvgg.data.image_folder import BAD_IMAGES, MAX_MEGAPIXELS, PREFIX

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "dataset",
    "digits",
    "TFDS name of an image classification dataset ('digits' comes with the package), or folder:PATH for images in "
    "PATH/train/<label>/ and PATH/test/<label>/.",
)
flags.DEFINE_string(
    "data_dir",
    None,
    "TFDS data directory that holds the dataset; by default TFDS's own, with download. For a folder of images: "
    "directory that PATH is relative to.",
)
flags.DEFINE_enum("bad_images", "refuse", BAD_IMAGES, "What to do with unusable images in a folder.")
flags.DEFINE_float(
    "max_megapixels", MAX_MEGAPIXELS, "Largest usable image of a folder, in millions of pixels.", lower_bound=0
)
flags.DEFINE_integer(
    "image_size",
    None,
    "Height and width that images are resized to; required for datasets whose images differ in size.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "evaluation_resize",
    None,
    "Length of an evaluation image's shorter side before its centre of --image_size is cropped; by default the whole "
    "image is stretched to --image_size.",
    lower_bound=1,
)
flags.DEFINE_enum(
    "normalization", "symmetric", list(NORMALIZATIONS), "Mean and standard deviation that normalize pixels."
)
flags.DEFINE_enum(
    "crop",
    "pad",
    CROPS,
    "Random crops for training: of the padded image, or of a random window of the stored image, resized.",
)
flags.DEFINE_integer("crop_padding", 2, "Pixels that --crop=pad adds on every side.", lower_bound=0)
flags.DEFINE_boolean("flip", None, "Mirror half of the training images; by default all datasets but those of digits.")
flags.DEFINE_integer(
    "randaugment", 0, "Number of operations that RandAugment applies to each image; 0 for none.", lower_bound=0
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
    size = None if FLAGS.image_size is None else (FLAGS.image_size, FLAGS.image_size)
    return ClassificationData(
        FLAGS.dataset,
        FLAGS.data_dir,
        Preprocessing(size, *NORMALIZATIONS[FLAGS.normalization], FLAGS.evaluation_resize),
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
