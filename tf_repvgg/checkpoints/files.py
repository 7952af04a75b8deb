"""Files of named weights: .safetensors, .npz, and PyTorch's own files where torch is installed. None can run code."""

import contextlib
import dataclasses
import importlib
import math
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (comes with TensorFlow; it teaches NumPy the type bfloat16)
import numpy as np
import safetensors.numpy

from tf_repvgg import storage
from tf_repvgg.checkpoints.archives import check_compression

SAFETENSORS, NPZ = ".safetensors", ".npz"
PICKLES = (".pth", ".pt", ".pth.tar", ".bin", ".ckpt")  # what torch.save writes
SUFFIXES = (SAFETENSORS, NPZ, *PICKLES)

# As NumPy and PyTorch name them, and as safetensors does.
_FLOAT_TYPES = ("bfloat16", "float16", "float32", "float64", "BF16", "F16", "F32", "F64")

# Names under which training programs keep the weights beside other things; a moving average comes first, as the
# programs themselves evaluate it.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_WRAPPERS = (*_AVERAGES, "state_dict", "model_state_dict", "model", "module", "network", "net")


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file, not read yet.

    Attributes:
      shape: Shape, as the file states it.
      dtype: Type of the numbers, as the file names it.
      read: Function that reads the array.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def is_float(self) -> bool:
        """Whether the numbers are floating-point ones that float32 can take over."""
        return self.dtype in _FLOAT_TYPES


def is_torch_file(path: str | Path) -> bool:
    """Whether the name of a file is one of those that `load_torch` reads, whatever the file holds.

    Example:
      >>> from tf_repvgg import checkpoints
      >>> checkpoints.is_torch_file("repvgg_a0.safetensors"), checkpoints.is_torch_file("runs/oabn/model.keras")
      (True, False)
    """
    return str(path).lower().endswith(SUFFIXES)


@contextlib.contextmanager
def open_weights(path: str | Path) -> Iterator[tuple[dict[str, StoredArray], str | None]]:
    """Opens a file of weights. While it is open, its arrays can be read one by one.

    Args:
      path: File in one of the formats `SUFFIXES`.

    Yields:
      {key: array} of the network, without other arrays that a training program keeps beside it; and the name of the
      moving average that was preferred to the plain weights, or None.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is of another kind, damaged, or asks to run code; or torch, which it needs, is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of weights at {str(path)!r}")
    if not is_torch_file(path):
        raise ValueError(f"{str(path)!r} is no file of weights by its name; it must end in {', '.join(SUFFIXES)}")
    with open(path, "rb"), contextlib.ExitStack() as stack:  # Python's errors about access are the clearest
        with _name_damaged_file(path):
            if path.suffix.lower() == SAFETENSORS:
                content = _list_safetensors(path, stack)
            elif path.suffix.lower() == NPZ:
                content = _list_npz(path, stack)
            else:
                content = _load_pickle(path)
        yield _find_network(content, path)


@contextlib.contextmanager
def _name_damaged_file(path):
    """Turns whatever a reader raises about a damaged file into one line. Memory is among it: sizes may be invented."""
    try:
        yield
    except _Refusal as error:
        raise ValueError(str(error)) from None
    except (Exception, MemoryError) as error:
        # One sentence: PyTorch's next ones may advise to load the file without its protection.
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or "it ends too early"
        raise ValueError(f"{str(path)!r} is not a whole file of weights ({reason})") from None


class _Refusal(ValueError):
    """An error that says all there is to say."""


def _list_safetensors(path, stack):
    file = stack.enter_context(safetensors.safe_open(path, framework="np"))

    def describe(key):
        entry = file.get_slice(key)
        return StoredArray(tuple(entry.get_shape()), entry.get_dtype(), lambda: _read(path, file.get_tensor, key))

    return {key: describe(key) for key in file.keys()}  # noqa: SIM118  (not a dictionary)


def _list_npz(path, stack):
    archive = stack.enter_context(zipfile.ZipFile(path))
    try:
        check_compression(archive)
    except ValueError as error:
        raise _Refusal(f"{str(path)!r} is refused: {error}") from None

    def read_member(name):
        with archive.open(name) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def describe(name):
        with archive.open(name) as member:
            version = np.lib.format.read_magic(member)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(member)
            size = member.tell() + math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise _Refusal(
                f"{name!r} in {str(path)!r} is pickled objects, which could run any code, so the file is refused; save "
                "arrays of numbers"
            )
        if size != archive.getinfo(name).file_size:  # before NumPy makes an array of an invented size
            raise _Refusal(f"{name!r} in {str(path)!r} is damaged: its header states another size than the file has")
        return StoredArray(shape, dtype.name, lambda: _read(path, read_member, name))

    return {name.removesuffix(".npy"): describe(name) for name in archive.namelist()}


def _read(path, read, key):
    with _name_damaged_file(path):
        return read(key)


def import_torch(path: Path) -> types.ModuleType:
    """Imports PyTorch for a file that only PyTorch reads and writes.

    Raises:
      ValueError: If it is not installed; names the file and the ways out.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise _Refusal(
            f"{str(path)!r} is PyTorch's own format, which needs PyTorch; install it with: pip install torch, or use a "
            ".safetensors file (where PyTorch is: safetensors.torch.save_file(state_dict, path))"
        ) from None


