"""Cross-layer equalization (Nagel 2019, arXiv:1906.04721, section 4.1): matching ranges, same function."""

from collections.abc import Collection, Mapping

import numpy as np
import tensorflow as tf

from tf_repvgg import graph
from tf_repvgg.quantization.ptq.calibration import Calibration
from tf_repvgg.quantization.ptq.channel_groups import FIXED, ChannelGroups, find_channel_groups, scale_channels
from tf_repvgg.quantization.ptq.network import Network, spread_over_kernel

_SWEEPS = 200
_CONVERGED = 1e-3
# Training can shrink all weights of a channel to nothing, and leave its bias. Equalizing such a channel would scale its
# bias without bound. As a share of the layer's largest weight: smaller weights vanish beside it in float32.
_NEGLIGIBLE = np.finfo(np.float32).eps
# A channel with a small range in one place and large ones in others, such as one that hardly ever is above zero, must
# not become the largest where it meets the others: below this, log r counts no further.
_SMALLEST_DEVIATION = -np.log(8.0)
# Images on which the function is compared before and after, and the change that rounding of float32 explains.
_PROBES, _TOLERANCE = 8, 1e-3


def equalize(network: Network, look_at_images: bool = True) -> None:
    """Divides the channels of each group by one factor, so that the ranges which they meet on their way match.

    Layers write channels and read them; a depthwise convolution does both at once, and where tensors are added, all of
    them share their factors (see `find_channel_groups`). With r the largest magnitude of a channel's weights in a
    layer, divided by the geometric mean over its channels where some of them are fixed, the factors minimize the sum of
    (log r)^2 over all layers that write or read channels. Between two layers that is equation 11, s = sqrt(r1 / r2);
    with a depthwise layer in between, the first factor is r1 / cbrt(r1 r2 r3), the second cbrt(r1 r2 r3) / r3.

    With calibration images and weight scales per channel, ranges of activations are matched as well, which is our
    addition: the sum then includes their (log r)^2, and every term counts by the noise of its grid, 4^-bits. So
    activations of 8 bits count as much as weights of 8 bits, and hardly at all beside weights of 4 bits.

    Ranges below an eighth of the mean count as an eighth, so that a channel which is small in one place alone does not
    become the largest in the others.

    ReLU6 keeps its limit: a channel that reaches it on the calibration images has a factor of 1, and others get none
    that would take them there; without images no factor passes ReLU6. Channels whose weights are all zero or negligible
    stay as they are. The notes name the layers with a next layer none of whose channels can be scaled.

    Args:
      network: Network whose float form is changed.
      look_at_images: Whether to use calibration images, if there are any.
    """
    images = network.calibration if look_at_images else Calibration(None)
    groups, smallest = _respect_limits(network, find_channel_groups(network), images)
    # With one scale per tensor, weights lose more to activations' ranges than activations gain.
    activations = _measure_activations(network, groups, images) if all(network.per_channel.values()) else {}
    weights = {name: layer.get_weights() for name, layer in network.layers.items()}
    divisors, before = dict(network.divisors), _compute_probes(network)
    scale_channels(network, groups, np.exp(_balance(network, groups, smallest, activations)))
    if not measure_change(before, _compute_probes(network)) <= _TOLERANCE:
        network.notes.append("equalization was undone: it changed the outputs of the float network")
        network.divisors.update(divisors)
        for name, layer in network.layers.items():
            layer.set_weights(weights[name])
        return
    untouched = [name for name in _find_layers_with_next(network) if np.all(groups.outputs[name] == FIXED)]
    if untouched:
        network.notes.append(f"layers not equalized with the next one: {', '.join(untouched)}")


def measure_change(before: Collection[np.ndarray], after: Collection[np.ndarray]) -> float:
    """Largest change of any output, relative to that output's largest magnitude; 0 if there are no outputs."""
    pairs = zip(before, after, strict=True)
    return max((float(np.max(np.abs(old - new)) / max(np.max(np.abs(old)), 1e-30)) for old, new in pairs), default=0.0)


def _compute_probes(network):
    """Outputs of the float network on a few calibration images; none if there are no images."""
    if network.calibration.is_empty:
        return []
    count = network.float.inputs[0].shape[0] or _PROBES
    images = [tf.constant(values[:count]) for values in network.calibration.inputs]
    return [output.numpy() for output in tf.nest.flatten(network.float(graph.pack_inputs(network.float, images)))]


def _respect_limits(network, groups, images):
    """The groups, with channels fixed where ReLU6 clips, and the logarithm of the smallest factor of each group."""
    smallest = np.full(groups.number_of_groups, -np.inf)
    if not groups.clips:
        return groups, smallest
    shares = np.zeros(groups.number_of_groups)
    clipped = []
    for clip, largest in zip(groups.clips, _measure_largest(network, groups.clips, images), strict=True):
        np.maximum.at(shares, clip.groups, largest / clip.limit)
        if count := np.count_nonzero((largest >= clip.limit) & (clip.groups != FIXED)):
            clipped.append(f"{clip.layer} {count} of {len(largest)}")
    if clipped:
        network.notes.append(f"channels not equalized, since they reach the limit of ReLU6: {', '.join(clipped)}")
    with np.errstate(divide="ignore"):
        smallest = np.log(shares)
    return groups.fix(np.flatnonzero(shares >= 1)), smallest


