"""Does RepVGG-A0 collapse in 8 bits? An attempt at CIFAR resolution: python experiments/int8_collapse.py --data_dir=...

The literature reports that RepVGG-A0 on ImageNet falls from 72 to 52 % in INT8. This trains A0's 22 layers on CIFAR-10
by the published recipe, with BN, with OABN, and as QARepVGG, quantizes to 8 bits per tensor and per channel, and
measures what would explain a fall or its absence: the variance of each layer's activations, the share of tiny running
variances, the outliers of the merged weights, and what rounding of weights alone costs. Resumable; leaves
results/int8_collapse.json and results/int8_collapse.md.
"""

import numpy as np
import tensorflow as tf
import tf_keras as keras
from absl import app, flags
from harness.commands import ROOT, export, train
from harness.tables import write_results
from tabulate import tabulate

from tf_repvgg import fusion, graph, provenance, runs
from tf_repvgg.data import ClassificationData, Preprocessing
from tf_repvgg.layers import ReparameterizedBlock
from tf_repvgg.layers.batch_norm import scale_and_shift
from tf_repvgg.quantization.uniform import GRANULARITIES, quantize_min_max

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "TFDS data directory with cifar10; by default TFDS's own.")
flags.DEFINE_string("runs", "runs/int8_collapse", "Folder of the training runs.")
flags.DEFINE_string("results", "results", "Folder of the results.")
flags.DEFINE_integer("epochs", None, "By default those of the configs.", lower_bound=1)
flags.DEFINE_integer("steps_per_epoch", None, "By default those of one pass; fewer to try this out.", lower_bound=1)
flags.DEFINE_integer("images", 1000, "Held-out images that activations are measured on.", lower_bound=1)

MODELS = {"BN": "cifar10_a0_bn", "OABN": "cifar10_a0_oabn", "QARepVGG": "cifar10_a0_qarepvgg"}
# Flags that shorten the training of the configs.
SCHEDULE = ("epochs", "steps_per_epoch")
_MEASURED_AT_ONCE = 100


def activation_statistics(fused, images):
    """{fused convolution: its pre-activations' statistics on images [count, height, width, channels]}.

    Variances are over images and positions, one per channel. The int8 step is that of the activation after ReLU, with
    one scale for the layer as integer runtimes have it; channels whose standard deviation is below it are lost.
    """
    layers = [fused.get_layer(name) for name in fused.pre_activation_statistics]
    inputs_of = keras.Model(fused.inputs, [layer.input for layer in layers])
    sums = [np.zeros((2, layer.filters)) for layer in layers]
    largest, counts = np.zeros(len(layers)), np.zeros(len(layers))
    for start in range(0, len(images), _MEASURED_AT_ONCE):
        for index, inputs in enumerate(inputs_of(images[start : start + _MEASURED_AT_ONCE])):
            layer = layers[index]
            outputs = tf.nn.bias_add(layer.convolution_op(inputs, layer.kernel), layer.bias).numpy()
            outputs = outputs.reshape(-1, layer.filters).astype(np.float64)
            sums[index] += outputs.sum(axis=0), np.square(outputs).sum(axis=0)
            largest[index] = max(largest[index], outputs.max())
            counts[index] += len(outputs)
    found = {}
    for layer, (total, squares), top, count in zip(layers, sums, largest, counts, strict=True):
        variance = np.maximum(squares / count - np.square(total / count), 0)
        step = top / 255
        found[layer.name] = {
            "variance_mean": float(np.mean(variance)),
            "variance_largest": float(np.max(variance)),
            "int8_step": float(step),
            "channels_below_one_step_share": float(np.mean(np.sqrt(variance) < step)),
        }
    return found


def running_variances(model):
    """{block: smallest running variance of its normalizations, share of those below epsilon, largest gamma/sigma}."""
    found = {}
    for block in model.layers:
        if isinstance(block, ReparameterizedBlock):
            norms = graph.find_layers(block, keras.layers.BatchNormalization)
            variances = np.concatenate([norm.moving_variance.numpy() for norm in norms])
            epsilon = norms[0].epsilon
            found[block.name] = {
                "smallest_running_variance": float(np.min(variances)),
                "running_variances_below_epsilon_share": float(np.mean(variances < epsilon)),
                "gamma_over_sigma_largest": max(float(np.max(np.abs(scale_and_shift(norm)[0]))) for norm in norms),
            }
    return found


def top1_with_rounded_weights(fused, data, per_channel):
    """Top-1 in percent on the test split with int8 weights by min-max and float activations."""
    rounded = keras.models.clone_model(fused)
    rounded.set_weights(fused.get_weights())
    for layer in rounded.layers:
        if layer.weights:
            layer.kernel.assign(quantize_min_max(layer.kernel.numpy(), 8, per_channel).dequantize())
    rounded.compile(metrics=[keras.metrics.SparseCategoricalAccuracy(name="top1")])
    return round(100 * rounded.evaluate(data.evaluation("test"), verbose=0, return_dict=True)["top1"], 3)


