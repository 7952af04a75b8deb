"""Quantization-aware training: ClusterQAT, learned step sizes (LSQ), and tfmot as a baseline."""

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
