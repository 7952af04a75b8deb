"""Callbacks that freeze clusters while a model trains, and that log how they move."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from tf_repvgg import graph
from tf_repvgg.quantization import codebooks
from tf_repvgg.quantization.activation_quantizer import ActivationQuantizer
from tf_repvgg.quantization.qat.clustering.wrapper import ClusteringWrapper
from tf_repvgg.quantization.qat.wrapping import find_wrappers


class FreezeClusters(keras.callbacks.Callback):
    """Freezes assignments and centroids from a training step on; see `ClusterQuantize.freeze`.

    Args:
      step: Number of optimizer steps after which clusters are frozen.
      ranges: Whether activation ranges are frozen too.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization.qat.clustering import FreezeClusters, cluster_quantize
      >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")])
      >>> clustered = cluster_quantize(model, number_of_clusters=3)
      >>> clustered.compile("sgd", "mse")
      >>> history = clustered.fit(np.ones([8, 4]), np.ones([8, 2]), 2, verbose=0, callbacks=[FreezeClusters(step=2)])
      >>> clustered.get_layer("dense_quantizer").is_frozen.numpy().item()
      True
    """

    def __init__(self, step: int, ranges: bool = True) -> None:
        super().__init__()
        self._step = step
        self._ranges = ranges
        self._is_done = False

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if not self._is_done and int(self.model.optimizer.iterations.numpy()) >= self._step:
            for layer in graph.find_layers(self.model):
                if isinstance(layer, ClusteringWrapper) or (self._ranges and isinstance(layer, ActivationQuantizer)):
                    layer.freeze()
            self._is_done = True


class ClusterLog(keras.callbacks.Callback):
    """Logs to TensorBoard how clusters move, layer by layer.

    Scalars: `inertia`, the sum of squared distances between latent weights and their centroids; `moves_per_step`, the
    number of weights that have changed their centroid since the last record, divided by the steps since;
    `empty_clusters`, the number of centroids without weights; and `centroid_<i>`, the centroids themselves, averaged
    over channels if every channel has its own.

    Args:
      log_dir: Folder of the event files.
      every: Optimizer steps from one record to the next.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg.quantization.qat.clustering import ClusterLog, cluster_quantize
      >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")])
      >>> clustered = cluster_quantize(model, number_of_clusters=3, activation_bits=None)
      >>> clustered.compile("sgd", "mse")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     log = ClusterLog(folder, every=1)
      ...     history = clustered.fit(np.ones([8, 4]), np.ones([8, 2]), verbose=0, callbacks=[log])
      ...     print(len(list(Path(folder).iterdir())), "event file")
      1 event file
    """

    def __init__(self, log_dir: str | Path, every: int = 100) -> None:
        super().__init__()
        self._log_dir = str(log_dir)
        self._every = every
        self._last_assignments: dict[str, tuple[int, np.ndarray]] = {}

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        find_wrappers(model, ClusteringWrapper)
        self._writer = tf.summary.create_file_writer(self._log_dir)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        step = int(self.model.optimizer.iterations.numpy())
        if step % self._every == 0:
            with self._writer.as_default(step=step):
                for wrapper in find_wrappers(self.model, ClusteringWrapper):
                    self._record(wrapper, step)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._writer.flush()

    def _record(self, wrapper, step):
        for name, (weights, centroids, indices) in wrapper.clusters().items():
            tag = f"clusters/{wrapper.layer.name}_{name}"
            inertia, counts = codebooks.inertia_and_counts(weights, centroids, indices)
            tf.summary.scalar(f"{tag}/inertia", inertia)
            tf.summary.scalar(f"{tag}/empty_clusters", np.count_nonzero(counts == 0))
            for number, centroid in enumerate(np.mean(centroids, axis=0)):
                tf.summary.scalar(f"{tag}/centroid_{number}", centroid)
            assignments = indices.numpy().astype(np.uint8)
            if tag in self._last_assignments:
                last_step, last_assignments = self._last_assignments[tag]
                moves = np.count_nonzero(assignments != last_assignments) / (step - last_step)
                tf.summary.scalar(f"{tag}/moves_per_step", moves)
            self._last_assignments[tag] = step, assignments
