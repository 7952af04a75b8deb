"""Where methods clip the weights of one kernel at 4 bits, and what that costs: python docs/figures/clipping.py"""

import matplotlib.pyplot as plt
import numpy as np
from style import BLUE, ROOT, save

from tf_repvgg import fusion, runs
from tf_repvgg.quantization import ptq
from tf_repvgg.quantization.uniform import round_to_grid

# Where the label of each method goes, in points from its dot.
LABELS = {"min_max": (4, 6), "percentile": (4, 6), "octav": (8, 2), "mse": (-28, 4)}
BLOCK = "stage2_block2"
BITS = 4


def main():
    fused = fusion.fuse(runs.load_model(ROOT / "results" / "checkpoints" / "cifar10_bn"))
    kernel = fused.get_layer(BLOCK).kernel.numpy()
    std, largest_code = kernel.std(), 2 ** (BITS - 1) - 1

    def error(clip):
        rounded = round_to_grid(kernel, np.float32([clip]), BITS).dequantize()
        return 10 * np.log10(np.mean(kernel**2) / np.mean((kernel - rounded) ** 2))

    clips = np.linspace(1, np.max(np.abs(kernel)) / std * 1.02, 200)
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axis.plot(clips, [error(clip * std) for clip in clips], color=BLUE)
    # Ranges of activations need images; those of weights, which are shown, do not depend on them.
    images = np.random.default_rng(0).uniform(-1, 1, [8, 32, 32, 3]).astype("float32")
    for method, offset in LABELS.items():
        quantized = ptq.quantize(fused, method, weight_bits=BITS, calibration=images)
        clip = float(quantized.get_layer(BLOCK).scale.numpy().item()) * largest_code
        axis.plot(clip / std, error(clip), "o", color=BLUE)
        axis.annotate(method, (clip / std, error(clip)), offset, textcoords="offset points")
    axis.set(
        xlabel="largest weight that the grid represents, in standard deviations of the kernel",
        ylabel="signal to quantization noise, dB",
        ylim=(0, 18),
        title=f"Weights of one plain-BN kernel in {BITS} bits, one scale per tensor",
    )
    save(figure, "clipping.svg")


if __name__ == "__main__":
    main()
