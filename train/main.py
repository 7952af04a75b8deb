"""Trains RepVGG and MobileOne: python train/main.py --flagfile=configs/digits_oabn.flags

A flag on the command line overrides the flagfile. The same command continues an interrupted run, and evaluates a
finished one again. A run writes to its workdir: model.keras (the final weights, which export/main.py reads),
metrics.jsonl, result.json, config.flags (a flagfile that runs it again), input.json, checkpoints/ and tensorboard/.

The flags are in the files that use them: input_data.py, new_network.py, training_loop.py, fine_tuning.py and
devices.py. With --strategy=multi_worker the same command runs on each machine; the chief, worker 0, writes.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from tf_repvgg import cli, outliers, runs  # before Keras: it keeps TensorFlow's start quiet

# isort: split
import devices
import fine_tuning
import input_data
import new_network
import tf_keras as keras
import training_loop
from absl import flags

from tf_repvgg.data import ClassificationData
from tf_repvgg.quantization import quantizers
from tf_repvgg.training import checkpoints, distillation, finished_runs, optimization
from tf_repvgg.training.distribution import Distribution

FLAGS = flags.FLAGS

flags.DEFINE_string("workdir", None, "Folder that the run writes to.", required=True)
flags.DEFINE_float(
    "checkpoint_minutes",
    10,
    "Minutes between checkpoints within an epoch; 0 for checkpoints at the ends of epochs only.",
    lower_bound=0,
)
flags.DEFINE_boolean("evaluate_only", False, "Evaluate the workdir's model.keras; train nothing and write nothing.")
cli.define_trust_flag()

# Training images whose activations the summary of a run looks at.
OUTLIER_IMAGES = 512
# Flags that do not change the trained weights: a run may continue with other values.
NOT_SETTINGS = (
    "workdir",
    "data_dir",
    "evaluate_only",
    "checkpoint_minutes",
    "trust_model",
    "strategy",
    "tpu",
    "connect_seconds",
)
# The order of their flags in config.flags.
for module in (input_data, new_network, training_loop, fine_tuning, devices):
    flags.adopt_module_key_flags(module)


def main(_):
    training_loop.seed_everything()
    with cli.bad_input_exits():
        settings = settle_flags()
        cluster = devices.read_cluster()
        is_chief = cluster is None or cluster.is_chief
        run = open_run(FLAGS.workdir, settings, FLAGS.evaluate_only or not is_chief, FLAGS.validation)
        trains = not (FLAGS.evaluate_only or run.is_trained)
        distribution = devices.connect(cluster) if trains else Distribution()  # before anything runs in TensorFlow
        data = input_data.load_data(FLAGS.seed)
    with distribution.explain_losses():
        if trains:
            train(run, settings, data, distribution)
        if is_chief:
            summarize(run, data)
        distribution.wait()  # TensorFlow takes workers that end before others for lost


def settle_flags() -> dict[str, runs.Setting]:
    """The settings of the run: all flags that change the trained weights, with their final values."""
    new_network.settle_flags()
    fine_tuning.settle_flags(FLAGS.epochs)
    settings = cli.read_settings(__name__, NOT_SETTINGS)
    dataset = dataclasses.replace(settings["dataset"], line=f"--dataset={input_data.portable_dataset_name()}")
    return settings | {"dataset": dataset}


def open_run(
    workdir: str, settings: dict[str, runs.Setting], evaluates_only: bool, holds_out_validation: bool
) -> runs.Run:
    """The run of a workdir, which must have the same settings; unless it is only evaluated, it is claimed."""
    run = runs.Run(workdir)
    # Every run may be evaluated on the test split, whether it has held out validation data or not.
    may_differ: Collection[str] = ("validation",) if evaluates_only and not holds_out_validation else ()
    run.check_settings(settings, may_differ)
    if not evaluates_only:
        run.claim()
        if run.is_trained:
            runs.read_epochs(run.metrics_path)  # for result.json, at the end
    return run


def summarize(run: runs.Run, data: ClassificationData) -> None:
    """Prints the outliers of the final model and its accuracy, which is written too."""
    with cli.bad_input_exits():
        model = runs.load_model(run.path, FLAGS.trust_model)
        finished_runs.check_fits(model, data)
    outliers.report(model, print_fn=print)
    if not quantizers(model):
        print()
        outliers.report_activations(model, data.first_batches(OUTLIER_IMAGES), print_fn=print)
    result = evaluate(model, data, input_data.evaluation_split())
    if not FLAGS.evaluate_only:
        run.write_result(result)
    print(f"top-1 on the {result['split']} split ({result['images']} images): {result['top1_percent']:.2f} %")


def train(
    run: runs.Run, settings: dict[str, runs.Setting], data: ClassificationData, distribution: Distribution
) -> None:
    """Trains the network of the flags, from the last checkpoint if there is one; the chief saves it."""
    with cli.bad_input_exits():
        check_agreement(run, settings, data, distribution)
        steps_per_epoch = training_loop.count_steps_per_epoch(data, distribution.replicas)
        teacher = distillation.load_teacher(FLAGS.distill_from, data, FLAGS.trust_model) if FLAGS.distill_from else None
        network = make_network(run, data, steps_per_epoch, distribution)
        with distribution.scope():
            trainer = training_loop.make_trainer(network.model, teacher, data, steps_per_epoch)
        if distribution.is_chief:
            run.start(settings, data.metadata())  # after everything that can refuse the flags
        with distribution.scope():
            loop = training_loop.TrainingLoop(run, trainer, steps_per_epoch, FLAGS.checkpoint_minutes, distribution)
    if distribution.is_chief:
        network.print_summary()
    split = "validation" if FLAGS.validation else None
    loop.fit(data, split, network.make_callbacks(run, distribution.is_chief))
    model = network.finish()
    if distribution.is_chief:
        run.save_model(model)


def check_agreement(
    run: runs.Run, settings: dict[str, runs.Setting], data: ClassificationData, distribution: Distribution
) -> None:
    """Checks that all workers train the same network on the same data from the same checkpoint."""
    latest = next(iter(checkpoints.list_checkpoints(run.checkpoints_path)), None)
    distribution.check_agreement(
        flags={name: setting.line for name, setting in settings.items()},
        data={"labels": ", ".join(data.labels), "training images": data.num_examples("train")},
        workdir={"last checkpoint": latest.name if latest else "none"},
    )


def make_network(
    run: runs.Run, data: ClassificationData, steps_per_epoch: int, distribution: Distribution
) -> new_network.NewNetwork | fine_tuning.FineTuning:
    """The network to train: a new one, or with --quantize that of a finished run."""
    if not FLAGS.quantize:
        return new_network.NewNetwork(
            data, FLAGS.seed, FLAGS.precision, FLAGS.init_from, FLAGS.trust_model, distribution
        )
    training_loop.check_flags_for_fine_tuning(distribution.replicas)
    is_continued = bool(checkpoints.list_checkpoints(run.checkpoints_path))
    return fine_tuning.FineTuning(
        data, FLAGS.init_from, FLAGS.epochs, steps_per_epoch, FLAGS.seed, is_continued, FLAGS.trust_model, distribution
    )


def evaluate(model: keras.Model, data: ClassificationData, split: str) -> dict[str, Any]:
    """Top-1 accuracy on every image of a split."""
    model.compile(metrics=[optimization.make_top1()])
    metrics = model.evaluate(data.evaluation(split), verbose=0, return_dict=True)
    return {"split": split, "top1_percent": 100 * metrics["top1"], "images": data.num_examples(split)}


if __name__ == "__main__":
    cli.run(main)
