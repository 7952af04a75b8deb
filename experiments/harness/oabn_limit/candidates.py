"""The limits k of OABN, and the ways of training clipped gammas, that both experiments on k compare."""

CONFIG = "cifar10_oabn"
DEFAULT_MODE = "project"
# Limits of the default clip mode: no limit, absolute ones, and ones relative to each kernel's standard deviation.
LIMITS = ("inf", "0.2", "0.1", "0.05", "0.025", "8std", "4std")
# Flags of train/main.py.
CANDIDATES = (
    *({"oabn_k": k, "oabn_clip_mode": DEFAULT_MODE} for k in LIMITS),
    *({"oabn_k": "0.1", "oabn_clip_mode": mode} for mode in ("straight_through", "return_only")),
)
