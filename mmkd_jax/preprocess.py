"""From encoded pictures to what a tower takes. PIL resizes: published CLIPs were fed by its bicubic on uint8."""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmkd_jax.errors import InputError
from mmkd_jax.specs import Preprocess

MAX_PIXELS = 1 << 26  # of a picture; refused before it is decoded
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A loaded PIL picture from encoded bytes (JPEG, PNG, TIFF ...), in its own mode, without EXIF.

    Raises:
      InputError: the bytes are no picture, are damaged, or hold more than `max_pixels` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > max_pixels:
                raise InputError(f"a picture of {image.width} x {image.height} px exceeds the limit of {max_pixels} px")
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"not a readable picture ({error}); leave it out or write it again") from error
    image.info.pop("exif", None)
    return image


def eval_image(image: Image.Image, p: Preprocess) -> np.ndarray:
    """uint8 `[size, size, 3]`: shortest side to `size`, centre crop, RGB before or after as `p.rgb_first` says.

    Sizes and crop offsets round as torchvision's Resize and CenterCrop do: the longer side is truncated, the offset
    rounded to even.
    """
    image = eight_bits(image)
    image = image.convert("RGB") if p.rgb_first else image
    width, height = image.size
    short, long = min(width, height), max(width, height)
    scaled = int(p.size * long / short)
    size = (p.size, scaled) if width <= height else (scaled, p.size)
    image = image.resize(size, _FILTERS[p.interpolation]) if size != image.size else image
    left, top = round((size[0] - p.size) / 2), round((size[1] - p.size) / 2)
    return np.asarray(image.crop((left, top, left + p.size, top + p.size)).convert("RGB"))


def normalise(images: Any, p: Preprocess) -> Any:
    """uint8 `[..., 3]` to float32 `(x / 255 - mean) / std`, for NumPy and for jax arrays."""
    mean, std = np.asarray(p.mean, np.float32), np.asarray(p.std, np.float32)
    return (images.astype(np.float32) / np.float32(255) - mean) / std


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit and 32-bit greyscale scaled to 8 bits by the mode's full range; PIL would clip at 255 instead."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        return Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8), "L")
    if image.mode == "F":
        values = np.asarray(image, np.float32)
        low, high = float(values.min()), float(values.max())
        return Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8), "L")
    return image
