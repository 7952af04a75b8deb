"""Uniform grid and codebook on one kernel, and centroids in training: python docs/figures/codebook.py"""

import matplotlib.pyplot as plt
import numpy as np
import tf_keras as keras
from style import BLUE, GREEN, GREY, RED, ROOT, save

from tf_repvgg import fusion, quantization, runs
from tf_repvgg.data import ClassificationData
from tf_repvgg.models import build_repvgg
from tf_repvgg.quantization.qat.clustering import ClusterQuantize

CLUSTERS = 8
BLOCK = "stage2_block2"
TRACED_LAYER = "stage1_block2"


def find_clusters(model, layer):
    """(latent weights, grid centroids, indices) of one clustered layer, flat."""
    (wrapper,) = (w for w in model.layers if isinstance(w, ClusterQuantize) and w.layer.name == layer)
    weights, centroids, indices = wrapper.clusters()["kernel"]
    return np.ravel(weights), np.ravel(centroids), np.ravel(indices)


def draw_levels(axis):
    """Where 7 levels of a uniform 3-bit grid lie on a kernel, and 8 centroids."""
    fused = fusion.fuse(runs.load_model(ROOT / "results" / "checkpoints" / "cifar10_bn"))
    clustered = quantization.cluster_quantize(fused, CLUSTERS, activation_bits=None)
    weights, centroids, _ = find_clusters(clustered, BLOCK)
    uniform = quantization.quantize_min_max(fused.get_layer(BLOCK).kernel.numpy(), bits=3, per_channel=False)
    levels = np.arange(-3, 4) * uniform.scale[0]
    axis.hist(weights, 160, color="#c5d5e6", log=True)
    axis.vlines(levels, 1, 5e4, color=RED, linestyle=":", label=f"uniform 3-bit grid, {len(levels)} levels")
    axis.vlines(centroids, 1, 5e4, color=BLUE, label=f"codebook, {len(centroids)} clusters")
    errors = [np.sqrt(np.mean(np.min(np.abs(weights[:, None] - grid), axis=1) ** 2)) for grid in (levels, centroids)]
    axis.set(
        xlabel="weight",
        ylabel="weights",
        ylim=(0.8, 1e6),
        title=f"A kernel with outliers: the codebook's\nerror is {errors[0] / errors[1]:.1f} times smaller",
    )
    axis.legend(frameon=False, loc="upper center", fontsize=9)


def draw_training(axis, epochs=8, batch_size=64):
    """Centroids and the spread of latent weights, in ClusterQAT of a small model that trains from noise."""
    keras.utils.set_random_seed(0)
    data = ClassificationData("digits", hold_out=False)
    fused = fusion.fuse(build_repvgg("digits", data.image_shape, data.num_classes, norm="oabn"))
    calibration = data.calibration(128).as_numpy_iterator()
    clustered = quantization.cluster_quantize(fused, CLUSTERS, calibration=calibration, centroid_update_steps=2)
    clustered.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    centroids, spreads = [], []

    class Trace(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            weights, grid, _ = find_clusters(clustered, TRACED_LAYER)
            centroids.append(grid)
            spreads.append(np.quantile(weights, [0.01, 0.99]))

    clustered.fit(data.training(batch_size, range(epochs)), verbose=0, callbacks=[Trace()])
    low, high = np.transpose(spreads)
    axis.fill_between(range(len(low)), low, high, color=GREY, alpha=0.25, label="98 % of the latent weights")
    for number, way in enumerate(np.transpose(centroids)):
        axis.plot(way, color=GREEN, linewidth=1.2, label=None if number else "centroids")
    axis.set(xlabel="training step", ylabel="weight", title="Centroids follow the weights\nwhile the network trains")
    axis.legend(frameon=False, loc="upper left", fontsize=9, ncols=2)
    axis.set_ylim(top=axis.get_ylim()[1] * 1.3)


def main():
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.9), layout="constrained")
    draw_levels(axes[0])
    draw_training(axes[1])
    save(figure, "codebook.png")


if __name__ == "__main__":
    main()
