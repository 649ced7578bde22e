"""Weight files: safetensors, and torch's pickles without executing them, to named arrays; safetensors out."""

import ml_dtypes
import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save

from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.models import pickles
from mmkd_jax.models.state_dict import Tensors

WEIGHTS = "open_clip_model.safetensors"
NAMES = (  # open_clip's order of preference, then what Hugging Face's older folders hold
    WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
SUFFIXES = (".safetensors", *pickles.SUFFIXES)


def read_tensors(path: epath.Path) -> Tensors:
    """All tensors of a weights file, as they are stored.

    Raises:
      InputError: it is of another kind, damaged, or a pickle that asks to run code.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in pickles.SUFFIXES:
        return pickles.read(path)
    raise InputError(f"{path} ends in {path.suffix!r}; weights are read from {', '.join(SUFFIXES)}")


def find_weights(folder: epath.Path) -> epath.Path:
    """The weights that open_clip would take from `folder`, or the only ones in it.

    Raises:
      InputError: there are none, or several under names of their own.
    """
    for name in NAMES:
        if (folder / name).exists():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{folder} holds several weights files ({names}); name the one you mean")
    raise InputError(f"{folder} holds no weights; expected {WEIGHTS} or another file {', '.join(SUFFIXES)}")


def holds_weights(folder: epath.Path) -> bool:
    """Whether a folder holds a weights file, under whatever name."""
    return any(child.suffix in SUFFIXES for child in folder.iterdir())


def write_tensors(path: epath.Path, tensors: Tensors) -> None:
    """Writes a safetensors file as torch's writers do."""
    contiguous = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
    io.write_bytes(path, save(contiguous, metadata={"format": "pt"}))


def _read_safetensors(path: epath.Path) -> Tensors:
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16, "BOOL": "?", "U8": "u1"}
    kinds |= {f"I{8 * size}": f"i{size}" for size in (1, 2, 4, 8)}
    try:
        return {
            name: np.frombuffer(record["data"], kinds[record["dtype"]]).reshape(record["shape"])
            for name, record in safetensors.deserialize(path.read_bytes())
        }
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}); fetch it again") from error
