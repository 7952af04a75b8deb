"""Running TFLite files in LiteRT."""

import concurrent.futures
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from tqdm import tqdm

from tf_repvgg import converter_errors, native_output


def load_interpreter(file: bytes, threads: int, default_delegate: bool = True, **options: Any) -> Interpreter:
    """Loads a file in LiteRT and allocates its tensors.

    Args:
      file: TFLite file.
      threads: Number of interpreter threads.
      default_delegate: Whether XNNPACK runs the operators that it supports; see `predict`.
      **options: Further options of LiteRT's interpreter.

    Raises:
      ValueError: If LiteRT cannot load the file. The message names the operation, if it is one that cannot be prepared.
    """
    resolver = OpResolverType.AUTO if default_delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    with native_output.hide():  # it announces its delegate each time
        interpreter = Interpreter(
            model_content=file, num_threads=threads, experimental_op_resolver_type=resolver, **options
        )
        converter_errors.allocate_tensors(interpreter)
    return interpreter


def quantize_input(values: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    """Converts values to the type and scale of an input tensor, described by LiteRT's details.

    Whole numbers without a scale, such as pixels or indices, keep their value.

    Raises:
      ValueError: If a value does not fit into an input of whole numbers without a scale.
    """
    dtype = np.dtype(details["dtype"])
    if dtype.kind not in "iu":
        return values.astype(dtype, copy=False)
    scale, zero_point = details["quantization"]
    limits = np.iinfo(dtype)
    if scale:
        return np.clip(np.round(values / scale) + zero_point, limits.min, limits.max).astype(dtype)
    fits = (values == np.round(values)) & (values >= limits.min) & (values <= limits.max)
    if not np.all(fits):
        raise ValueError(
            f"input {details['name']!r} takes whole numbers from {limits.min} to {limits.max}, but got "
            f"{np.extract(~fits, values)[0]}"
        )
    return values.astype(dtype)


def dequantize_output(outputs: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    """Converts values of a tensor, described by LiteRT's details, to float32; whole numbers without a scale stay."""
    scale, zero_point = details["quantization"]
    if not scale:
        return outputs
    return (outputs.astype(np.float32) - zero_point) * np.float32(scale)


def _input_details(interpreter):
    """{name in the file's signature: details} in the file's order; a single input has the name ""."""
    details = interpreter.get_input_details()
    if len(details) == 1:
        return {"": details[0]}
    named = interpreter.get_signature_runner().get_input_details()
    names = {tensor["index"]: name for name, tensor in named.items()}
    return {names[tensor["index"]]: tensor for tensor in details}


def _output_details(interpreter):
    """{name in the file's signature: details}; a single output needs no signature and has the name ""."""
    details = interpreter.get_output_details()
    # LiteRT lists several outputs in the converter's order; only the signature has their names.
    return {"": details[0]} if len(details) == 1 else interpreter.get_signature_runner().get_output_details()


def _arrange_inputs(images, details) -> list[np.ndarray]:
    """One array [count, ...] for each input of a file, in the file's order."""
    names = list(details)
    if isinstance(images, Mapping):
        if len(names) == len(images) == 1:  # whatever the model calls its only input
            images = list(images.values())
        elif missing := [name for name in names if name not in images]:
            raise ValueError(
                f"there are images for {', '.join(map(repr, images))}, but not for {missing[0]!r}; the file's inputs "
                f"are {', '.join(map(repr, names))}"
            )
        else:
            images = [images[name] for name in names]
    elif len(names) == 1:
        images = [images]
    if not isinstance(images, (list, tuple)) or len(images) != len(names):
        raise ValueError(
            f"the file has {len(names)} inputs, {', '.join(map(repr, names))}; give an array [count, ...] for each, in "
            "a dictionary or in this order"
        )
    arrays = [np.asarray(values) for values in images]
    for array, (name, tensor) in zip(arrays, details.items(), strict=True):
        shape = tuple(int(size) for size in tensor["shape_signature"][1:])
        is_fixed = -1 not in shape
        if (is_fixed and array.shape[1:] != shape) or len(array) != len(arrays[0]):
            raise ValueError(
                f"the images{f' for {name!r}' if name else ''} have shape {array.shape}; the file needs "
                f"{(len(arrays[0]), *shape)}"
            )
    return arrays


def predict(
    file: bytes,
    images: np.ndarray | Mapping[str, np.ndarray] | Sequence[np.ndarray],
    description: str | None = None,
    default_delegate: bool = True,
) -> np.ndarray | dict[str, np.ndarray]:
    """Runs a file of batch 1 on every image, with one interpreter for each core.

    Args:
      file: TFLite file.
      images: Images as for the model, [count, height, width, channels]; quantized here as the file's input requires.
        For a file with several inputs, a dictionary {input name: array [count, ...]}, or the arrays in the order of the
        model's inputs.
      description: Label of a progress bar; None for no bar.
      default_delegate: Whether XNNPACK runs the operators that it supports; otherwise LiteRT's own kernels run all,
        and round a little differently.

    Returns:
      The dequantized outputs, float32 [count, ...]; whole numbers where the model's output is. For a file with several
      outputs, a dictionary of such arrays: its keys are those of the model's outputs, or "output_0" onwards if these
      are a list, with the keys of nested structures joined by underscores.

    Raises:
      ValueError: If images have another shape than the file's input, or do not fit its type, or an input has none.

    Example:
      >>> import numpy as np
      >>> import tf_keras as keras
      >>> from tf_repvgg import tflite
      >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
      >>> images = np.ones([2, 8, 8, 3], np.float32)
      >>> tflite.predict(tflite.convert(model, calibration=images), images).shape
      (2, 6, 6, 4)
    """
    workers = os.cpu_count() or 1
    interpreters = [load_interpreter(file, 1, default_delegate) for _ in range(workers)]
    arrays = _arrange_inputs(images, _input_details(interpreters[0]))
    count = len(arrays[0])
    chunks = np.array_split(np.arange(count), workers)
    with tqdm(total=count, desc=description, unit="image", disable=description is None, leave=False) as bar:

        def run(interpreter, indices):
            inputs, details = interpreter.get_input_details(), _output_details(interpreter)
            outputs = {name: np.empty([len(indices), *out["shape"][1:]], out["dtype"]) for name, out in details.items()}
            for row, index in enumerate(indices):
                _set_inputs(interpreter, inputs, [values[index : index + 1] for values in arrays])
                interpreter.invoke()
                for name, output in outputs.items():
                    output[row] = interpreter.get_tensor(details[name]["index"])[0]
                bar.update()
            return {name: dequantize_output(output, details[name]) for name, output in outputs.items()}

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(run, interpreters, chunks))
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return outputs.get("", outputs)


def _set_inputs(interpreter, details, values):
    for tensor, tensor_values in zip(details, values, strict=True):
        interpreter.set_tensor(tensor["index"], quantize_input(tensor_values, tensor))


def intermediate(
    file: bytes, images: np.ndarray | Mapping[str, np.ndarray] | Sequence[np.ndarray], tensors: Sequence[int]
) -> list[np.ndarray]:
    """Computes intermediate tensors of a file of batch 1, on LiteRT's own kernels.

    Args:
      file: TFLite file.
      images: Images, as for `predict`.
      tensors: Indices of the tensors.

    Returns:
      The dequantized values of each tensor, float32 [count, ...].
    """
    # The delegate would not show the tensors between the operators that it runs.
    interpreter = load_interpreter(file, 1, default_delegate=False, experimental_preserve_all_tensors=True)
    inputs = _input_details(interpreter)
    arrays = _arrange_inputs(images, inputs)
    details = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    results: list[list[np.ndarray]] = [[] for _ in tensors]
    for index in range(len(arrays[0])):
        _set_inputs(interpreter, inputs.values(), [values[index : index + 1] for values in arrays])
        interpreter.invoke()
        for result, tensor in zip(results, tensors, strict=True):
            result.append(interpreter.get_tensor(tensor)[0])
    return [
        dequantize_output(np.stack(result), details[tensor]) for result, tensor in zip(results, tensors, strict=True)
    ]
