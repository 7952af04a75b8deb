"""Which pixels a strided 3x3 and 1x1 convolution read, measured: python docs/figures/padding_trap.py"""

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
import tf_keras as keras
from style import BLUE, GREEN, RED, save

from tf_repvgg.layers import RepVGGBlock

CASES = {  # title: (padding, pixels in a row)
    'padding="same", even input': ("same", 6),
    'padding="same", odd input': ("same", 7),
    'padding="symmetric" (PyTorch)': ("symmetric", 6),
}


def find_pixels(layer, size):
    """{output column: the input columns that it depends on}, of a layer on a row of pixels."""
    images = tf.Variable(tf.random.normal([1, size, size, 1]))
    with tf.GradientTape(persistent=True) as tape:
        outputs = layer(images, training=False)[0, 1, :, 0]
    jacobian = tf.reduce_sum(tf.abs(tape.jacobian(outputs, images, experimental_use_pfor=False)), axis=(1, 2, 4))
    return {column: np.flatnonzero(row) for column, row in enumerate(jacobian.numpy())}


def build_block(padding, size, silent):
    """A block of stride 2 with only one of its two convolutions: the other one has no weights."""
    block = RepVGGBlock(1, strides=2, padding=padding, activation="linear", kernel_initializer="ones")
    block(tf.zeros([1, size, size, 1]))
    getattr(block, silent).kernel.assign(tf.zeros_like(getattr(block, silent).kernel))
    return block


def draw_case(axis, title, padding, size):
    windows = find_pixels(build_block(padding, size, silent="conv1x1"), size)
    centres = find_pixels(build_block(padding, size, silent="conv3x3"), size)
    plain = find_pixels(keras.layers.Conv2D(1, 1, strides=2, kernel_initializer="ones"), size)
    for pixel in range(size):
        axis.add_patch(plt.Rectangle((pixel - 0.5, -0.5), 1, 1, facecolor="#f2f2f2", edgecolor="#999999"))
        axis.annotate(str(pixel), (pixel, 0), ha="center", va="center")
    for output, window in windows.items():
        height = 1.0 + 0.32 * (output % 2)
        axis.plot([window[0] - 0.4, window[-1] + 0.4], [height] * 2, color=BLUE, linewidth=4, solid_capstyle="butt")
        axis.annotate(f"out {output}", (centres[output][0], height + 0.05), ha="center", va="bottom", fontsize=8)
        axis.plot(centres[output], [0.68], "v", color=GREEN, markersize=9)
        axis.plot(plain[output], [-0.72], "^", color=RED, markersize=9)
    axis.set(xlim=(-0.8, 6.8), ylim=(-1.05, 1.75), aspect="equal")
    axis.axis("off")
    is_wrong = any(list(plain[output]) != list(centres[output]) for output in windows)
    axis.set_title(f"{title}\na plain 1x1 reads {'another pixel' if is_wrong else 'the same pixel'}")


def main():
    figure, axes = plt.subplots(1, len(CASES), figsize=(12, 2.6), layout="constrained")
    for axis, (title, (padding, size)) in zip(axes, CASES.items(), strict=True):
        draw_case(axis, title, padding, size)
    handles = [
        plt.Line2D([], [], color=BLUE, linewidth=4, label="pixels of the 3x3 window"),
        plt.Line2D([], [], color=GREEN, marker="v", linestyle="", label="pixel of this library's 1x1 branch"),
        plt.Line2D([], [], color=RED, marker="^", linestyle="", label="pixel of a plain 1x1 convolution with stride 2"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    save(figure, "padding_trap.svg")


if __name__ == "__main__":
    main()
