"""DFQ without data (Nagel 2019, arXiv:1906.04721): ranges, absorption and bias correction from what fusion keeps."""

import numpy as np

from tf_repvgg.quantization.ptq.methods.dfq import absorb_high_biases
from tf_repvgg.quantization.ptq.methods.equalize import equalize
from tf_repvgg.quantization.ptq.network import Network, by_input_channel
from tf_repvgg.quantization.ptq.statistics import predict
from tf_repvgg.quantization.uniform import quantize_min_max


def dfq_data_free(network: Network) -> None:
    """Sets all ranges, kernels and biases from the normalizations' statistics, without an image.

    Ranges reach from the lowest mean minus 6 standard deviations to the highest mean plus 6. A kernel's error e moves
    the mean output by e E[x], where E[x] is the mean of a clipped normal distribution; biases take that out (section
    4.2.1). Zero padding is left out of account there, and nothing is absorbed where the next layer pads: without data
    nobody could tell what that costs.

    Means are exact. Variances are exact after one normalization, as in QARepVGG; where branches add up, they are
    those of uncorrelated branches, which branches that read one input are not; of a layer without normalization,
    such as the last, they are upper bounds. With calibration images, which change nothing else, the notes hold how far
    that is from what they show; on the CIFAR-10 model with OABN, standard deviations are off by 10 % in the median
    channel and by 45 % in the 95th of 100.

    Raises:
      ValueError: if the network holds no statistics (see `tf_repvgg.fusion.fuse`), or a layer of a kind that
        `statistics.predict` does not know.
    """
    check_statistics(network.statistics)
    equalize(network)
    prediction = predict(network)
    _note_approximation(network, prediction)
    absorbed = absorb_high_biases(network, lambda name: prediction.linear[name][:2], into_padding=False)
    prediction = predict(network, absorbed)
    for name in network.free_ranges:
        its = prediction.activations[name]
        network.quantizers[name].set_range(float(its.low.min()), float(its.high.max()))
    for name in network.layers:
        kernel = network.kernel(name)
        quantized = quantize_min_max(kernel, network.bits[name], network.per_channel, network.min_scale(name))
        shift = 0.0
        if not network.is_shared(name):
            expected = by_input_channel(prediction.inputs[name].mean, kernel.shape)
            shift = np.sum((quantized.dequantize() - kernel) * expected, axis=tuple(range(kernel.ndim - 1)))
        network.set_kernel(name, quantized, network.bias(name) - shift)


def check_statistics(statistics) -> None:
    """Raises ValueError if no layer has any; see `Network.statistics`."""
    if all(kept is None for kept in statistics.values()):
        raise ValueError(
            "dfq_data_free needs the statistics of normalizations, and this model holds none: give it what "
            "tf_repvgg.fusion.fuse returns, as it is (Keras does not save them), or use dfq with calibration images"
        )


def _note_approximation(network, prediction):
    guessed = [name for name in network.layers if network.statistics.get(name) is None]
    if guessed:
        network.notes.append(f"no statistics, so followed from the inputs: {', '.join(guessed)}")
    if network.images is None:
        return
    deviations, means = [], []
    for name in network.layers:
        if name in guessed:
            continue
        found = network.linear_outputs_of(name)
        axes = tuple(range(found.ndim - 1))
        spread = np.maximum(found.std(axes), 1e-12)
        deviations.append(np.abs(prediction.linear[name].deviation / spread - 1))
        means.append(np.abs(prediction.linear[name].mean - found.mean(axes)) / spread)
    deviations, means = np.concatenate(deviations), np.concatenate(means)
    network.notes.append(
        f"standard deviations predicted without data differ from those on the calibration images by "
        f"{100 * np.median(deviations):.0f} % in the median channel and {100 * np.quantile(deviations, 0.95):.0f} % in "
        f"the 95th of 100; means by {np.median(means):.2f} and {np.quantile(means, 0.95):.2f} standard deviations"
    )
