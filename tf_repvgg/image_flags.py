"""The flags that several programs have for images: where they are, and how they become the input of a network."""

from absl import flags

from tf_repvgg.data import NORMALIZATIONS, Preprocessing
from tf_repvgg.data.image_folder import BAD_IMAGES, MAX_MEGAPIXELS

FLAGS = flags.FLAGS

# The flags count as those of the program's module that calls `define_image_flags`.
flags.disclaim_key_flags()

# Flags that describe the preprocessing, which a finished run has decided on.
PREPROCESSING_FLAGS = ("image_size", "evaluation_resize", "normalization")
# An image of this height and width takes 3 GiB in float32.
_LARGEST_SIDE = 2**14


def define_image_flags(default_normalization: str | None) -> None:
    """Defines --data_dir, --bad_images, --max_megapixels, and `PREPROCESSING_FLAGS`.

    Args:
      default_normalization: Default of --normalization; None where it must be given.

    Example:
      >>> from absl import flags
      >>> from tf_repvgg import image_flags
      >>> image_flags.define_image_flags("symmetric")
      >>> _ = flags.FLAGS(["program", "--image_size=32"])
      >>> image_flags.read_preprocessing().size
      (32, 32)
    """
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
        upper_bound=_LARGEST_SIDE,
    )
    flags.DEFINE_integer(
        "evaluation_resize",
        None,
        "Length of an evaluation image's shorter side before its centre of --image_size is cropped; by default the "
        "whole image is stretched to --image_size.",
        lower_bound=1,
        upper_bound=_LARGEST_SIDE,
    )
    flags.DEFINE_enum(
        "normalization",
        default_normalization,
        list(NORMALIZATIONS),
        "Mean and standard deviation that normalize pixels: symmetric, (pixel - 128) / 128; imagenet, those of the "
        "colours of ImageNet, as in PyTorch; inception, pixel / 127.5 - 1; unit, pixel / 255; none, for networks that "
        "rescale pixels themselves.",
    )


def read_preprocessing(default_size: tuple[int, int] | None = None) -> Preprocessing:
    """The preprocessing that the flags describe.

    Args:
      default_size: Height and width of images where --image_size is not given; None for those of the dataset.

    Raises:
      ValueError: If the flags do not go together, or --normalization is missing.
    """
    if FLAGS.normalization is None:
        raise ValueError(
            f"--normalization is missing; give what the network expects: {', '.join(NORMALIZATIONS)} (see --help)"
        )
    size = default_size if FLAGS.image_size is None else (FLAGS.image_size, FLAGS.image_size)
    return Preprocessing(size, *NORMALIZATIONS[FLAGS.normalization], FLAGS.evaluation_resize)
