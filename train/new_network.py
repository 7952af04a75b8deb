"""A new network in training form: its flags, and the network that they describe."""

import tf_keras as keras
from absl import flags

from tf_repvgg import checkpoints, fusion, layers, models, runs
from tf_repvgg.data import ClassificationData
from tf_repvgg.training.distribution import Distribution

FLAGS = flags.FLAGS

flags.DEFINE_enum("variant", "digits", list(models.VARIANTS), "Network to build.", case_sensitive=False)
flags.DEFINE_enum(
    "block",
    None,
    list(models.BLOCKS),
    "Block of the training form: repvgg or qarepvgg for variants of RepVGG, mobileone or qamobileone for those of "
    "MobileOne; by default the first.",
)
flags.DEFINE_enum("norm", "bn", layers.NORMS, "Normalization: plain, or outlier-aware (OABN).")
flags.DEFINE_string(
    "oabn_k",
    "0.1",
    "Limit k of OABN: a number; '6std' for a limit relative to each kernel's standard deviation; or limits by block "
    "name, 'stage4_.*=0.05,.*=0.1', of which the first match wins.",
)
flags.DEFINE_enum("oabn_branches", "identity", layers.OABN_BRANCHES, "Branches that OABN clips.")
flags.DEFINE_enum("oabn_clip_mode", "project", layers.CLIP_MODES, "How clipped gammas are trained.")
flags.DEFINE_enum(
    "identity",
    "norm",
    layers.IDENTITIES,
    "Identity branch: with a normalization as published, or one of two controls, none or a constant gain.",
)
flags.DEFINE_float("identity_gain", 0.1, "Gain of --identity=constant.")
flags.DEFINE_float(
    "bn_epsilon",
    1e-5,
    "Constant added to the variance in every batch normalization.",
    lower_bound=1e-12,
    upper_bound=1,
)
flags.DEFINE_boolean(
    "synchronized_bn",
    False,
    "Normalize with the statistics of the whole batch where --strategy splits it; otherwise each device has those of "
    "its own images.",
)
flags.DEFINE_enum("padding", "same", layers.PADDINGS, "Padding of strided blocks; 'symmetric' is that of PyTorch.")


def settle_flags() -> None:
    """Gives --block its value where it depends on --variant."""
    FLAGS.block = FLAGS.block or models.find_blocks(models.find_variant(FLAGS.variant).family)[0]


class NewNetwork:
    """A network that the flags describe, trained from random weights or from those of a run with the same network.

    Args:
      data: Data of the training.
      seed: Seed of the initial weights.
      precision: Keras dtype policy of training; it is the global policy until `finish`.
      init_from: Folder of a run, a .keras file, or a checkpoint of a PyTorch network, whose weights training starts
        from; None for random weights.
      trust_model: Whether the model file may run code; see `runs.load_model`.
      distribution: Devices of the training.

    Attributes:
      model: Network to train. It takes images of any size, since early epochs may train on smaller ones.

    Raises:
      ValueError: If flags do not go together, or `init_from` is of another network.
      FileNotFoundError: If `init_from` does not exist.
    """

    def __init__(
        self,
        data: ClassificationData,
        seed: int,
        precision: str,
        init_from: str | None,
        trust_model: bool,
        distribution: Distribution,
    ) -> None:
        self._final_model = _build_model(data.image_shape, data.num_classes, seed, "float32")
        any_size = (None, None, data.channels)
        with distribution.scope():
            self.model = _build_model(any_size, data.num_classes, seed, precision, FLAGS.synchronized_bn)
        if init_from:
            if checkpoints.is_torch_file(init_from):
                _load_torch(init_from, self.model)
            else:
                runs.copy_weights(runs.load_model(init_from, trust_model), self.model)

    def print_summary(self) -> None:
        """Prints the parameters and MACs of the network, layer by layer."""
        models.summary(self._final_model)

    def make_callbacks(self, run: runs.Run, is_chief: bool) -> list[keras.callbacks.Callback]:
        """Callbacks that only this kind of training needs: none."""
        return []

    def finish(self) -> keras.Model:
        """The model that the run leaves: the trained weights, in float32, for images of one size."""
        keras.mixed_precision.set_global_policy("float32")
        self._final_model.set_weights(self.model.get_weights())
        return self._final_model


def load_torch_network(path: str, data: ClassificationData, seed: int) -> keras.Model:
    """The network that the flags describe with the weights of a PyTorch network, in the form that the file has.

    Args:
      path: Checkpoint of a PyTorch network.
      data: Data of the training.
      seed: Seed of layers that the file has no weights for, such as a head for other classes.

    Raises:
      ValueError: If the file is damaged, or of another network than the flags describe.
      FileNotFoundError: If there is no such file.
    """
    form = checkpoints.inspect_torch(path).form
    model = _build_model(data.image_shape, data.num_classes, seed, "float32")
    if form == "deploy":
        model = fusion.fuse(model)
    _load_torch(path, model)
    return model


def _load_torch(path: str, model: keras.Model) -> None:
    for note in checkpoints.load_torch(path, model).notes:
        print(f"--init_from: {note}")


def _build_model(
    image_shape: tuple[int | None, int | None, int],
    num_classes: int,
    seed: int,
    precision: str,
    synchronized: bool = False,
) -> keras.Model:
    keras.utils.set_random_seed(seed)
    keras.mixed_precision.set_global_policy(precision)
    return models.build_network(
        FLAGS.variant,
        image_shape,
        num_classes,
        norm=FLAGS.norm,
        block=FLAGS.block,
        identity=FLAGS.identity,
        oabn_k=FLAGS.oabn_k,
        oabn_branches=FLAGS.oabn_branches,
        clip_mode=FLAGS.oabn_clip_mode,
        identity_gain=FLAGS.identity_gain,
        padding=FLAGS.padding,
        epsilon=FLAGS.bn_epsilon,
        synchronized=synchronized,
    )
