"""How a run trains: the flags for its schedule, optimizer, losses and randomness, and the loop that they describe."""

import contextlib
import functools
import itertools
import math

import tensorflow as tf
import tf_keras as keras
from absl import flags

from tf_repvgg import graph, interruption, memory, runs
from tf_repvgg.data import ClassificationData
from tf_repvgg.training import averages, checkpoints, distillation, divergence, logs, optimization
from tf_repvgg.training.distribution import Distribution

FLAGS = flags.FLAGS

flags.DEFINE_integer("epochs", 10, "Number of passes over the training data.", lower_bound=1)
flags.DEFINE_integer("steps_per_epoch", None, "Steps in an epoch; by default one pass over the data.", lower_bound=1)
flags.DEFINE_integer("early_epochs", 0, "Number of epochs at the start that train on smaller crops.", lower_bound=0)
flags.DEFINE_integer(
    "early_crop", 24, "Height and width of the crops of --early_epochs.", lower_bound=1, upper_bound=2**14
)
flags.DEFINE_integer("batch_size", 128, "Images per training step, on all devices together.", lower_bound=1)
flags.DEFINE_boolean(
    "drop_remainder",
    True,
    "Leave the images that fill no batch out of an epoch, others in each; otherwise they are its last batch.",
)
flags.DEFINE_enum("optimizer", "sgd", optimization.OPTIMIZERS, "SGD, or AdamW with the decay rates of Keras.")
flags.DEFINE_float(
    "learning_rate",
    0.1,
    "Peak of the cosine schedule, for the whole batch; AdamW needs a lower one, about 0.001.",
    lower_bound=0,
)
flags.DEFINE_float("warmup_epochs", 1.0, "Epochs of linear warm-up before the cosine.", lower_bound=0)
flags.DEFINE_float("momentum", 0.9, "Momentum of SGD.", lower_bound=0, upper_bound=1)
flags.DEFINE_boolean("nesterov", True, "Use Nesterov's momentum.")
flags.DEFINE_float(
    "weight_decay",
    5e-3,
    "Decoupled weight decay: in each step, kernels shrink by this share times the learning rate.",
    lower_bound=0,
)
flags.DEFINE_float(
    "merged_weight_decay",
    0.0,
    "Weight of an L2 penalty on the merged kernels of the blocks, added to the loss; use it with --bn_epsilon=1e-3.",
    lower_bound=0,
)
flags.DEFINE_float(
    "ema",
    0.0,
    "Decay of a moving average of the weights, such as 0.999, which becomes the final model; 0 for none.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_float("label_smoothing", 0.0, "Probability that is spread over all classes.", lower_bound=0, upper_bound=1)
flags.DEFINE_enum(
    "precision",
    "float32",
    ["float32", "mixed_bfloat16"],
    "Keras dtype policy of training; the final model is in float32.",
)
flags.DEFINE_integer(
    "seed", 0, "Seed of the initial weights, shuffling and augmentation.", lower_bound=0, upper_bound=2**32 - 1
)
flags.DEFINE_string(
    "init_from",
    None,
    "Workdir of a run, its model.keras, or a checkpoint of a PyTorch network (.safetensors, .npz, .pth), whose weights "
    "training starts from.",
)
flags.DEFINE_string(
    "distill_from", None, "Workdir of a finished run, or its model.keras, whose model becomes the teacher."
)
flags.DEFINE_float("distill_weight", 0.5, "Weight of the teacher's term of the loss.", lower_bound=0, upper_bound=1)
flags.DEFINE_float(
    "distill_temperature", 4.0, "Temperature that divides the logits in the teacher's term.", lower_bound=0
)
flags.DEFINE_boolean(
    "deterministic", False, "Train the same weights, bit for bit, each time the command runs on the same machine."
)

# Flags that fine-tuning with --quantize does not support, and their values without effect.
_UNSUPPORTED_WITH_QUANTIZE = {"ema": 0.0, "early_epochs": 0, "merged_weight_decay": 0.0, "precision": "float32"}


def seed_everything() -> None:
    """Seeds all random numbers, and makes TensorFlow deterministic with --deterministic."""
    if FLAGS.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(FLAGS.seed)


def check_flags_for_fine_tuning(replicas: int) -> None:
    """Checks that the flags of this file go together with --quantize.

    Args:
      replicas: Number of replicas of the network.

    Raises:
      ValueError: If one does not; names it.
    """
    for name, value in _UNSUPPORTED_WITH_QUANTIZE.items():
        if FLAGS[name].value != value:
            raise ValueError(f"--{name}={FLAGS[name].value} does not go with --quantize; leave it at {value}")
    if replicas > 1 and FLAGS.quantize.startswith("tfmot"):
        raise ValueError(
            f"--quantize={FLAGS.quantize} trains on one device only, since tfmot's variables would differ between "
            "devices; leave --strategy out"
        )
    if replicas > 1 and FLAGS.quantize == "clusterqat" and FLAGS.strategy == "multi_worker":
        raise ValueError(
            "--quantize=clusterqat trains in one process only, since TensorFlow does not send assignments to others; "
            "use --strategy=mirrored, or --quantize=lsq"
        )
    if replicas > 1 and FLAGS.batch_norm_statistics == "running":
        raise ValueError(
            "--batch_norm_statistics=running trains on one device only; use --batch_norm_statistics=frozen, or leave "
            "--strategy out"
        )


def count_steps_per_epoch(data: ClassificationData, replicas: int) -> int:
    """The number of training steps in an epoch.

    Args:
      data: Data of the training.
      replicas: Number of replicas that a batch is split over.

    Raises:
      ValueError: If the data have fewer batches than that, or none, batches cannot be split, or a replica's part of one
        is larger than the memory.
    """
    images = -(-FLAGS.batch_size // replicas)
    batch_bytes = 4 * images * math.prod(data.image_shape)
    if batch_bytes > memory.limit():
        raise ValueError(
            f"a batch of {images} images of {data.image_shape} takes {batch_bytes / 2**30:,.1f} GiB, and this process "
            f"may use {memory.limit() / 2**30:,.1f} GiB; use a smaller --batch_size or --image_size"
        )
    batches = data.steps_per_epoch(FLAGS.batch_size, FLAGS.drop_remainder)
    data.check_replicas(replicas, FLAGS.batch_size, FLAGS.drop_remainder, "validation" if FLAGS.validation else None)
    if FLAGS.steps_per_epoch and FLAGS.steps_per_epoch > batches:
        raise ValueError(
            f"--steps_per_epoch={FLAGS.steps_per_epoch} is more than the {batches} batches of one pass over the data"
        )
    return FLAGS.steps_per_epoch or batches


def make_trainer(
    model: keras.Model, teacher: keras.Model | None, data: ClassificationData, steps_per_epoch: int
) -> keras.Model:
    """Compiles a network with optimizer, losses and metric; with a teacher, puts a `Distiller` around it.

    To be called in the scope of the distribution.

    Args:
      model: Network to train, image [batch, height, width, channels] -> logits [batch, classes].
      teacher: Network with the same inputs and outputs, or None.
      data: Data of the training.
      steps_per_epoch: Number of steps in an epoch.

    Raises:
      ValueError: If flags do not go together.
    """
    if FLAGS.early_epochs and FLAGS.early_crop > min(data.preprocessing.size):
        raise ValueError(
            f"--early_crop={FLAGS.early_crop} is larger than the images, {data.preprocessing.size}; use a smaller crop"
        )
    if teacher and tf.distribute.has_strategy():
        teacher = graph.rebuild(teacher, graph.copy_layer)  # with variables in the scope
    trainer = (
        distillation.Distiller(model, teacher, FLAGS.distill_weight, FLAGS.distill_temperature) if teacher else model
    )
    if FLAGS.merged_weight_decay:
        optimization.penalize_merged_kernels(trainer, FLAGS.merged_weight_decay)
    trainer.compile(
        optimization.make_optimizer(
            FLAGS.learning_rate,
            steps=steps_per_epoch * FLAGS.epochs,
            warmup_steps=round(steps_per_epoch * FLAGS.warmup_epochs),
            momentum=FLAGS.momentum,
            nesterov=FLAGS.nesterov,
            weight_decay=FLAGS.weight_decay,
            optimizer=FLAGS.optimizer,
        ),
        optimization.CrossEntropy(data.num_classes, FLAGS.label_smoothing),
        loss_weights=1 - FLAGS.distill_weight if teacher else None,
        metrics=[optimization.make_top1()],
    )
    return trainer


class TrainingLoop:
    """The training of a run, from its last checkpoint to its last epoch.

    Args:
      run: Run that has been started.
      trainer: Compiled model. The last checkpoint is restored into it, if there is one.
      steps_per_epoch: Number of steps in an epoch.
      checkpoint_minutes: Minutes between checkpoints within an epoch; 0 for none.
      distribution: Devices and processes of the training. All processes train; the chief alone writes.

    Raises:
      ValueError: If the last checkpoint, or the log of earlier epochs, is damaged or of another network.
    """

    def __init__(
        self,
        run: runs.Run,
        trainer: keras.Model,
        steps_per_epoch: int,
        checkpoint_minutes: float,
        distribution: Distribution,
    ) -> None:
        self._run = run
        self._distribution = distribution
        self._trainer = trainer
        self._steps_per_epoch = steps_per_epoch
        self._average = averages.MovingAverage(trainer, FLAGS.ema) if FLAGS.ema else None
        variables = {"averages": self._average.averages} if self._average else {}
        self._checkpoints = checkpoints.Checkpoints(
            run.checkpoints_path, trainer, checkpoint_minutes, distribution, **variables
        )
        self._check_position()
        self._logs = self._make_logs() if distribution.is_chief else []

    def fit(
        self,
        data: ClassificationData,
        validation_split: str | None,
        extra_callbacks: list[keras.callbacks.Callback],
    ) -> None:
        """Trains to the last epoch; then, with --ema, the weights are their averages.

        Args:
          data: Data of the training.
          validation_split: Split that is evaluated after every epoch; None for none.
          extra_callbacks: Callbacks of the network that is trained.

        Raises:
          FloatingPointError: If training diverges.
        """
        try:
            with interruption.allow_deferral():
                self._fit(data, validation_split, extra_callbacks)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; {self._advise()}") from None
        if self._average:
            with self._distribution.scope():
                self._average.replace_weights()

    def _make_logs(self):
        first_epoch, seconds_before = self._checkpoints.first_epoch, self._checkpoints.seconds_before
        return [
            logs.MetricsLog(self._run.metrics_path, first_epoch, seconds_before),
            keras.callbacks.TensorBoard(str(self._run.tensorboard_path), write_graph=False),
        ]

    def _check_position(self):
        """Checks that the checkpoint is one of this run: its optimizer has made as many steps as its position says."""
        epoch, step = self._checkpoints.first_epoch, self._checkpoints.first_step
        steps = int(self._trainer.optimizer.iterations.numpy())
        is_within = (epoch < FLAGS.epochs and step < self._steps_per_epoch) or (epoch, step) == (FLAGS.epochs, 0)
        if not is_within or epoch * self._steps_per_epoch + step != steps:
            raise ValueError(
                f"checkpoint {str(self._checkpoints.latest)!r} is damaged: it is at epoch {epoch}, step {step}, after "
                f"{steps} steps, but the run has {FLAGS.epochs} epochs of {self._steps_per_epoch} steps; delete it to "
                "continue from the one before"
            )

    def _fit(self, data, validation_split, extra_callbacks):
        """First the epochs on small crops, then those on whole images."""
        first_epoch, first_step = self._checkpoints.first_epoch, self._checkpoints.first_step
        early_end = max(first_epoch, min(FLAGS.early_epochs, FLAGS.epochs))
        # An epoch that continues in its middle has fewer steps than the others, so it is a phase of its own.
        borders = sorted({first_epoch, first_epoch + bool(first_step), early_end, FLAGS.epochs})
        callbacks = [
            divergence.StopOnNaN(),
            *([self._average] if self._average else []),
            *self._logs,
            *extra_callbacks,
            self._checkpoints,
        ]
        validation = {}
        if validation_split:
            validation = {
                "validation_data": self._distribution.distribute(
                    lambda shard: data.evaluation(validation_split, shard=shard)
                ),
                "validation_steps": data.evaluation_steps(validation_split),
            }
        with contextlib.ExitStack() as stack:
            if self._distribution.is_chief:
                bar = logs.ProgressBar(self._steps_per_epoch, FLAGS.epochs, first_epoch, first_step)
                callbacks.insert(0, stack.enter_context(bar))
            for start, end in itertools.pairwise(borders):
                steps_done = first_step if start == first_epoch else 0
                make_batches = functools.partial(
                    data.training,
                    FLAGS.batch_size,
                    range(start, end),
                    FLAGS.early_crop if start < early_end else None,
                    self._steps_per_epoch,
                    steps_done,
                    FLAGS.drop_remainder,
                )
                self._trainer.fit(
                    self._distribution.distribute(make_batches),
                    steps_per_epoch=self._steps_per_epoch - steps_done,
                    initial_epoch=start,
                    epochs=end,
                    verbose=0,
                    callbacks=callbacks,
                    **validation,
                )

    def _advise(self):
        if latest := self._checkpoints.latest:
            return (
                f"the same command would continue from {latest} and diverge again, so try a lower --learning_rate in "
                "a new workdir"
            )
        return "there is no checkpoint yet; try a lower --learning_rate in a new workdir"
