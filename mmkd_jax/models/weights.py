"""Weight files: safetensors in and out. Pickles are not opened, since opening one runs what is in it."""

import ml_dtypes
import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save

from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.models.state_dict import Tensors

WEIGHTS = "open_clip_model.safetensors"
NAMES = (WEIGHTS, "open_clip_pytorch_model.safetensors", "model.safetensors")  # open_clip's order of preference


def read_tensors(path: epath.Path) -> Tensors:
    """All tensors of a safetensors file, as they are stored.

    Raises:
      InputError: it is a pickle, or damaged.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is not a safetensors file; convert it first, pickles are not opened")
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16, "BOOL": "?", "U8": "u1"}
    kinds |= {f"I{8 * size}": f"i{size}" for size in (1, 2, 4, 8)}
    try:
        return {
            name: np.frombuffer(record["data"], kinds[record["dtype"]]).reshape(record["shape"])
            for name, record in safetensors.deserialize(path.read_bytes())
        }
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}); fetch it again") from error


def find_weights(folder: epath.Path) -> epath.Path:
    """The weights that open_clip would take from `folder`.

    Raises:
      InputError: there are none in safetensors form.
    """
    for name in NAMES:
        if (folder / name).exists():
            return folder / name
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    hint = f"convert {others[0]} first, pickles are not opened" if others else f"expected {WEIGHTS}"
    raise InputError(f"{folder} holds no safetensors weights; {hint}")


def write_tensors(path: epath.Path, tensors: Tensors) -> None:
    """Writes a safetensors file as torch's writers do."""
    contiguous = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
    io.write_bytes(path, save(contiguous, metadata={"format": "pt"}))
