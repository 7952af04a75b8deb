"""Running TFLite files in LiteRT."""

import concurrent.futures
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from tqdm import tqdm

from tf_repvgg import native_output


def load_interpreter(file: bytes, threads: int, default_delegate: bool = True, **options: Any) -> Interpreter:
    """Loads a file in LiteRT and allocates its tensors.

    Args:
      file: TFLite file.
      threads: Number of interpreter threads.
      default_delegate: Whether XNNPACK runs the operators that it supports; see `predict`.
      **options: Further options of LiteRT's interpreter.
    """
    resolver = OpResolverType.AUTO if default_delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    with native_output.hide():  # it announces its delegate each time
        interpreter = Interpreter(
            model_content=file, num_threads=threads, experimental_op_resolver_type=resolver, **options
        )
        interpreter.allocate_tensors()
    return interpreter


def quantize_input(images: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    """Converts float images to the type and scale of an input tensor, described by LiteRT's details."""
    dtype = details["dtype"]
    if dtype == np.float32:
        return images
    scale, zero_point = details["quantization"]
    limits = np.iinfo(dtype)
    return np.clip(np.round(images / scale) + zero_point, limits.min, limits.max).astype(dtype)


def dequantize_output(outputs: np.ndarray, details: Mapping[str, Any]) -> np.ndarray:
    """Converts values of a tensor, described by LiteRT's details, to float32."""
    if details["dtype"] == np.float32:
        return outputs
    scale, zero_point = details["quantization"]
    return (outputs.astype(np.float32) - zero_point) * np.float32(scale)


def _output_details(interpreter):
    """{name in the file's signature: details}; a single output needs no signature and has the name ""."""
    details = interpreter.get_output_details()
    # LiteRT lists several outputs in the converter's order; only the signature has their names.
    return {"": details[0]} if len(details) == 1 else interpreter.get_signature_runner().get_output_details()


def predict(
    file: bytes, images: np.ndarray, description: str | None = None, default_delegate: bool = True
) -> np.ndarray | dict[str, np.ndarray]:
    """Runs a file of batch 1 on every image, with one interpreter for each core.

    Args:
      file: TFLite file with one input.
      images: Normalized images, float32 [count, height, width, channels]; quantized here as the file's input requires.
      description: Label of a progress bar; None for no bar.
      default_delegate: Whether XNNPACK runs the operators that it supports; otherwise LiteRT's own kernels run all,
        and round a little differently.

    Returns:
      The dequantized outputs, float32 [count, ...]. For a file with several outputs, a dictionary of such arrays: its
      keys are those of the model's outputs, or "output_0" onwards if these are a list.

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
    chunks = np.array_split(np.arange(len(images)), workers)
    with tqdm(total=len(images), desc=description, unit="image", disable=description is None, leave=False) as bar:

        def run(interpreter, indices):
            (input_details,) = interpreter.get_input_details()
            details = _output_details(interpreter)
            outputs = {name: np.empty([len(indices), *out["shape"][1:]], out["dtype"]) for name, out in details.items()}
            for row, index in enumerate(indices):
                interpreter.set_tensor(input_details["index"], quantize_input(images[index : index + 1], input_details))
                interpreter.invoke()
                for name, output in outputs.items():
                    output[row] = interpreter.get_tensor(details[name]["index"])[0]
                bar.update()
            return {name: dequantize_output(output, details[name]) for name, output in outputs.items()}

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(run, interpreters, chunks))
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return outputs.get("", outputs)


def intermediate(file: bytes, images: np.ndarray, tensors: Sequence[int]) -> list[np.ndarray]:
    """Computes intermediate tensors of a file of batch 1 with one input, on LiteRT's own kernels.

    Args:
      file: TFLite file.
      images: Normalized images, as for `predict`.
      tensors: Indices of the tensors.

    Returns:
      The dequantized values of each tensor, float32 [count, ...].
    """
    # The delegate would not show the tensors between the operators that it runs.
    interpreter = load_interpreter(file, 1, default_delegate=False, experimental_preserve_all_tensors=True)
    (input_details,) = interpreter.get_input_details()
    details = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    values: list[list[np.ndarray]] = [[] for _ in tensors]
    for image in images:
        interpreter.set_tensor(input_details["index"], quantize_input(image[np.newaxis], input_details))
        interpreter.invoke()
        for tensor_values, index in zip(values, tensors, strict=True):
            tensor_values.append(interpreter.get_tensor(index)[0])
    return [
        dequantize_output(np.stack(tensor_values), details[index])
        for tensor_values, index in zip(values, tensors, strict=True)
    ]
