"""Watching and freezing clusters while a model trains."""

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization import codebooks
from tf_repvgg.quantization.qat.clustering.wrapper import Clustered
from tf_repvgg.quantization.qat.wrapping import find_wrappers


class FreezeClusters(keras.callbacks.Callback):
    """Fixes assignments and centroids from a step of training on; see `ClusterQuantize.freeze`.

    Args:
      step: number of optimizer steps after which clusters rest.
      ranges: whether the ranges of activations rest too.
    """

    def __init__(self, step, ranges=True):
        super().__init__()
        self._step = step
        self._ranges = ranges
        self._is_done = False

    def on_train_batch_begin(self, batch, logs=None):
        if not self._is_done and int(self.model.optimizer.iterations.numpy()) >= self._step:
            for layer in graph.find_layers(self.model):
                if isinstance(layer, Clustered) or (self._ranges and hasattr(layer, "is_frozen")):
                    layer.freeze()
            self._is_done = True


class ClusterLog(keras.callbacks.Callback):
    """Writes to TensorBoard how clusters move, layer by layer.

    `inertia` is the sum of squared distances of latent weights to their centroids, `moves_per_step` how many weights
    have another centroid than at the last look, over the steps since, `empty_clusters` how many centroids no weight
    has, and `centroid_<i>` where a centroid is (per channel: their mean over channels).

    Args:
      log_dir: folder of the event files.
      every: optimizer steps from one look to the next.
    """

    def __init__(self, log_dir, every=100):
        super().__init__()
        self._log_dir = str(log_dir)
        self._every = every
        self._before = {}

    def set_model(self, model):
        super().set_model(model)
        find_wrappers(model, Clustered)
        self._writer = tf.summary.create_file_writer(self._log_dir)

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations.numpy())
        if step % self._every == 0:
            with self._writer.as_default(step=step):
                for wrapper in find_wrappers(self.model, Clustered):
                    self._look_at(wrapper, step)

    def on_train_end(self, logs=None):
        self._writer.flush()

    def _look_at(self, wrapper, step):
        for name, (weights, centroids, indices) in wrapper.clusters().items():
            place = f"clusters/{wrapper.layer.name}_{name}"
            inertia, counts = codebooks.inertia_and_counts(weights, centroids, indices)
            tf.summary.scalar(f"{place}/inertia", inertia)
            tf.summary.scalar(f"{place}/empty_clusters", np.count_nonzero(counts == 0))
            for state, centroid in enumerate(np.mean(centroids, axis=0)):
                tf.summary.scalar(f"{place}/centroid_{state}", centroid)
            assignments = indices.numpy().astype(np.uint8)
            if place in self._before:
                step_before, before = self._before[place]
                moves = np.count_nonzero(assignments != before) / (step - step_before)
                tf.summary.scalar(f"{place}/moves_per_step", moves)
            self._before[place] = step, assignments
