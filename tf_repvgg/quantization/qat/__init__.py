"""Quantization-aware training: ClusterQAT, learned step sizes (LSQ), and tfmot as a baseline.

Each method has a function that wraps the layers of a fused model for training, and one that strips the wrappers.

Example:
  >>> import tf_keras as keras
  >>> from tf_repvgg.quantization import qat
  >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")])
  >>> clustered = qat.cluster_quantize(model, number_of_clusters=3, activation_bits=None)
  >>> [layer.name for layer in qat.strip_cluster_quantize(clustered).layers if layer.weights]
  ['dense']
"""

from tf_repvgg.quantization.qat import clustering, tfmot_baseline
from tf_repvgg.quantization.qat.clustering import cluster_quantize, strip_cluster_quantize
from tf_repvgg.quantization.qat.lsq import learned_step_quantize, strip_learned_step

__all__ = [
    "cluster_quantize",
    "clustering",
    "learned_step_quantize",
    "strip_cluster_quantize",
    "strip_learned_step",
    "tfmot_baseline",
]
