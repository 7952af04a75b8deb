"""Training-form layers of re-parameterized networks."""

from tf_repvgg.layers.batch_norm import CLIP_MODES, OutlierAwareBatchNormalization
from tf_repvgg.layers.blocks import (
    IDENTITIES,
    NORMS,
    OABN_BRANCHES,
    PADDINGS,
    QARepVGGBlock,
    ReparameterizedBlock,
    RepVGGBlock,
)
from tf_repvgg.layers.clip_limit import ClipLimit

__all__ = [
    "CLIP_MODES",
    "IDENTITIES",
    "NORMS",
    "OABN_BRANCHES",
    "PADDINGS",
    "ClipLimit",
    "OutlierAwareBatchNormalization",
    "QARepVGGBlock",
    "RepVGGBlock",
    "ReparameterizedBlock",
]