def measure(config):
    workdir = f"{FLAGS.runs}/{config}"
    schedule = {name: FLAGS[name].value for name in SCHEDULE}
    trained = train(config, workdir, validation=True, data_dir=FLAGS.data_dir, **schedule)
    exported = export(workdir, weight_bits="8", granularity="per_tensor,per_channel", data_dir=FLAGS.data_dir)
    facts = runs.read_input(ROOT / workdir)
    data = ClassificationData(facts["dataset"], FLAGS.data_dir, Preprocessing.from_facts(facts), hold_out=True)
    model = runs.load_model(ROOT / workdir)
    fused = fusion.fuse(model)
    images = np.concatenate([batch for batch, _ in data.evaluation("validation").as_numpy_iterator()])[: FLAGS.images]
    activations, variances = activation_statistics(fused, images), running_variances(model)
    outlier_ratios = {entry["name"]: entry["outlier_ratio"] for entry in exported["outliers"]}
    return {
        "config": f"configs/{config}.flags",
        "training": trained,
        "float_top1_percent": exported["float_fused_top1_percent"],
        "int8_top1_percent": {entry["granularity"]: entry["top1_percent"] for entry in exported["files"]},
        "int8_weights_float_activations_top1_percent": {
            kind: top1_with_rounded_weights(fused, data, kind == "per_channel") for kind in GRANULARITIES
        },
        "test_images": exported["images"],
        "layers": {
            name: {**activations[name], **variances[name], "outlier_ratio": outlier_ratios[name]}
            for name in activations
        },
    }


def accuracy_table(found):
    def cells(name, record):
        full, weights = record["int8_top1_percent"], record["int8_weights_float_activations_top1_percent"]
        falls = [f"{values[kind] - record['float_top1_percent']:+.2f}" for values in (full, weights) for kind in full]
        integer = [f"{full[kind]:.2f}" for kind in GRANULARITIES]
        return [name, f"{record['float_top1_percent']:.2f}", *integer, *falls]

    headers = [
        "model",
        "FP32",
        *(f"int8 {kind}" for kind in GRANULARITIES.values()),
        *(f"change, {kind}" for kind in GRANULARITIES.values()),
        *(f"weights alone, {kind}" for kind in GRANULARITIES.values()),
    ]
    rows = [cells(name, record) for name, record in found.items()]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def layer_table(found, key, form):
    """One row per layer, one column per model."""
    rows = [
        [layer, *(form.format(record["layers"][layer][key]) for record in found.values())]
        for layer in next(iter(found.values()))["layers"]
    ]
    return tabulate(rows, ["layer", *found], tablefmt="github", disable_numparse=True)


def summary_table(found):
    def cells(name, record):
        layers = record["layers"]
        worst = max(layers, key=lambda layer: layers[layer]["variance_largest"])
        columns = {key: [entry[key] for entry in layers.values()] for key in layers[worst]}
        return [
            name,
            f"{layers[worst]['variance_largest']:.3g} ({worst})",
            f"{100 * np.mean(columns['channels_below_one_step_share']):.1f} %",
            f"{100 * np.mean(columns['running_variances_below_epsilon_share']):.1f} %",
            f"{min(columns['smallest_running_variance']):.2g}",
            f"{max(columns['gamma_over_sigma_largest']):.3g}",
            f"{max(columns['outlier_ratio']):.0f}",
        ]

    headers = [
        "model",
        "largest variance",
        "channels below one step",
        "running variances below epsilon",
        "smallest",
        "gamma/sigma",
        "weight outlier",
    ]
    rows = [cells(name, record) for name, record in found.items()]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def page(found):
    test_images = found["BN"]["test_images"]
    changed = (f"--{name}={FLAGS[name].value}" for name in SCHEDULE if FLAGS[name].value)
    command = " ".join(["python experiments/int8_collapse.py", *changed])
    return f"""# 8 bits and RepVGG-A0 at CIFAR resolution

`{command}`: A0's 22 layers on 45,000 images of CIFAR-10 by the
published recipe (configs/cifar10_a0_*.flags: weight decay on, BN epsilon 1e-5), one seed; top-1 in percent on
{test_images:,} test images, in LiteRT; weights by min-max, int8 activations. "Change" is against FP32, in points;
"weights alone" is the change with int8 weights and float activations, so that what is missing from "change" is due to
activations. The literature reports 72 to 52 for A0 on ImageNet. Images: JPEG re-encodings (quality 75) of CIFAR-10
where --data_dir points at the project's shared copy.

{accuracy_table(found)}

What bears on it. Over the layers: the largest variance of a channel before the activation, on {FLAGS.images:,} held-out
images; the mean share of channels whose standard deviation is below one int8 step of their layer; of the running
variances that stand in the batch normalizations the mean share below epsilon (1e-5) and the smallest; the largest
|gamma| / sqrt(variance + epsilon) in force; the largest merged weight over its layer's standard deviation.

{summary_table(found)}

Variance of the fused network's pre-activations, mean over channels:

{layer_table(found, "variance_mean", "{:.3g}")}

Share of running variances below epsilon:

{layer_table(found, "running_variances_below_epsilon_share", "{:.3f}")}
"""


def main(_):
    found = {name: measure(config) for name, config in MODELS.items()}
    text = page(found)
    record = {name: FLAGS[name].value for name in SCHEDULE} | {"machine": provenance.machine(), "models": found}
    write_results(ROOT / FLAGS.results, "int8_collapse", record, text)
    print(text)


if __name__ == "__main__":
    app.run(main)