def _measure_largest(network, clips, images):
    """The largest output of each channel of the layers with a limit; the limit itself if there are no images."""
    if images.is_empty:
        return [np.full(len(clip.groups), clip.limit) for clip in clips]
    largest = [np.zeros(len(clip.groups)) for clip in clips]
    for batch in images.compute_batches(network.float, [clip.tensor for clip in clips]):
        for extremes, values in zip(largest, batch, strict=True):
            np.maximum(extremes, values.max(axis=tuple(range(values.ndim - 1))), out=extremes)
    return largest


def _measure_activations(network, groups, images):
    """{name of a quantizer: largest magnitude of each channel that it rounds}; empty if there are no images."""
    names = [name for name, channels in groups.activations.items() if np.any(channels != FIXED)]
    ranges = {name: np.zeros(len(groups.activations[name])) for name in names}
    if images.is_empty or not names:
        return {}
    for batch in images.compute_layers(network.float, names):
        for name, values in batch.items():
            np.maximum(ranges[name], np.max(np.abs(values), axis=tuple(range(values.ndim - 1))), out=ranges[name])
    return ranges


def _balance(
    network: Network, groups: ChannelGroups, smallest: np.ndarray, activations: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The logarithm of the factor of each group, [groups]."""
    magnitudes = {name: _measure_magnitudes(network.kernel(name)) for name in network.layers}
    factors = np.zeros(groups.number_of_groups)
    for _ in range(_SWEEPS):
        written, read, rounded = (_Deviations(groups.number_of_groups) for _ in range(3))
        for name, magnitude in magnitudes.items():
            inputs, outputs, share = groups.inputs[name], groups.outputs[name], 4.0 ** -network.bits[name]
            scaled = magnitude * np.exp(spread_over_kernel(factors[inputs], magnitude.shape) - factors[outputs])
            written.add(outputs, scaled.max(axis=0), share)
            read.add(inputs, _reduce_to_inputs(scaled, len(inputs)), share)
        for name, ranges in activations.items():
            channels = groups.activations[name]
            rounded.add(channels, ranges / np.exp(factors[channels]), 4.0**-network.options.activation_bits)
        is_free = (written.shares > 0) & (read.shares > 0) & (np.arange(groups.number_of_groups) != FIXED)
        shares = written.shares + read.shares + rounded.shares
        steps = (written.sums - read.sums + rounded.sums) / np.where(is_free, shares, 1)
        updated = np.where(is_free, np.maximum(factors + steps, smallest), 0)
        change, factors = float(np.max(np.abs(updated - factors))), updated
        if change < _CONVERGED:
            break
    return factors


class _Deviations:
    """Weighted sums of log r for each group, and the sums of the weights.

    Args:
      count: Number of groups.
    """

    def __init__(self, count: int) -> None:
        self.sums, self.shares = np.zeros(count), np.zeros(count)

    def add(self, channels: np.ndarray, ranges: np.ndarray, share: float) -> None:
        """Adds the ranges of a tensor, or of one side of a kernel.

        Args:
          channels: Group of each channel, [channels].
          ranges: Range of each channel, [channels]. Negligible ones do not count.
          share: Weight in the sums.
        """
        is_alive = ranges > _NEGLIGIBLE * np.max(ranges)
        if not np.any(is_alive):
            return
        channels, logarithms = channels[is_alive], np.log(ranges[is_alive])
        largest = np.full(len(self.sums), -np.inf)
        np.maximum.at(largest, channels, logarithms)
        is_present = np.isfinite(largest)
        is_present[FIXED] = False
        # Fixed channels are not of one group in truth. Where there are none, the mean cancels out; and channels that
        # are negligible on one side, and so stay as they are, would suffer from it: equation 11 has none.
        is_fixed = channels == FIXED
        mean = np.mean(np.append(largest[is_present], logarithms[is_fixed]))
        values = np.maximum(largest[is_present], mean + _SMALLEST_DEVIATION)
        self.sums[is_present] += share * (values - mean if np.any(is_fixed) else values)
        self.shares[is_present] += share


def _measure_magnitudes(kernel):
    """The largest magnitude at any position of the kernel, [channels read, output channels]."""
    return np.max(np.abs(kernel), axis=tuple(range(kernel.ndim - 2))).astype(np.float64)


def _reduce_to_inputs(magnitudes, count):
    """The largest magnitude of each input channel: that of the outputs of its group of a grouped convolution."""
    reads = len(magnitudes)
    return magnitudes.reshape(reads, count // reads, -1).max(axis=2).T.ravel()


def _find_layers_with_next(network):
    """Names of the layers whose outputs reach another layer with weights."""
    nodes = graph.nodes(network.float)
    reached: set[str] = set()
    for node in reversed(nodes):
        if node.layer.name in network.layers or not reached.isdisjoint(node.flat_output_ids):
            reached.update(node.flat_input_ids)
    before = {node.layer.name for node in nodes if not reached.isdisjoint(node.flat_output_ids)}
    return [name for name in network.layers if name in before]
