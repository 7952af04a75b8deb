"""Commands with bad input, and what the error must say."""

from helpers.bad_training_commands import BAD_TRAINING_COMMANDS

EXPORT = "export/main.py"

# {case: (program, flags, text in the error message, more text in it)}, where "a|b" stands for either text. In flags,
# {here} is a folder with runs and files in every state that the cases need, and {new} a path that does not exist.
BAD_COMMANDS = {
    **BAD_TRAINING_COMMANDS,
    "folder in place of an export": (
        EXPORT,
        ["--workdir={here}/run", "--output={here}/blocked_export"],
        "export.json' is a folder, but a file",
        "remove the folder",
    ),
    "width of another script": (EXPORT, ["--workdir={here}/run", "--weight_bits=\u00b2"], "--weight_bits is", "2 to 8"),
    "export: no run": (EXPORT, ["--workdir={new}"], "does not exist", "workdir of a run"),
    "export: no input.json": (EXPORT, ["--workdir={here}/empty"], "input.json", "dataset"),
    "export: truncated model": (EXPORT, ["--workdir={here}/truncated_run"], "not a whole Keras model", ""),
    "export: bits": (EXPORT, ["--workdir={here}/run", "--weight_bits=8,9"], "--weight_bits is '8,9'", "2 to 8"),
    "export: granularity": (
        EXPORT,
        ["--workdir={here}/run", "--granularity=per_layer"],
        "--granularity is 'per_layer'",
        "per_tensor, per_channel",
    ),
    "export: no granularity": (
        EXPORT,
        ["--workdir={here}/run", "--granularity="],
        "--granularity is ''",
        "per_tensor, per_channel",
    ),
    "export: no target": (EXPORT, ["--workdir={here}/run", "--targets="], "no target is named; known: litert_int8", ""),
    "export: PTQ method": (
        EXPORT,
        ["--workdir={here}/run", "--ptq=adaqaunt"],
        "PTQ method is 'adaqaunt'; known: min_max",
        "adaquant",
    ),
    "export: no statistics": (
        EXPORT,
        ["--workdir={here}/plain_run", "--ptq=dfq_data_free"],
        "needs the statistics of the merged normalizations",
        "Or use dfq with calibration images",
    ),
    "export: NaN": (EXPORT, ["--workdir={here}/nan_run", "--ptq=mse"], "weight 'stem/bias", "infinities or NaN"),
    "export: one bit": (EXPORT, ["--workdir={here}/run", "--ptq=mse", "--weight_bits=1"], "is '1'", "2 to 8"),
    "export: bits for a layer": (
        EXPORT,
        ["--workdir={here}/run", "--ptq=mse", "--layer_bits=stem=9"],
        "weight bits are '9'|weight bits are 9",
        "from 2 to 8",
    ),
    "export: few timed inferences": (EXPORT, ["--workdir={here}/run", "--latency_runs=10"], "latency_runs", "0, or 50"),
    "export: bits for no layer": (
        EXPORT,
        ["--workdir={here}/run", "--layer_bits=stm=8"],
        "pattern 'stm' of weight bits matches no layer; there are: stem",
        "",
    ),
    "export: too few calibration images": (
        EXPORT,
        ["--workdir={here}/run", "--calibration_images=5000"],
        "5000 calibration images were requested",
        "train",
    ),
    "export: bits of a model trained with quantization": (
        EXPORT,
        ["--workdir={here}/quantized_run", "--weight_bits=4"],
        "--weight_bits=['4'] does not go with a model that was trained quantized",
        "",
    ),
    "export: a budget that is none": (
        EXPORT,
        ["--workdir={here}/run", "--targets=tflm_lut", "--fit=flash:9kB"],
        "the budget 'flash:9kB' holds 'flash:9kB'",
        "write weights:256kB",
    ),
    "export: a budget for two targets": (
        EXPORT,
        ["--workdir={here}/run", "--targets=tflm_lut,litert_int4", "--fit=weights:9kB"],
        "--targets is 'tflm_lut,litert_int4'; --fit is for one target",
        "",
    ),
    "export: codebooks in 4 bits": (
        EXPORT,
        ["--workdir={here}/run", "--targets=litert_int4", "--fit=weights:9kB", "--ptq=codebook"],
        "target litert_int4 stores no codebooks",
        "such as adaquant",
    ),
    "export: output is a file": (
        EXPORT,
        ["--workdir={here}/run", "--output={here}/file"],
        "file' is a file; give a folder",
        "",
    ),
    "export: other classes": (
        EXPORT,
        ["--workdir={here}/other_classes_run"],
        "distinguishes 3 classes",
        "and 10 classes",
    ),
    "export: same number of other classes": (
        EXPORT,
        ["--workdir={here}/other_labels_run"],
        "class 0 of the model is 'zero', but that of 'digits' is '0'",
        "",
    ),
}