def _load_pickle(path):
    torch = import_torch(path)
    try:
        with warnings.catch_warnings():  # about pickles of other kinds, which are refused here
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise _Refusal(
                f"{str(path)!r} asks for {code[1]}, which could run any code, so the file is refused; in a program "
                "that may load it, save the state_dict alone"
            ) from None
        raise _Refusal(f"{str(path)!r} is not a whole file of weights (torch.save did not write it)") from None
    return _describe_tensors(content if isinstance(content, Mapping) else {}, torch)


def _describe_tensors(content, torch):
    """The content of a pickle with its tensors described."""
    if isinstance(content, Mapping):
        return {str(key): _describe_tensors(value, torch) for key, value in content.items()}
    if not isinstance(content, torch.Tensor):
        return None

    def read():
        tensor = content.detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return StoredArray(tuple(content.shape), str(content.dtype).removeprefix("torch."), read)


def _find_network(content, path):
    """The arrays of the network in nested dictionaries, and the name of a moving average on the way to them."""
    average = None
    while wrapper := next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None):
        average = wrapper if wrapper in _AVERAGES else average
        content = content[wrapper]
    arrays = {key: array for key, array in content.items() if isinstance(array, StoredArray)}
    if not arrays:
        names = ", ".join(list(content)[:5]) if content else "nothing"
        raise ValueError(f"{str(path)!r} holds no weights; at its top level is {names}; save the state_dict alone")
    return arrays, average


def write_weights(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file of weights whole, or not at all.

    Args:
      path: Name of the file; it ends in .safetensors, or in one of `PICKLES` where torch is installed.
      arrays: {key: array}.

    Raises:
      ValueError: If the name ends otherwise, or torch is missing.
      OSError: If the file cannot be written.
    """
    path = Path(path)
    name = path.name.lower()
    # Not by np.ascontiguousarray, which makes a vector of a scalar.
    arrays = {key: np.array(array, order="C") for key, array in arrays.items()}
    if name.endswith(SAFETENSORS):
        # Other programs ask which framework wrote the file.
        storage.write_bytes(path, safetensors.numpy.save(arrays, metadata={"format": "pt"}))
    elif name.endswith(PICKLES):
        torch = import_torch(path)
        with storage.atomic_write(path) as temporary:
            torch.save({key: torch.from_numpy(array) for key, array in arrays.items()}, temporary)
    else:
        raise ValueError(f"{str(path)!r} must end in {SAFETENSORS}, or where torch is installed in .pth")
