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

MAX_PIXELS = 1 << 26  # of a picture; refused before it is decoded
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in `data` (JPEG, PNG, TIFF, ...), loaded, of 8 bits a channel, without EXIF or comments.

    EXIF orientation is not applied, as the published preprocessing does not apply it.

    Args:
      data: encoded bytes.
      max_pixels: refuse larger pictures before decoding them.

    Raises:
      InputError: the data is damaged, not a picture, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > max_pixels:
                raise InputError(f"a picture of {width} x {height} px exceeds the limit of {max_pixels} px; shrink it")
            image.load()
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"a picture exceeds the limit of {max_pixels} px; shrink it") from error
    except Exception as error:  # PIL's decoders raise almost anything on damaged data
        raise InputError(f"not a readable picture ({error}); leave it out or write it again") from error
    plain = eight_bits(image).copy()
    plain.info = {key: image.info[key] for key in ("transparency",) if key in image.info}
    return plain


def eval_image(image: Image.Image, p: Preprocess) -> np.ndarray:
    """A square of `p.size` in RGB: uint8 `[size, size, 3]`; see `Preprocess` for how it becomes one.

    A palette picture is resized before it becomes RGB unless `p.rgb_first`, that is without interpolation, as
    open_clip does it. Transparency is dropped, or shows white if `p.rgb_first`, as in transformers 5.

    Raises:
      InputError: the picture is over a hundred times as long as wide.
    """
    image = eight_bits(image)
    if p.greyscale:
        image = image.convert("L")
    elif p.rgb_first:
        image = _on_white(image)
    short, long = sorted(image.size)
    if long > 100 * short:
        raise InputError(f"a picture of {image.width} x {image.height} px has no meaningful centre crop; leave it out")
    if p.frame == "square":
        image = _on_black(image, max(p.size, long))
    sides = tuple(p.size if side == min(image.size) else int(p.size * side / min(image.size)) for side in image.size)
    if sides != image.size:
        image = image.resize(sides, FILTERS[p.interpolation])
    # Where the rest is odd, torchvision rounds half to even and transformers rounds down.
    left, top = ((side - p.size) // 2 if p.rgb_first else round((side - p.size) / 2) for side in sides)
    return np.asarray(image.crop((left, top, left + p.size, top + p.size)).convert("RGB"), np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB, with what is transparent in white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _on_black(image: Image.Image, side: int) -> Image.Image:
    """The picture in the middle of a black square."""
    square = Image.new("L" if image.mode == "L" else "RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def normalise(images, p: Preprocess):
    """uint8 `[..., 3]` to float32 of the same shape, `(x / 255 - mean) / std`; NumPy and JAX arrays alike."""
    scaled = images.astype(np.float32) * np.float32(1 / 255)
    return (scaled - np.asarray(p.mean, np.float32)) / np.asarray(p.std, np.float32)


def eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits scaled to 8 bits, which PIL would cut at 255 instead; other pictures unchanged.

    Integers are scaled by the 16 bits' full range, floating point by the picture's own.
    """
    if image.mode.startswith("I"):
        return Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float32))
        low, high = float(values.min()), float(values.max())
        return Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
    return image
