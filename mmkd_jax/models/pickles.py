"""Weights in torch's pickles, read without torch and without executing anything, and written.

`torch.save` writes a pickle of the objects around the tensors, and the tensors' bytes beside it: as entries of a zip
archive since torch 1.6, one after the other behind the pickle before that (pytorch/pytorch `torch/serialization.py`).
Opening a pickle calls whatever functions it names. Here it may name the few that build dictionaries and tensors, which
are replaced by ours; any other name is refused before anything is called. The worst that a hostile file can do is to
hold wrong numbers.
"""

import dataclasses
import io as memory
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

from mmkd_jax import io
from mmkd_jax.errors import InputError

Tensors = dict[str, np.ndarray]
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
WRAPPERS = ("state_dict", "model", "model_state_dict")  # where training checkpoints keep their weights
DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# What training checkpoints hold beside weights: read as nothing.
IGNORED = {
    ("argparse", "Namespace"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
    ("torch", "device"),
    ("torch", "Size"),
}
_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before torch 1.6
_TYPED = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def read(path: epath.Path, alone: str = "") -> Tensors:
    """The tensors of a file that `torch.save` wrote, under their names and in their dtypes.

    The file holds a dictionary of tensors, or a training checkpoint with one under `state_dict` or `model`; what else
    it holds (optimiser, epoch, arguments) is left out, and bytes that are not asked for are not read.

    Args:
      path: the file.
      alone: name for the tensor of a file that holds nothing but one; such a file is refused without it.

    Raises:
      InputError: the file names code that has no place in weights, is damaged, or holds no dictionary of tensors.
    """
    with path.open("rb") as file:
        try:
            zipped = zipfile.is_zipfile(file)
            file.seek(0)
            root, load = _open_zip(file) if zipped else _open_legacy(file)
            weights = {alone: root} if alone and isinstance(root, _Tensor) else _weights(root)
            return {name: _array(tensor, load) for name, tensor in weights.items()}
        except _RefusedError as error:
            raise InputError(f"{path}: {error}") from error
        except Exception as error:  # a damaged pickle raises almost anything
            message = f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is not a readable file of torch ({message}); fetch it again") from error


def write(path: epath.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a dictionary of tensors as `torch.save` would; `torch.load` reads it."""
    buffer = memory.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _written(tensors))
        archive.writestr("archive/byteorder", "little")
        for key, tensor in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(tensor).tobytes())
        archive.writestr("archive/version", "3\n")
    io.write_bytes(path, buffer.getvalue())


class _RefusedError(Exception):
    """The file is whole, but is not what is read here."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Bytes of one or several tensors, not yet read."""

    dtype: Any
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Nothing:
    """Stands for an object that is not wanted: takes any arguments and any state, and keeps none."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class _Unpickler(pickle.Unpickler):
    """Builds containers and `_Tensor`; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _rebuild_parameter
        if (module, name) in IGNORED:
            return _Nothing
        raise _RefusedError(
            f"this pickle asks to run {module}.{name}, which has no place in weights, so it was not opened; "
            "if you trust it, save its state dict as safetensors"
        )

    def persistent_load(self, saved: Any) -> _Storage:
        kind, dtype, key, _, count, *view = saved
        if kind != "storage" or any(part is not None for part in view):
            raise _RefusedError(f"storages of kind {kind!r} with views are not read; save it again with a newer torch")
        return _Storage(dtype, key, count)


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *rest: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _Tensor, *rest: Any) -> _Tensor:
    return tensor


def _open_zip(file: BinaryIO) -> tuple[Any, Callable[[str], bytes]]:
    """The pickled object, and what reads a storage."""
    archive = zipfile.ZipFile(file)
    names = set(archive.namelist())
    found = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if any(name.endswith("/constants.pkl") for name in names):
        raise _RefusedError("a TorchScript archive holds code; save its state dict as safetensors")
    if len(found) != 1:
        raise _RefusedError("a zip archive, but not one of torch; unpack it if weights are in it")
    prefix = found[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
        raise _RefusedError("its numbers are big-endian; save it again on another machine")

    def load(key: str) -> bytes:
        entry = archive.getinfo(f"{prefix}data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise _RefusedError("its tensors are compressed, which torch does not do")
        return archive.read(entry)

    return _Unpickler(memory.BytesIO(archive.read(found[0]))).load(), load


def _open_legacy(file: BinaryIO) -> tuple[Any, Callable[[str], bytes]]:
    """As `_open_zip`, of the format before torch 1.6: magic number, version, machine, object, keys, storages."""
    storages: dict[str, _Storage] = {}

    class Unpickler(_Unpickler):
        def persistent_load(self, saved: Any) -> _Storage:
            storage = super().persistent_load(saved)
            return storages.setdefault(storage.key, storage)

    if Unpickler(file).load() != _MAGIC:
        raise _RefusedError("a pickle, but not one of torch; save its state dict as safetensors")
    Unpickler(file).load()
    Unpickler(file).load()
    root, keys = Unpickler(file).load(), Unpickler(file).load()
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        size = count * np.dtype(storages[key].dtype).itemsize
        places[key] = (file.tell(), size)
        file.seek(size, 1)

    def load(key: str) -> bytes:
        place, size = places[key]
        file.seek(place)
        return file.read(size)

    return root, load


def _weights(root: Any) -> dict[str, _Tensor]:
    """The dictionary of tensors in `root`, or in what it wraps."""
    for _ in range(3):
        if not isinstance(root, dict):
            break
        if tensors := {str(name): value for name, value in root.items() if isinstance(value, _Tensor)}:
            return tensors
        root = next((root[name] for name in WRAPPERS if name in root), None)
    raise _RefusedError(f"it holds no dictionary of tensors, neither itself nor under {', '.join(WRAPPERS)}")


def _array(tensor: _Tensor, load: Callable[[str], bytes]) -> np.ndarray:
    """The elements of a tensor; read-only."""
    storage, strides = tensor.storage, tensor.strides
    flat = np.frombuffer(load(storage.key), storage.dtype)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, strides, strict=True))
    inside = len(flat) == storage.count and min((0, tensor.offset, *tensor.shape, *strides)) == 0
    if not inside or (0 not in tensor.shape and last >= len(flat)):
        raise ValueError(f"a tensor {tensor.shape} reaches beyond its {len(flat)} stored elements")
    steps = tuple(step * flat.itemsize for step in strides)
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps, writeable=False)


def _written(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The pickle beside the tensors' bytes, in the calls that torch itself writes."""

    def value(item: Any) -> bytes:
        if isinstance(item, tuple):
            return b"(" + b"".join(map(value, item)) + b"t"
        if isinstance(item, int):
            return pickle.dumps(item, 2)[2:-1]
        text = item.encode()
        return b"X" + struct.pack("<I", len(text)) + text

    parts = [b"\x80\x02}("]
    for key, (name, tensor) in enumerate(tensors.items()):
        tensor = np.asarray(tensor)
        strides = tuple(int(np.prod(tensor.shape[axis + 1 :])) for axis in range(tensor.ndim))
        storage = b"(" + value("storage") + b"ctorch\n" + _TYPED[tensor.dtype].encode() + b"\n"
        storage += value(str(key)) + value("cpu") + value(tensor.size) + b"tQ"
        parts += [value(name), b"ctorch._utils\n_rebuild_tensor_v2\n(", storage, value(0)]
        parts += [value(tensor.shape), value(strides), b"\x89ccollections\nOrderedDict\n)RtR"]
    return b"".join([*parts, b"u."])
