"""Fine-tuning with quantization: the flags of it, and the model that they ask train/main.py to train."""

import tf_keras as keras
from absl import flags
from tensorflow_model_optimization.python.core.clustering.keras.cluster import strip_clustering

from tf_repvgg import fusion, runs
from tf_repvgg.quantization import (
    QuantizedLayer,
    clustering,
    learned_step_quantize,
    ptq,
    quantizers,
    strip_learned_step,
    tfmot_baseline,
)
from tf_repvgg.quantization.uniform import GRANULARITIES
from tf_repvgg.training import finished_runs

FLAGS = flags.FLAGS

_CENTROIDS_INIT = {"kmeans": None} | {init.name.lower(): init for init in clustering.CentroidInitialization}
_AGGREGATIONS = {aggregation.name.lower(): aggregation for aggregation in clustering.GradientAggregation}

# Methods of post-training quantization that leave what these ways of training start from.
_PTQ_STARTS = {"clusterqat": ("codebook", "codebook_adaquant"), "lsq": ("mse", "octav", "adaquant")}

flags.DEFINE_enum(
    "quantize",
    None,
    ["clusterqat", "lsq", "tfmot_clustering", "tfmot_quantization", "float"],
    "Fine-tune the network of the finished run --init_from, fused: with 8-bit activations and clustered weights, or "
    "weights on uniform grids whose steps are learned; by plain tfmot, first clustering, then in a second run "
    "cluster-preserving quantization; or, as the reference for all, in float. The flags that describe a network do not "
    "matter then.",
)
flags.DEFINE_string(
    "number_of_clusters",
    None,
    "States of each layer's codebook, 2 to 256, by default 8; by layer name: 'stem=256,logits=256,.*=8'.",
)
flags.DEFINE_string("weight_bits", None, "Of LSQ's grids, 2 to 8, by default 4; by layer name: 'stem=8,logits=8,.*=4'.")
flags.DEFINE_enum(
    "granularity", "per_tensor", list(GRANULARITIES), "A codebook or grid for each layer, or output channel."
)
flags.DEFINE_enum(
    "cluster_centroids_init", "kmeans", list(_CENTROIDS_INIT), "Where centroids start; tfmot's own k-means is its ++."
)
flags.DEFINE_enum(
    "ptq_start",
    None,
    sorted({name for names in _PTQ_STARTS.values() for name in names}),
    "Method of post-training quantization whose weights, biases, and codebooks or steps training starts from.",
)
flags.DEFINE_float(
    "centroid_update_rate",
    0.1,
    "Share of the way to the mean of its weights that a centroid moves at a time.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_integer("centroid_update_steps", 10, "Steps from one such move to the next.", lower_bound=1)
flags.DEFINE_boolean("train_centroids", False, "Let the optimizer move centroids too.")
flags.DEFINE_enum(
    "cluster_gradient_aggregation", "sum", list(_AGGREGATIONS), "A centroid's gradient, of those of its weights."
)
flags.DEFINE_enum(
    "batch_norm_statistics",
    None,
    clustering.BATCH_NORM_STATISTICS,
    "ClusterQAT in training form: the branches train and their merged kernel is quantized in every step, with running "
    "means and variances that rest or follow; by default it is the fused network that trains.",
)
flags.DEFINE_enum("activation_bits", "8", ["8", "16"], "Of activations, input included.")
flags.DEFINE_float(
    "ramp_epochs",
    0.0,
    "In the first so many epochs quantization of weights sets in, as a growing share of centroids in their mixture.",
    lower_bound=0,
)
flags.DEFINE_float(
    "freeze_epochs", 0.0, "The last so many epochs train with resting clusters and activation ranges.", lower_bound=0
)
flags.DEFINE_integer(
    "calibration_images", 512, "Training images for activation ranges to start with, and --ptq_start.", lower_bound=1
)

# Not the flags' own, so that one that is given, at this value too, can be refused where it has no effect.
_DEFAULTS = {"number_of_clusters": "8", "weight_bits": "4"}
# What each flag of this file belongs to.
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
_NOT_FROM_PTQ = {
    "batch_norm_statistics": "which is for fused networks",
    "cluster_centroids_init": "which says where centroids start",
    "ramp_epochs": "after which weights start at their centroids, so that there is nothing to mix",
}
# Flags of train/main.py that mean nothing here, with the value that they must have.
_WITHOUT = {"ema": 0.0, "early_epochs": 0, "merged_weight_decay": 0.0, "precision": "float32"}


class FineTuning:
    """What --quantize asks for.

    Args:
      data: `tf_repvgg.data.ClassificationData` of the training.
      steps_per_epoch: of the training.
      goes_on: whether a checkpoint will be restored, so that it does not matter where weights start.

    Attributes:
      model: what is to be trained.

    Raises:
      ValueError: for flags that do not go together, and a run that is of other data.
      FileNotFoundError: if --init_from names no finished run.
    """

    def __init__(self, data, steps_per_epoch, goes_on=False):
        _check_flags()
        model = finished_runs.load_matching(FLAGS.init_from, data, "run")
        if quantizers(model):
            raise ValueError(
                f"--init_from={FLAGS.init_from} is quantized already; name the float run that it came from"
            )
        if FLAGS.batch_norm_statistics and not fusion.needs_fusing(model):
            raise ValueError(
                f"--batch_norm_statistics={FLAGS.batch_norm_statistics} is for networks in training form, but that of "
                f"--init_from={FLAGS.init_from} is fused; leave it"
            )
        self._base = model if FLAGS.batch_norm_statistics else finished_runs.fused(model, FLAGS.init_from, "run")
        self._data = data
        self._steps_per_epoch = steps_per_epoch
        self._starts_from_ptq = FLAGS.ptq_start and not goes_on
        self.model = self._prepared()

    def _prepared(self):
        per_channel = FLAGS.granularity == "per_channel"
        initialization = _CENTROIDS_INIT[FLAGS.cluster_centroids_init]
        aggregation = _AGGREGATIONS[FLAGS.cluster_gradient_aggregation]
        activations = {"activation_bits": int(FLAGS.activation_bits), "calibration": self._calibration()}
        match FLAGS.quantize:
            case "lsq":
                base, steps = self._start()
                return learned_step_quantize(base, FLAGS.weight_bits, per_channel, steps=steps, **activations)
            case "tfmot_clustering":
                initialization = initialization or clustering.CentroidInitialization.KMEANS_PLUS_PLUS
                return tfmot_baseline.tfmot_cluster(
                    self._base, FLAGS.number_of_clusters, initialization, per_channel, aggregation
                )
            case "tfmot_quantization":
                return tfmot_baseline.tfmot_quantize(self._base)
            case "clusterqat":
                base, _ = self._start()
                return clustering.cluster_quantize(
                    base,
                    FLAGS.number_of_clusters,
                    initialization,
                    per_channel,
                    aggregation,
                    centroid_update_rate=FLAGS.centroid_update_rate,
                    centroid_update_steps=FLAGS.centroid_update_steps,
                    train_centroids=FLAGS.train_centroids,
                    ramp_steps=self._steps(FLAGS.ramp_epochs),
                    batch_norm_statistics=FLAGS.batch_norm_statistics,
                    **activations,
                )
        return self._base

    def _calibration(self):
        return self._data.calibration(FLAGS.calibration_images, "train").as_numpy_iterator()

    def _start(self):
        """The network to start with, in float, and its weight scales by layer, if there are any: after --ptq_start."""
        if not self._starts_from_ptq:
            return self._base, None
        if FLAGS.quantize == "lsq":
            options = {"weight_bits": FLAGS.weight_bits}
        else:
            options = {"number_of_clusters": FLAGS.number_of_clusters}
        options |= {"per_channel": FLAGS.granularity == "per_channel", "activation_bits": int(FLAGS.activation_bits)}
        options |= {"seed": FLAGS.seed, "progress": True}
        found = ptq.quantize(self._base, FLAGS.ptq_start, calibration=self._calibration(), **options)
        scales = {layer.name: layer.scale.numpy() for layer in found.layers if isinstance(layer, QuantizedLayer)}
        return ptq.dequantized(self._base, found), scales

    def _steps(self, epochs):
        return round(epochs * self._steps_per_epoch)

    def callbacks(self, run: runs.Run) -> list:
        """Those that belong to its training."""
        found = []
        if FLAGS.quantize == "clusterqat":
            found.append(clustering.ClusterLog(f"{run.tensorboard_path}/clusters"))
        if FLAGS.freeze_epochs:
            found.append(clustering.FreezeClusters(self._steps(FLAGS.epochs) - self._steps(FLAGS.freeze_epochs)))
        return found

    def finished(self, trainer: keras.Model) -> keras.Model:
        """What the run leaves of the trained model, which may have a teacher around it."""
        match FLAGS.quantize:
            case "clusterqat":
                return clustering.strip_cluster_quantize(trainer)
            case "lsq":
                return strip_learned_step(trainer)
            case "tfmot_quantization":
                return tfmot_baseline.strip_tfmot_quantize(trainer, self._base)
        plain = keras.Model(trainer.inputs, trainer.outputs, name=trainer.name)
        return strip_clustering(plain) if FLAGS.quantize == "tfmot_clustering" else plain


def settle_flags() -> None:
    """Gives flags the defaults that they have with this --quantize.

    Raises:
      ValueError: for a flag of this file that --quantize, or its absence, leaves without effect.
    """
    for name, users in _USED_BY.items():
        flag = FLAGS[name]
        if flag.value != flag.default and FLAGS.quantize not in users:
            asked = f"--quantize={FLAGS.quantize}" if FLAGS.quantize else "no --quantize"
            raise ValueError(f"--{name}={flag.value} has no effect with {asked}; it is for {', '.join(users)}")
    for name, value in _DEFAULTS.items():
        if FLAGS[name].value is None and FLAGS.quantize in _USED_BY[name]:
            FLAGS[name].value = value
    if FLAGS.ramp_epochs + FLAGS.freeze_epochs > FLAGS.epochs:
        raise ValueError(
            f"--ramp_epochs={FLAGS.ramp_epochs:g} and --freeze_epochs={FLAGS.freeze_epochs:g} are more than "
            f"--epochs={FLAGS.epochs}"
        )


def _check_flags():
    fitting = _PTQ_STARTS.get(FLAGS.quantize, ())
    if FLAGS.ptq_start and FLAGS.ptq_start not in fitting:
        raise ValueError(
            f"--ptq_start={FLAGS.ptq_start} does not go with --quantize={FLAGS.quantize}; {', '.join(fitting)} do"
        )
    for name, why in _NOT_FROM_PTQ.items():
        if FLAGS.ptq_start and FLAGS[name].value != FLAGS[name].default:
            raise ValueError(
                f"--{name}={FLAGS[name].value} does not go with --ptq_start={FLAGS.ptq_start}, {why}; leave one out"
            )
    aggregation = FLAGS["cluster_gradient_aggregation"]
    if FLAGS.quantize == "clusterqat" and aggregation.value != aggregation.default and not FLAGS.train_centroids:
        raise ValueError(
            f"--cluster_gradient_aggregation={aggregation.value} has no effect without --train_centroids; add that"
        )
    if not FLAGS.init_from:
        raise ValueError(f"--quantize={FLAGS.quantize} fine-tunes a trained network; name its workdir by --init_from")
    for name, value in _WITHOUT.items():
        if FLAGS[name].value != value:
            raise ValueError(f"--{name}={FLAGS[name].value} does not go with --quantize; leave it at {value}")
