"""Trains RepVGG and MobileOne: python train/main.py --flagfile=configs/digits_oabn.flags

A flag on the command line overrides the flagfile. The same command continues an interrupted run, and evaluates a
finished one again. A run writes to its workdir: model.keras (the final weights, which export/main.py reads),
metrics.jsonl, result.json, config.flags (a flagfile that runs it again), input.json, checkpoints/ and tensorboard/.

The flags are in the files that use them: input_data.py, new_network.py, training_loop.py and fine_tuning.py.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from tf_repvgg import cli, outliers, runs  # before Keras: it keeps TensorFlow's start quiet

# isort: split
import fine_tuning
import input_data
import new_network
import tf_keras as keras
import training_loop
from absl import flags

from tf_repvgg.data import ClassificationData
from tf_repvgg.quantization import quantizers
from tf_repvgg.training import checkpoints, distillation, finished_runs, optimization

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
NOT_SETTINGS = ("workdir", "data_dir", "evaluate_only", "checkpoint_minutes", "trust_model")
# The order of their flags in config.flags.
for module in (input_data, new_network, training_loop, fine_tuning):
    flags.adopt_module_key_flags(module)


def main(_):
    training_loop.seed_everything()
    with cli.bad_input_exits():
        settings = settle_flags()
        run = open_run(FLAGS.workdir, settings, FLAGS.evaluate_only, FLAGS.validation)
        data = input_data.load_data(FLAGS.seed)
    if not (FLAGS.evaluate_only or run.is_trained):
        train(run, settings, data)
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


def train(run: runs.Run, settings: dict[str, runs.Setting], data: ClassificationData) -> None:
    """Trains the network of the flags, from the last checkpoint if there is one, and saves it."""
    with cli.bad_input_exits():
        steps_per_epoch = training_loop.count_steps_per_epoch(data)
        teacher = distillation.load_teacher(FLAGS.distill_from, data, FLAGS.trust_model) if FLAGS.distill_from else None
        network = make_network(run, data, steps_per_epoch)
        trainer = training_loop.make_trainer(network.model, teacher, data, steps_per_epoch)
        run.start(settings, data.metadata())  # after everything that can refuse the flags
        loop = training_loop.TrainingLoop(run, trainer, steps_per_epoch, FLAGS.checkpoint_minutes)
    network.print_summary()
    loop.fit(data, "validation" if FLAGS.validation else None, network.make_callbacks(run))
    run.save_model(network.finish())


def make_network(
    run: runs.Run, data: ClassificationData, steps_per_epoch: int
) -> new_network.NewNetwork | fine_tuning.FineTuning:
    """The network to train: a new one, or with --quantize that of a finished run."""
    if not FLAGS.quantize:
        return new_network.NewNetwork(data, FLAGS.seed, FLAGS.precision, FLAGS.init_from, FLAGS.trust_model)
    training_loop.check_flags_for_fine_tuning()
    is_continued = bool(checkpoints.list_checkpoints(run.checkpoints_path))
    return fine_tuning.FineTuning(
        data, FLAGS.init_from, FLAGS.epochs, steps_per_epoch, FLAGS.seed, is_continued, FLAGS.trust_model
    )


def evaluate(model: keras.Model, data: ClassificationData, split: str) -> dict[str, Any]:
    """Top-1 accuracy on every image of a split."""
    model.compile(metrics=[optimization.make_top1()])
    metrics = model.evaluate(data.evaluation(split), verbose=0, return_dict=True)
    return {"split": split, "top1_percent": 100 * metrics["top1"], "images": data.num_examples(split)}


if __name__ == "__main__":
    cli.run(main)
