"""Training-form layers of re-parameterized networks."""

from tf_repvgg.layers.batch_norm import CLIP_MODES, OutlierAwareBatchNormalization
from tf_repvgg.layers.clip_limit import ClipLimit
from tf_repvgg.layers.mobileone_block import MobileOneBlock, OverParameterizedBlock, QAMobileOneBlock
from tf_repvgg.layers.qarepvgg_block import QARepVGGBlock
from tf_repvgg.layers.reparameterized_block import PADDINGS, ReparameterizedBlock
from tf_repvgg.layers.repvgg_block import IDENTITIES, NORMS, OABN_BRANCHES, RepVGGBlock

__all__ = [
    "CLIP_MODES",
    "IDENTITIES",
    "NORMS",
    "OABN_BRANCHES",
    "PADDINGS",
    "ClipLimit",
    "MobileOneBlock",
    "OutlierAwareBatchNormalization",
    "OverParameterizedBlock",
    "QAMobileOneBlock",
    "QARepVGGBlock",
    "RepVGGBlock",
    "ReparameterizedBlock",
]
