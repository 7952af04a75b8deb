"""The float networks that experiments/low_bit.py fine-tunes: {title: name of a file in configs/}."""

OABN_MODELS = {"OABN": "cifar10_oabn", "OABN, seed 1": "cifar10_oabn_seed1"}
OTHER_MODELS = {"BN": "cifar10_bn", "QARepVGG": "cifar10_qarepvgg", "no identity branch": "cifar10_no_identity"}
# Has not seen the validation data.
VALIDATION_MODEL = "cifar10_oabn_validation"
