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

WEIGHTS, UNIMED = "open_clip_model.safetensors", "unimed_clip.pt"
NAMES = (  # ours for UniMed-CLIP's code, open_clip's in its order, then what Hugging Face's older folders hold
    UNIMED,
    WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
SUFFIXES = (".safetensors", *pickles.SUFFIXES)
# PMC-CLIP's towers as they lie beside its training checkpoint: three files, and what their keys lack of its names. The
# third holds nothing but a matrix. None holds the logit scale, which is the one that github.com/HealthX-Lab/BiomedCoOp
# gives.
DIVIDED = {"image_encoder(resnet50).pth": "visual.", "text_encoder.pth": "text_encoder."}
FIRST, MATRIX, DIVIDED_SCALE = "image_encoder(resnet50).pth", "text_projection_layer.pth", 4.4292


def read_tensors(path: epath.Path) -> Tensors:
    """All tensors of a weights file, as they are stored; with the first of PMC-CLIP's three files those of all three.

    Raises:
      InputError: it is of another kind, damaged, or a pickle that asks to run code; or one of the three is missing.
    """
    if is_divided(path):
        return _read_divided(path.parent)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in pickles.SUFFIXES:
        return pickles.read(path)
    raise InputError(f"{path} ends in {path.suffix!r}; weights are read from {', '.join(SUFFIXES)}")


def is_divided(path: epath.Path) -> bool:
    """Whether a file is the first of the three that PMC-CLIP's towers lie in."""
    return path.name == FIRST


def identity(path: epath.Path) -> str:
    """SHA-256 of a weights file, or one for all three of PMC-CLIP's."""
    if not is_divided(path):
        return io.sha256_file(path)
    return io.hash_of({name: io.sha256_file(path.parent / name) for name in (*DIVIDED, MATRIX)})


def find_weights(folder: epath.Path) -> epath.Path:
    """The weights that open_clip would take from `folder`, the only ones in it, or the first of PMC-CLIP's three.

    Raises:
      InputError: there are none, or several under names of their own.
    """
    for name in NAMES:
        if (folder / name).exists():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    names = {path.name for path in found}
    if names & {FIRST, MATRIX} and names <= {*DIVIDED, MATRIX}:
        return folder / FIRST
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(path.name for path in found)
        raise InputError(f"{folder} holds several weights files ({several}); name the one you mean")
    raise InputError(f"{folder} holds no weights; expected {WEIGHTS} or another file {', '.join(SUFFIXES)}")


def holds_weights(folder: epath.Path) -> bool:
    """Whether a folder holds a weights file, under whatever name."""
    return any(child.suffix in SUFFIXES for child in folder.iterdir())


def write_tensors(path: epath.Path, tensors: Tensors) -> None:
    """Writes a safetensors file as torch's writers do."""
    contiguous = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
    io.write_bytes(path, save(contiguous, metadata={"format": "pt"}))


def _read_divided(folder: epath.Path) -> Tensors:
    """PMC-CLIP's three files under the names of its training checkpoint."""
    if missing := [name for name in (*DIVIDED, MATRIX) if not (folder / name).exists()]:
        raise InputError(f"PMC-CLIP's weights lie in three files, and {folder} lacks {', '.join(missing)}")
    tensors: Tensors = {"logit_scale": np.float32(DIVIDED_SCALE)}
    for name, prefix in DIVIDED.items():
        tensors |= {prefix + key.removeprefix("module."): t for key, t in pickles.read(folder / name).items()}
    return tensors | pickles.read(folder / MATRIX, alone="text_projection")


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
