"""From the bytes of a picture to a tower's input, as open_clip and transformers prepare it with PIL.

Resizing is PIL's on uint8, which is what the published models were given; other implementations of bicubic differ.
Sources: mlfoundations/open_clip `transform.py` (`image_transform`, resize mode `shortest`), torchvision's `Resize` and
`CenterCrop`, transformers' `CLIPImageProcessorPil`.
"""

import io
import warnings

import numpy as np
from PIL import Image

from mmkd_jax.errors import InputError
from mmkd_jax.specs import Preprocess

MAX_PIXELS = 64_000_000
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in `data` (JPEG, PNG, TIFF, ...), in memory and without EXIF or comments.

    Greyscale of 16 bits becomes 8 bits by its full range (65535 becomes 255): PIL would cut it at 255 later. EXIF
    orientation is not applied, as the published preprocessing does not apply it.

    Args:
      data: encoded bytes.
      max_pixels: refuse larger pictures before decoding them.

    Raises:
      InputError: the data is damaged or not a picture, too large, or has floating-point values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > max_pixels:
            raise InputError(f"a picture of {width} x {height} pixels is over the limit of {max_pixels}; shrink it")
        image.load()
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"a picture is over the limit of {max_pixels} pixels; shrink it") from error
    except Exception as error:  # PIL's decoders raise almost anything on damaged data
        raise InputError(f"cannot decode a picture ({error}); it is damaged or of an unknown kind") from error
    return _plain(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` as RGB, by PIL's rules (alpha is dropped)."""
    return image if image.mode == "RGB" else image.convert("RGB")


def eval_image(image: Image.Image, p: Preprocess) -> np.ndarray:
    """Shortest side to `p.size`, centre crop, RGB: uint8 `[size, size, 3]`.

    A palette picture is resized before it becomes RGB unless `p.rgb_first`, that is without interpolation, as
    open_clip does it.

    Raises:
      InputError: the picture is over a hundred times as long as wide.
    """
    if p.rgb_first:
        image = to_rgb(image)
    short, long = sorted(image.size)
    if long > 100 * short:
        raise InputError(f"a picture of {image.width} x {image.height} pixels has no meaningful centre crop")
    sides = tuple(p.size if side == short else int(p.size * side / short) for side in image.size)
    if sides != image.size:
        image = image.resize(sides, FILTERS[p.interpolation])
    # Where the rest is odd, torchvision rounds half to even and transformers rounds down.
    left, top = ((side - p.size) // 2 if p.rgb_first else round((side - p.size) / 2) for side in sides)
    return np.asarray(to_rgb(image.crop((left, top, left + p.size, top + p.size))), np.uint8)


def normalise(images, p: Preprocess):
    """uint8 `[..., 3]` to float32 of the same shape, `(x / 255 - mean) / std`; NumPy and JAX arrays alike."""
    scaled = images.astype(np.float32) * np.float32(1 / 255)
    return (scaled - np.asarray(p.mean, np.float32)) / np.asarray(p.std, np.float32)


def _plain(image: Image.Image) -> Image.Image:
    """Pixels, and what turning them into RGB needs, alone."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip((values + 128) // 257, 0, 255).astype(np.uint8))
    if image.mode == "F":
        raise InputError("a picture has floating-point values without a range; save it with 8 or 16 bits")
    plain = image.copy()
    plain.info = {key: image.info[key] for key in ("transparency",) if key in image.info}
    return plain
