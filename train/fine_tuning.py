"""Fine-tuning with quantization: its flags, and the network that they describe."""

import new_network
import tensorflow as tf
import tf_keras as keras
from absl import flags

from tf_repvgg import checkpoints, fusion, graph, models, quantization, runs
from tf_repvgg.data import ClassificationData
from tf_repvgg.quantization import GRANULARITIES, QuantizedLayer
from tf_repvgg.training import finished_runs
from tf_repvgg.training.distribution import Distribution

FLAGS = flags.FLAGS

# tfmot's names and those of quantization.qat, whose import takes seconds: --help does not wait for it, tests compare.
CENTROIDS_INITS = ("kmeans", "linear", "random", "density_based", "kmeans_plus_plus")
GRADIENT_AGGREGATIONS = ("sum", "avg")
BATCH_NORM_STATISTICS = ("frozen", "running")

# Methods of post-training quantization whose results these ways of training can start from.
_PTQ_STARTS = {"clusterqat": ("codebook", "codebook_adaquant"), "lsq": ("mse", "octav", "adaquant")}

flags.DEFINE_enum(
    "quantize",
    None,
    ["clusterqat", "lsq", "tfmot_clustering", "tfmot_quantization", "float"],
    "Fine-tune the fused network of the finished run --init_from. clusterqat: clustered weights and quantized "
    "activations. lsq: weights on uniform grids with learned steps, and quantized activations. tfmot_clustering: "
    "clustered weights by plain tfmot. tfmot_quantization: tfmot's cluster-preserving quantization of such a run. "
    "float: no quantization, as the reference. Flags that describe a new network have no effect then.",
)
flags.DEFINE_string(
    "number_of_clusters",
    None,
    "Clusters of each layer's weights, 2 to 256, by default 8; or by layer name, 'stem=256,logits=256,.*=8', of which "
    "the first match wins.",
)
flags.DEFINE_string(
    "weight_bits",
    None,
    "Bits of LSQ's weights, 2 to 8, by default 4; or by layer name, 'stem=8,logits=8,.*=4', of which the first match "
    "wins.",
)
flags.DEFINE_string(
    "granularity",
    "per_tensor",
    "Whether each layer or each output channel has its own codebook or grid: per_tensor or per_channel; or by layer "
    "name, 'stem=per_channel,.*=per_tensor', of which the first match wins.",
)
flags.DEFINE_enum(
    "cluster_centroids_init",
    "kmeans",
    CENTROIDS_INITS,
    "Initialization of the centroids: this package's k-means, or one of tfmot's, of which kmeans_plus_plus is its own "
    "k-means.",
)
flags.DEFINE_enum(
    "ptq_start",
    None,
    sorted({method for methods in _PTQ_STARTS.values() for method in methods}),
    "Method of post-training quantization whose weights, biases, and codebooks or steps training starts from.",
)
flags.DEFINE_float(
    "centroid_update_rate",
    0.1,
    "Share of the way to the mean of its weights that a centroid moves in one update.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_integer("centroid_update_steps", 10, "Training steps between updates of the centroids.", lower_bound=1)
flags.DEFINE_boolean("train_centroids", False, "Let the optimizer move the centroids too.")
flags.DEFINE_enum(
    "cluster_gradient_aggregation",
    "sum",
    GRADIENT_AGGREGATIONS,
    "How the gradient of a centroid is computed from the gradients of its weights.",
)
flags.DEFINE_enum(
    "batch_norm_statistics",
    None,
    BATCH_NORM_STATISTICS,
    "ClusterQAT in training form: the branches train, and every step quantizes their merged kernels, with frozen or "
    "running means and variances. By default the fused network trains.",
)
flags.DEFINE_enum("activation_bits", "8", ["8", "16"], "Bits of activations, input included.")
flags.DEFINE_float(
    "ramp_epochs",
    0.0,
    "Epochs at the start in which quantization of weights sets in: the share of the centroid in its mixture with the "
    "weight grows from 0 to 1.",
    lower_bound=0,
)
flags.DEFINE_float("freeze_epochs", 0.0, "Epochs at the end with frozen clusters and activation ranges.", lower_bound=0)
flags.DEFINE_integer(
    "calibration_images",
    512,
    "Number of training images that set the initial activation ranges, and that --ptq_start uses.",
    lower_bound=1,
)

# Not the flags' own defaults, so that a flag given at this value is refused too where it has no effect.
_DEFAULTS = {"number_of_clusters": "8", "weight_bits": "4"}
# {flag: values of --quantize with which it has an effect}
_USED_BY = {
    "number_of_clusters": ("clusterqat", "tfmot_clustering"),
    "weight_bits": ("lsq",),
    "granularity": ("clusterqat", "lsq", "tfmot_clustering"),
    "cluster_centroids_init": ("clusterqat", "tfmot_clustering"),
    "ptq_start": ("clusterqat", "lsq"),
    "centroid_update_rate": ("clusterqat",),
    "centroid_update_steps": ("clusterqat",),
    "train_centroids": ("clusterqat",),
    "cluster_gradient_aggregation": ("clusterqat", "tfmot_clustering"),
    "batch_norm_statistics": ("clusterqat",),
    "activation_bits": ("clusterqat", "lsq"),
    "ramp_epochs": ("clusterqat",),
    "freeze_epochs": ("clusterqat", "lsq"),
    "calibration_images": ("clusterqat", "lsq"),
}
# {flag: why it does not go with --ptq_start}
_NOT_FROM_PTQ = {
    "batch_norm_statistics": "which needs a fused network",
    "cluster_centroids_init": "which sets the initial centroids",
    "ramp_epochs": "after which weights start at their centroids, so that a ramp has no effect",
}


def settle_flags(epochs: int) -> None:
    """Sets the defaults that flags have with this --quantize.

    Args:
      epochs: Number of epochs of the run.

    Raises:
      ValueError: If a flag of this file has no effect with this --quantize, or without any.
    """
    for name, methods in _USED_BY.items():
        flag = FLAGS[name]
        if flag.value != flag.default and FLAGS.quantize not in methods:
            condition = f"with --quantize={FLAGS.quantize}" if FLAGS.quantize else "without --quantize"
            raise ValueError(f"--{name}={flag.value} has no effect {condition}; it is for {', '.join(methods)}")
    for name, value in _DEFAULTS.items():
        if FLAGS[name].value is None and FLAGS.quantize in _USED_BY[name]:
            FLAGS[name].value = value
    if FLAGS.ramp_epochs + FLAGS.freeze_epochs > epochs:
        raise ValueError(
            f"--ramp_epochs={FLAGS.ramp_epochs:g} and --freeze_epochs={FLAGS.freeze_epochs:g} are more than "
            f"--epochs={epochs}"
        )


class FineTuning:
    """The network of a finished run, made ready for --quantize and fine-tuned.

    Args:
      data: Data of the training.
      init_from: Folder of the finished run, its model file, or a checkpoint of the PyTorch network that the flags
        describe.
      epochs: Number of epochs of the training.
      steps_per_epoch: Number of steps in an epoch.
      seed: Seed of --ptq_start.
      is_continued: Whether a checkpoint will be restored; --ptq_start is skipped then, since it would have no effect.
      trust_model: Whether the model file may run code; see `runs.load_model`.
      distribution: Devices of the training.

    Attributes:
      model: Network to train.

    Raises:
      ValueError: If flags do not go together, or the finished run is of other data.
      FileNotFoundError: If there is no finished run.
    """

    def __init__(
        self,
        data: ClassificationData,
        init_from: str | None,
        epochs: int,
        steps_per_epoch: int,
        seed: int,
        is_continued: bool,
        trust_model: bool,
        distribution: Distribution,
    ) -> None:
        self._data = data
        self._epochs = epochs
        self._steps_per_epoch = steps_per_epoch
        self._seed = seed
        self._starts_from_ptq = FLAGS.ptq_start is not None and not is_continued
        self._base = self._load_base(init_from, trust_model)
        network, steps = self._start()
        with distribution.scope():
            self._has_strategy = tf.distribute.has_strategy()
            self.model = self._prepare(network, steps)

    def print_summary(self) -> None:
        """Prints the parameters and MACs of the network, layer by layer."""
        models.summary(self._base)

    def make_callbacks(self, run: runs.Run, is_chief: bool) -> list[keras.callbacks.Callback]:
        """Callbacks that only this kind of training needs, and only the chief if they write."""
        clustering = quantization.qat.clustering
        callbacks: list[keras.callbacks.Callback] = []
        if FLAGS.quantize == "clusterqat" and is_chief:
            callbacks.append(clustering.ClusterLog(run.tensorboard_path / "clusters"))
        if FLAGS.freeze_epochs:
            first_frozen_step = self._steps(self._epochs) - self._steps(FLAGS.freeze_epochs)
            callbacks.append(clustering.FreezeClusters(first_frozen_step))
        return callbacks

    def finish(self) -> keras.Model:
        """The model that the run leaves: the trained network without the wrappers that only training needs."""
        match FLAGS.quantize:
            case "clusterqat":
                return quantization.strip_cluster_quantize(self.model)
            case "lsq":
                return quantization.strip_learned_step(self.model)
            case "tfmot_quantization":
                return quantization.qat.tfmot_baseline.strip_tfmot_quantize(self.model, self._base)
        # Not compiled, so that no optimizer is saved with it.
        model = keras.Model(self.model.inputs, self.model.outputs, name=self.model.name)
        if FLAGS.quantize == "tfmot_clustering":
            import tensorflow_model_optimization as tfmot  # takes seconds

            return tfmot.clustering.keras.strip_clustering(model)
        # Statistics that workers share can be read by all together only, but the chief alone saves.
        return graph.rebuild(model, graph.copy_layer) if self._has_strategy else model

    def _load_base(self, init_from, trust_model):
        """The network to fine-tune in float: fused, unless its branches are to train."""
        _check_flags(init_from)
        if checkpoints.is_torch_file(init_from):
            model = new_network.load_torch_network(init_from, self._data, self._seed)
        else:
            model = finished_runs.load_matching(init_from, self._data, "run", trust_model)
        if quantization.quantizers(model):
            raise ValueError(f"--init_from={init_from} is quantized already; give the float run that it was made from")
        if FLAGS.batch_norm_statistics is None:
            return finished_runs.fuse_if_needed(model, init_from, "run")
        if not fusion.needs_fusing(model):
            raise ValueError(
                f"--batch_norm_statistics={FLAGS.batch_norm_statistics} needs a network in training form, but that of "
                f"--init_from={init_from} is fused; leave it out"
            )
        return model

    def _prepare(self, network, steps):
        """The network to train; `network` and `steps` are those of `_start`."""
        match FLAGS.quantize:
            case "lsq":
                return quantization.learned_step_quantize(
                    network,
                    FLAGS.weight_bits,
                    FLAGS.granularity,
                    steps=steps,
                    activation_bits=int(FLAGS.activation_bits),
                    calibration=self._calibration(),
                )
            case "clusterqat":
                return quantization.cluster_quantize(
                    network,
                    FLAGS.number_of_clusters,
                    self._centroids_init(),
                    FLAGS.granularity,
                    self._gradient_aggregation(),
                    centroid_update_rate=FLAGS.centroid_update_rate,
                    centroid_update_steps=FLAGS.centroid_update_steps,
                    train_centroids=FLAGS.train_centroids,
                    ramp_steps=self._steps(FLAGS.ramp_epochs),
                    batch_norm_statistics=FLAGS.batch_norm_statistics,
                    activation_bits=int(FLAGS.activation_bits),
                    calibration=self._calibration(),
                )
            case "tfmot_clustering":
                kmeans_plus_plus = quantization.qat.clustering.CentroidInitialization.KMEANS_PLUS_PLUS
                return quantization.qat.tfmot_baseline.tfmot_cluster(
                    self._base,
                    FLAGS.number_of_clusters,
                    self._centroids_init() or kmeans_plus_plus,
                    FLAGS.granularity == "per_channel",
                    self._gradient_aggregation(),
                )
            case "tfmot_quantization":
                return quantization.qat.tfmot_baseline.tfmot_quantize(self._base)
        # A strategy needs variables that were made in its scope.
        return graph.rebuild(network, graph.copy_layer) if self._has_strategy else network

    def _start(self):
        """The float network that training starts from and, after --ptq_start, its weight scales by layer, or None."""
        if not self._starts_from_ptq:
            return self._base, None
        if FLAGS.quantize == "lsq":
            options = {"weight_bits": FLAGS.weight_bits}
        else:
            options = {"number_of_clusters": FLAGS.number_of_clusters}
        quantized = quantization.ptq.quantize(
            self._base,
            FLAGS.ptq_start,
            per_channel=FLAGS.granularity,
            calibration=self._calibration(),
            activation_bits=int(FLAGS.activation_bits),
            seed=self._seed,
            progress=True,
            **options,
        )
        scales = {layer.name: layer.scale.numpy() for layer in quantized.layers if isinstance(layer, QuantizedLayer)}
        return quantization.ptq.dequantize(self._base, quantized), scales

    def _calibration(self):
        return self._data.calibration(FLAGS.calibration_images, "train").as_numpy_iterator()

    def _centroids_init(self):
        """tfmot's initialization, or None for this package's k-means."""
        if FLAGS.cluster_centroids_init == "kmeans":
            return None
        return quantization.qat.clustering.CentroidInitialization[FLAGS.cluster_centroids_init.upper()]

    def _gradient_aggregation(self):
        return quantization.qat.clustering.GradientAggregation[FLAGS.cluster_gradient_aggregation.upper()]

    def _steps(self, epochs):
        return round(epochs * self._steps_per_epoch)


def _check_flags(init_from):
    if "=" in FLAGS.granularity and FLAGS.quantize == "tfmot_clustering":
        raise ValueError(
            f"--granularity={FLAGS.granularity} does not go with --quantize=tfmot_clustering, which takes one for all "
            f"layers: {', '.join(GRANULARITIES)}"
        )
    names = [part.rpartition("=")[2] for part in FLAGS.granularity.split(",")]
    if unknown := [name for name in names if name not in GRANULARITIES]:
        raise ValueError(f"--granularity holds {unknown[0]!r}; known: {', '.join(GRANULARITIES)}")
    methods = _PTQ_STARTS.get(FLAGS.quantize, ())
    if FLAGS.ptq_start and FLAGS.ptq_start not in methods:
        raise ValueError(
            f"--ptq_start={FLAGS.ptq_start} does not go with --quantize={FLAGS.quantize}; use {', '.join(methods)}"
        )
    for name, reason in _NOT_FROM_PTQ.items():
        if FLAGS.ptq_start and FLAGS[name].value != FLAGS[name].default:
            raise ValueError(
                f"--{name}={FLAGS[name].value} does not go with --ptq_start={FLAGS.ptq_start}, {reason}; leave out "
                "one of them"
            )
    aggregation = FLAGS["cluster_gradient_aggregation"]
    if FLAGS.quantize == "clusterqat" and aggregation.value != aggregation.default and not FLAGS.train_centroids:
        raise ValueError(
            f"--cluster_gradient_aggregation={aggregation.value} has no effect without --train_centroids; add that"
        )
    if not init_from:
        raise ValueError(f"--quantize={FLAGS.quantize} fine-tunes a trained network; give its workdir with --init_from")
