"""Does RepVGG-A0 collapse in 8 bits? An attempt at CIFAR resolution: python experiments/int8_collapse.py --data_dir=...

The literature reports that RepVGG-A0 on ImageNet falls from 72 to 52 % in INT8. This trains A0's 22 layers on CIFAR-10
by the published recipe, with BN, with OABN, and as QARepVGG, quantizes to 8 bits per tensor and per channel, and
measures what would explain a fall or its absence: the variance of each layer's activations, the share of tiny running
variances, the outliers of the merged weights, and the cost of rounding weights alone. Resumable; writes
results/int8_collapse.json and results/int8_collapse.md.
"""

import numpy as np
import tensorflow as tf
import tf_keras as keras
from absl import app, flags
from harness.commands import ROOT, export, train
from harness.pages.int8_collapse import SCHEDULE, render
from harness.tables import write_results

from tf_repvgg import fusion, graph, provenance, runs
from tf_repvgg.data import ClassificationData, Preprocessing
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.layers.batch_norm import scale_and_shift
from tf_repvgg.quantization.uniform import GRANULARITIES, quantize_min_max

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/int8_collapse", "Folder of the training runs.")
flags.DEFINE_string("results", "results", "Folder of the results.")
flags.DEFINE_integer("epochs", None, "Epochs of every training; by default as in the configs.", lower_bound=1)
flags.DEFINE_integer("steps_per_epoch", None, "Steps of an epoch; by default one pass over the images.", lower_bound=1)
flags.DEFINE_integer("images", 1000, "Held-out images on which activations are measured.", lower_bound=1)

MODELS = {"BN": "cifar10_a0_bn", "OABN": "cifar10_a0_oabn", "QARepVGG": "cifar10_a0_qarepvgg"}
_BATCH_SIZE = 100


def measure_activations(fused, images):
    """{fused convolution: statistics of its pre-activations on images [count, height, width, channels]}.

    Variances are over images and positions, one per channel. The int8 step is the step of the activation after ReLU,
    with one scale for the layer as integer runtimes have it; channels whose standard deviation is below it are lost.
    """
    layers = [fused.get_layer(name) for name in fused.pre_activation_statistics]
    compute_inputs = keras.Model(fused.inputs, [layer.input for layer in layers])
    sums = [np.zeros((2, layer.filters)) for layer in layers]
    largest, counts = np.zeros(len(layers)), np.zeros(len(layers))
    for start in range(0, len(images), _BATCH_SIZE):
        for index, inputs in enumerate(compute_inputs(images[start : start + _BATCH_SIZE])):
            layer = layers[index]
            outputs = tf.nn.bias_add(layer.convolution_op(inputs, layer.kernel), layer.bias).numpy()
            outputs = outputs.reshape(-1, layer.filters).astype(np.float64)
            sums[index] += outputs.sum(axis=0), np.square(outputs).sum(axis=0)
            largest[index] = max(largest[index], outputs.max())
            counts[index] += len(outputs)
    statistics = {}
    for layer, (total, squares), top, count in zip(layers, sums, largest, counts, strict=True):
        variance = np.maximum(squares / count - np.square(total / count), 0)
        step = top / 255
        statistics[layer.name] = {
            "variance_mean": float(np.mean(variance)),
            "variance_largest": float(np.max(variance)),
            "int8_step": float(step),
            "channels_below_one_step_share": float(np.mean(np.sqrt(variance) < step)),
        }
    return statistics


def measure_normalizations(model):
    """{block: smallest running variance of its normalizations, share of those below epsilon, largest gamma/sigma}."""
    statistics = {}
    for block in model.layers:
        if isinstance(block, ReparameterizedBlock):
            norms = graph.find_layers(block, keras.layers.BatchNormalization)
            variances = np.concatenate([norm.moving_variance.numpy() for norm in norms])
            epsilon = norms[0].epsilon
            statistics[block.name] = {
                "smallest_running_variance": float(np.min(variances)),
                "running_variances_below_epsilon_share": float(np.mean(variances < epsilon)),
                "gamma_over_sigma_largest": max(float(np.max(np.abs(scale_and_shift(norm)[0]))) for norm in norms),
            }
    return statistics


def evaluate_rounded_weights(fused, data, per_channel):
    """Top-1 in percent on the test split with int8 weights by min-max and float activations."""
    rounded = keras.models.clone_model(fused)
    rounded.set_weights(fused.get_weights())
    for layer in rounded.layers:
        if layer.weights:
            layer.kernel.assign(quantize_min_max(layer.kernel.numpy(), 8, per_channel).dequantize())
    rounded.compile(metrics=[keras.metrics.SparseCategoricalAccuracy(name="top1")])
    return round(100 * rounded.evaluate(data.evaluation("test"), verbose=0, return_dict=True)["top1"], 3)


def measure(config):
    """Trains, exports and measures one model; returns its part of the record."""
    workdir = f"{FLAGS.runs}/{config}"
    schedule = {name: FLAGS[name].value for name in SCHEDULE}
    training = train(config, workdir, validation=True, data_dir=FLAGS.data_dir, **schedule)
    exported = export(
        workdir, ptq="min_max", weight_bits="8", granularity=",".join(GRANULARITIES), data_dir=FLAGS.data_dir
    )
    metadata = runs.read_input(ROOT / workdir)
    data = ClassificationData(metadata["dataset"], FLAGS.data_dir, Preprocessing.from_metadata(metadata), hold_out=True)
    model = runs.load_model(ROOT / workdir)
    fused = fusion.fuse(model)
    images = np.concatenate([batch for batch, _ in data.evaluation("validation").as_numpy_iterator()])[: FLAGS.images]
    activations, normalizations = measure_activations(fused, images), measure_normalizations(model)
    outlier_ratios = {layer["name"]: layer["outlier_ratio"] for layer in exported["outliers"]}
    return {
        "config": f"configs/{config}.flags",
        "training": training,
        "float_top1_percent": exported["float_fused_top1_percent"],
        "int8_top1_percent": {file["granularity"]: file["top1_percent"] for file in exported["files"]},
        "int8_weights_float_activations_top1_percent": {
            kind: evaluate_rounded_weights(fused, data, kind == "per_channel") for kind in GRANULARITIES
        },
        "test_images": exported["images"],
        "layers": {
            name: {**activations[name], **normalizations[name], "outlier_ratio": outlier_ratios[name]}
            for name in activations
        },
    }


def main(_):
    record = {
        **{name: FLAGS[name].value for name in SCHEDULE},
        "activation_images": FLAGS.images,
        "machine": provenance.machine(),
        "models": {name: measure(config) for name, config in MODELS.items()},
    }
    page = render(record)
    write_results(ROOT / FLAGS.results, "int8_collapse", record, page)
    print(page)


if __name__ == "__main__":
    app.run(main)
