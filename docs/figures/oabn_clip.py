"""OABN's clip, and how a stored gamma trains in each clip mode: python docs/figures/oabn_clip.py"""

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
import tf_keras as keras
from style import BLUE, GREEN, GREY, RED, save

from tf_repvgg.layers import CLIP_MODES, OutlierAwareBatchNormalization

K = 0.1
VARIANCE = 25.0  # so that the limit k * sqrt(variance) is about 0.5
COLOURS = dict(zip(CLIP_MODES, (BLUE, RED, GREEN), strict=True))


def build_norm(channels, clip_mode="project"):
    norm = OutlierAwareBatchNormalization(k=K, clip_mode=clip_mode)
    norm.build([None, channels])
    norm.moving_variance.assign(np.full(channels, VARIANCE))
    return norm


def draw_clip(axis):
    gamma = np.linspace(-1.2, 1.2, 241)
    norm = build_norm(len(gamma))
    norm.gamma.assign(gamma)
    limit = float(norm.gamma_limit()[0])
    axis.plot(gamma, gamma, color=GREY, linestyle=":", label="batch normalization")
    axis.plot(gamma, norm.effective_gamma(), color=BLUE, label="OABN")
    for sign in (-1, 1):
        axis.axhline(sign * limit, color=GREY, linewidth=0.8)
    axis.annotate(r"$+k\,\sqrt{\sigma^2+\epsilon}$", (-1.2, limit), va="bottom")
    axis.annotate(r"$-k\,\sqrt{\sigma^2+\epsilon}$", (0.35, -limit), va="top")
    axis.set(xlabel="stored gamma", ylabel="gamma in force", title="Forward: the scale is clipped")
    axis.legend(loc="upper left", frameon=False, bbox_to_anchor=(0, 0.93))


def draw_training(axis, steps=60):
    """A loss that pulls gamma beyond the limit, and from half of the steps on back to a third of it."""
    for clip_mode in CLIP_MODES:
        norm = build_norm(1, clip_mode)
        norm.gamma.assign([0.3])
        optimizer = keras.optimizers.SGD(0.1)
        limit = float(norm.gamma_limit()[0])
        stored = []
        for step in range(steps):
            target = 0.8 if step < steps // 2 else limit / 3
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum((norm.effective_gamma() - target) ** 2) / 2
            variable = norm.trainable_variables[0]
            optimizer.apply_gradients([(tape.gradient(loss, variable), variable)])
            stored.append(float(variable[0]))
        style = {"linestyle": "--", "zorder": 3} if clip_mode == "return_only" else {"linewidth": 2.5}
        axis.plot(stored, color=COLOURS[clip_mode], label=clip_mode, **style)
    axis.axhline(limit, color=GREY, linewidth=0.8)
    axis.annotate("limit", (steps, limit), va="bottom", ha="right")
    axis.axvline(steps // 2, color=GREY, linestyle=":", linewidth=0.8)
    axis.annotate("the loss pulls\nbeyond the limit", (steps * 0.02, 0.04))
    axis.annotate("the loss pulls\nback inside", (steps * 0.53, 0.04))
    axis.set(xlabel="training step", ylabel="stored gamma", ylim=(0, None), title="Training: three clip modes")
    axis.legend(loc="upper right", frameon=False)


def main():
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    draw_clip(axes[0])
    draw_training(axes[1])
    save(figure, "oabn_clip.svg")


if __name__ == "__main__":
    main()
