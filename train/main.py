"""Trains RepVGG: python train/main.py --flagfile=configs/digits_oabn.flags

A flag on the command line overrides the flagfile. The same command continues an interrupted run, and evaluates a
finished one again. What a run leaves in its workdir: model.keras (the final weights, what export/main.py reads),
metrics.jsonl, result.json, config.flags (reruns it), checkpoints/ and tensorboard/.
"""

import itertools

from tf_repvgg import cli, layers, outliers, runs  # before Keras: it keeps TensorFlow's start quiet

# isort: split
import fine_tuning
import tensorflow as tf
import tf_keras as keras
from absl import flags

from tf_repvgg.data import NORMALIZATIONS, ClassificationData, Preprocessing, rand_augment
from tf_repvgg.data.augmentation import CROPS
from tf_repvgg.data.image_folder import BAD_IMAGES, MAX_MEGAPIXELS
from tf_repvgg.models import BLOCKS, VARIANTS, build_repvgg, summary
from tf_repvgg.training import callbacks, distillation, finished_runs, optimization

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "dataset",
    "digits",
    "TFDS name of an image classification set ('digits' comes with the package), or folder:PATH for images in "
    "PATH/train/<label>/ and PATH/test/<label>/.",
)
flags.DEFINE_string(
    "data_dir",
    None,
    "TFDS data directory that holds the set, by default TFDS's own, with download; for a folder, where PATH starts.",
)
flags.DEFINE_enum("bad_images", "refuse", BAD_IMAGES, "What to do with images of a folder that cannot be used.")
flags.DEFINE_float("max_megapixels", MAX_MEGAPIXELS, "Images of a folder that are larger are bad.", lower_bound=0)
flags.DEFINE_integer(
    "image_size", None, "Height and width to resize to; needed where a set's images differ in size.", lower_bound=1
)
flags.DEFINE_integer(
    "evaluation_resize",
    None,
    "Shorter side to resize to before the centre of --image_size is cut out; by default whole images are stretched.",
    lower_bound=1,
)
flags.DEFINE_enum("normalization", "symmetric", list(NORMALIZATIONS), "Mean and standard deviation of pixels.")
flags.DEFINE_enum(
    "crop", "pad", CROPS, "Training images: padded and cropped, or a random window of the stored image, resized."
)
flags.DEFINE_integer("crop_padding", 2, "Pixels that --crop=pad adds on every side.", lower_bound=0)
flags.DEFINE_boolean("flip", None, "Mirror half of the training images; by default unless the set is of digits.")
flags.DEFINE_integer("randaugment", 0, "Operations that RandAugment applies to each image; 0 for none.", lower_bound=0)
flags.DEFINE_float("randaugment_magnitude", 9, "Their strength.", lower_bound=0, upper_bound=rand_augment.MAX_MAGNITUDE)
flags.DEFINE_float("mixup", 0.0, "Alpha of mixup; 0 for none.", lower_bound=0)
flags.DEFINE_boolean(
    "validation", True, "Hold validation data out of training and report on them, not on the test set."
)
flags.DEFINE_string("workdir", None, "Folder the run writes to.", required=True)
flags.DEFINE_enum("variant", "digits", list(VARIANTS), "Network to build.")
flags.DEFINE_enum("block", "repvgg", BLOCKS, "Block of the training form.")
flags.DEFINE_enum("norm", "bn", layers.NORMS, "Normalization: plain, or outlier-aware (OABN).")
flags.DEFINE_string(
    "oabn_k",
    "0.1",
    "OABN's limit: a number, '6std' relative to each kernel, or by block name: 'stage4_.*=0.05,.*=0.1'.",
)
flags.DEFINE_enum("oabn_branches", "identity", layers.OABN_BRANCHES, "Branches that OABN clips.")
flags.DEFINE_enum("oabn_clip_mode", "project", layers.CLIP_MODES, "How clipped gammas are trained.")
flags.DEFINE_enum("identity", "norm", layers.IDENTITIES, "Identity branch: as published, or one of the controls.")
flags.DEFINE_float("identity_gain", 0.1, "Gain of --identity=constant.")
flags.DEFINE_float("bn_epsilon", 1e-5, "Added to the variance in every batch normalization.", lower_bound=1e-12)
flags.DEFINE_enum("padding", "same", layers.PADDINGS, "Padding of strided blocks; 'symmetric' is what PyTorch does.")
flags.DEFINE_integer("epochs", 10, "Passes over the training data.", lower_bound=1)
flags.DEFINE_integer("steps_per_epoch", None, "By default those of one pass over the training data.", lower_bound=1)
flags.DEFINE_integer("early_epochs", 0, "The first so many epochs train on smaller, cheaper crops.", lower_bound=0)
flags.DEFINE_integer("early_crop", 24, "Height and width of those crops.", lower_bound=1)
flags.DEFINE_integer("batch_size", 128, "Images in a step.", lower_bound=1)
flags.DEFINE_enum("optimizer", "sgd", optimization.OPTIMIZERS, "SGD, or AdamW with Keras's moments.")
flags.DEFINE_float(
    "learning_rate", 0.1, "Peak of the cosine schedule; AdamW needs a lower one, about 0.001.", lower_bound=0
)
flags.DEFINE_float("warmup_epochs", 1.0, "Epochs of linear warm-up before the cosine.", lower_bound=0)
flags.DEFINE_float("momentum", 0.9, "Momentum of SGD.", lower_bound=0, upper_bound=1)
flags.DEFINE_boolean("nesterov", True, "Nesterov's momentum, or the plain one.")
flags.DEFINE_float(
    "weight_decay", 5e-3, "Decoupled: kernels shrink by this times the learning rate per step.", lower_bound=0
)
flags.DEFINE_float(
    "merged_weight_decay",
    0.0,
    "Weight of an L2 penalty on the blocks' merged kernels, in the loss; goes with --bn_epsilon=1e-3.",
    lower_bound=0,
)
flags.DEFINE_float(
    "ema",
    0.0,
    "Decay of a moving average of the weights, such as 0.999, which is what is kept; 0 for none.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_float("label_smoothing", 0.0, "Probability spread over all classes.", lower_bound=0, upper_bound=1)
flags.DEFINE_enum(
    "precision",
    "float32",
    ["float32", "mixed_bfloat16"],
    "Keras dtype policy of training; the model is saved in float32.",
)
flags.DEFINE_integer("seed", 0, "Of initial weights, shuffling and augmentation.", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_string("init_from", None, "model.keras, or a workdir with one, whose weights training starts from.")
flags.DEFINE_string("distill_from", None, "Workdir of a finished run, or its model.keras, whose model is the teacher.")
flags.DEFINE_float("distill_weight", 0.5, "Weight of the teacher's part of the loss.", lower_bound=0, upper_bound=1)
flags.DEFINE_float("distill_temperature", 4.0, "What divides both logits in that part.", lower_bound=0)
flags.DEFINE_boolean("deterministic", False, "The same weights to the bit from the same command on the same machine.")
flags.DEFINE_float(
    "checkpoint_minutes",
    10,
    "Checkpoint within epochs too, so many minutes after the last; 0 for none but at epochs' ends.",
    lower_bound=0,
)
flags.adopt_module_key_flags(fine_tuning)  # they are this program's own too: config.flags holds them
flags.DEFINE_boolean("evaluate_only", False, "Evaluate the workdir's model.keras; train nothing and write nothing.")


def make_data():
    size = None if FLAGS.image_size is None else (FLAGS.image_size, FLAGS.image_size)
    data = ClassificationData(
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
        seed=FLAGS.seed,
        bad_images=FLAGS.bad_images,
        max_megapixels=FLAGS.max_megapixels,
    )
    FLAGS.dataset = data.name  # config.flags is for other machines too: without the path to a folder
    return data


def steps_per_epoch(data):
    every_image_once = data.steps_per_epoch(FLAGS.batch_size)
    if FLAGS.steps_per_epoch and FLAGS.steps_per_epoch > every_image_once:
        raise ValueError(
            f"--steps_per_epoch={FLAGS.steps_per_epoch} is more than the {every_image_once} batches of one pass"
        )
    return FLAGS.steps_per_epoch or every_image_once


def make_model(data, image_shape, precision="float32"):
    """The network of the flags for one image shape; None for a height or width takes any."""
    keras.utils.set_random_seed(FLAGS.seed)
    keras.mixed_precision.set_global_policy(precision)
    return build_repvgg(
        FLAGS.variant,
        image_shape,
        data.num_classes,
        norm=FLAGS.norm,
        block=FLAGS.block,
        identity=FLAGS.identity,
        oabn_k=FLAGS.oabn_k,
        oabn_branches=FLAGS.oabn_branches,
        clip_mode=FLAGS.oabn_clip_mode,
        identity_gain=FLAGS.identity_gain,
        padding=FLAGS.padding,
        epsilon=FLAGS.bn_epsilon,
    )


def make_trainer(data, tuning=None, teacher=None):
    """The compiled model at its start: from the flags, or from a `fine_tuning.FineTuning`; a teacher may be given."""
    if FLAGS.early_epochs and FLAGS.early_crop > min(data.preprocessing.size):
        raise ValueError(
            f"--early_crop={FLAGS.early_crop} is larger than the images, {data.preprocessing.size}; use a smaller crop"
        )
    if tuning:
        trainer = tuning.model
    else:
        trainer = make_model(data, (None, None, data.channels), FLAGS.precision)
        if FLAGS.init_from:
            runs.copy_weights(runs.load_model(FLAGS.init_from), trainer)
    if teacher:
        trainer = distillation.Distilled(trainer, teacher, FLAGS.distill_weight, FLAGS.distill_temperature)
    if FLAGS.merged_weight_decay:
        optimization.penalize_merged_kernels(trainer, FLAGS.merged_weight_decay)
    steps = steps_per_epoch(data)
    trainer.compile(
        optimization.make_optimizer(
            FLAGS.learning_rate,
            steps=steps * FLAGS.epochs,
            warmup_steps=round(steps * FLAGS.warmup_epochs),
            momentum=FLAGS.momentum,
            nesterov=FLAGS.nesterov,
            weight_decay=FLAGS.weight_decay,
            optimizer=FLAGS.optimizer,
        ),
        optimization.CrossEntropy(data.num_classes, FLAGS.label_smoothing),
        loss_weights=1 - FLAGS.distill_weight if teacher else None,
        metrics=[optimization.top1()],
    )
    return trainer


def train(run, data, trainer, resume, average, also):
    """Trains from the last checkpoint to the end: on small crops first if asked for, then on whole images.

    `average` is None or the callback of --ema; `also` are more callbacks.
    """
    steps = steps_per_epoch(data)
    every_phase = [
        callbacks.StopOnNaN(),
        *([average] if average else []),
        callbacks.MetricsLog(run.metrics_path, resume.first_epoch, resume.seconds_before),
        keras.callbacks.TensorBoard(run.tensorboard_path, write_graph=False),
        *also,
        resume,
    ]
    first, step = resume.first_epoch, resume.first_step
    early_end = max(first, min(FLAGS.early_epochs, FLAGS.epochs))
    # An epoch to be continued in its middle has fewer steps than the others, so it is a phase of its own.
    borders = sorted({first, first + bool(step), early_end, FLAGS.epochs})
    with callbacks.Progress(steps, FLAGS.epochs, first, step) as progress:
        for start, end in itertools.pairwise(borders):
            first_step = step if start == first else 0
            crop = FLAGS.early_crop if start < early_end else None
            trainer.fit(
                data.training(FLAGS.batch_size, range(start, end), crop, steps, first_step),
                steps_per_epoch=steps - first_step,
                initial_epoch=start,
                epochs=end,
                validation_data=data.evaluation("validation") if FLAGS.validation else None,
                verbose=0,
                callbacks=[progress, *every_phase],
            )


def evaluate(data, model, split):
    """Top-1 in percent on every image of a split."""
    model.compile(metrics=[optimization.top1()])
    return 100 * model.evaluate(data.evaluation(split), verbose=0, return_dict=True)["top1"]


def main(_):
    if FLAGS.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(FLAGS.seed)
    with cli.bad_input_exits():
        fine_tuning.settle_flags()
        run = runs.Run(FLAGS.workdir)
        # The test split may be looked at whatever a run has held out.
        run.check_config(FLAGS, but=["validation"] if FLAGS.evaluate_only and not FLAGS.validation else [])
        if not FLAGS.evaluate_only:
            run.claim()
        data = make_data()
        trains = not (FLAGS.evaluate_only or run.is_complete)
        if trains:
            teacher = distillation.load_teacher(FLAGS.distill_from, data) if FLAGS.distill_from else None
            tuning = None
            if FLAGS.quantize:
                goes_on = bool(callbacks.checkpoints(run.checkpoints_path))
                tuning = fine_tuning.FineTuning(data, steps_per_epoch(data), goes_on)
            model = None if tuning else make_model(data, data.image_shape)
            trainer = make_trainer(data, tuning, teacher)
            run.start(FLAGS, data)  # after everything that can refuse
            average = callbacks.AverageWeights(trainer, FLAGS.ema) if FLAGS.ema else None
            averages = {"averages": average.averages} if average else {}
            resume = callbacks.Resume(run.checkpoints_path, trainer, FLAGS.checkpoint_minutes, **averages)
            also = tuning.callbacks(run) if tuning else []
        else:
            model = runs.load_model(run.path)
            finished_runs.check_fits(model, data)
    if trains:
        if model:
            summary(model)
        try:
            train(run, data, trainer, resume, average, also)
        except FloatingPointError as error:
            kept = (
                f"{resume.latest} is kept; the same command goes on from there, so rather"
                if resume.latest
                else "there is no checkpoint yet;"
            )
            raise FloatingPointError(f"{error}; {kept} try a lower --learning_rate in a new workdir") from None
        if tuning:
            model = tuning.finished(trainer)
        else:
            model.set_weights([weight.numpy() for weight in (average.averages if average else trainer.weights)])
        run.save_model(model)
    outliers.report(model, print_fn=print)
    split = "validation" if FLAGS.validation else "test"
    result = {"split": split, "top1_percent": evaluate(data, model, split), "images": data.num_examples(split)}
    if not FLAGS.evaluate_only:
        run.write_result(result)
    print(f"top-1 on the {split} split ({result['images']} images): {result['top1_percent']:.2f} %")


if __name__ == "__main__":
    cli.run(main)
