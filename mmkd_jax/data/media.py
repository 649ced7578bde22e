"""Encoded pictures as bytes: what they are, and how metadata comes off without touching a pixel.

JPEG segments: ITU-T T.81 annex B. PNG chunks: the W3C's PNG specification, section 11.
"""

import io as std_io
import re
import struct

from PIL import Image

from mmkd_jax.errors import InputError

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Everything that decides about pixels: critical chunks, transparency and colour.
_PNG_KEPT = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD")
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # after entropy-coded data; stuffed zeros and restarts are data


def strip(data: bytes) -> tuple[bytes, str]:
    """Removes EXIF, XMP, IPTC, comments, time stamps and anything after the picture's end.

    Args:
      data: a JPEG or PNG file.

    Returns:
      A file with the same pixels, and its codec, `jpeg` or `png`.

    Raises:
      InputError: it is neither, or its structure is broken.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _strip_jpeg(data), "jpeg"
        if data.startswith(_PNG_MAGIC):
            return _strip_png(data), "png"
    except struct.error as error:
        raise InputError("the picture is cut off") from error
    raise InputError("the picture is neither JPEG nor PNG; give a longest side (--max-side) to convert it")


def shrink(image: Image.Image, max_side: int, jpeg_above: int = 256) -> tuple[bytes, str]:
    """Re-encodes a picture whose longer side is at most `max_side` px: JPEG of quality 95, PNG if it is small.

    Args:
      image: the decoded picture.
      max_side: longest side afterwards; never enlarges.
      jpeg_above: a picture whose longer side is at most this is stored without loss.

    Returns:
      The file and its codec.
    """
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    scale = max_side / max(image.size)
    if scale < 1:
        image = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.BICUBIC)
    codec = "png" if max(image.size) <= jpeg_above else "jpeg"
    buffer = std_io.BytesIO()
    image.save(buffer, codec, **({"quality": 95, "subsampling": 0} if codec == "jpeg" else {}))
    return buffer.getvalue(), codec


def _strip_jpeg(data: bytes) -> bytes:
    parts, at = [data[:2]], 2
    while at < len(data):
        if data[at] != 0xFF:
            raise InputError("the picture is a damaged JPEG")
        if at + 1 == len(data):
            raise InputError("the picture is cut off")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xD9:
            return b"".join((*parts, b"\xff\xd9"))
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        if _jpeg_kept(marker, data[at + 4 : at + 16]):
            parts.append(data[at:end])
        at = end
        if marker == 0xDA:
            found = _NEXT_MARKER.search(data, at)
            at = found.start() if found else len(data)
            parts.append(data[end:at])
    return b"".join(parts)  # no end marker: left to the decoder to judge


def _jpeg_kept(marker: int, start: bytes) -> bool:
    if marker == 0xFE or not 0xE0 <= marker <= 0xEF:
        return marker != 0xFE
    colour_profile = marker == 0xE2 and start.startswith(b"ICC_PROFILE")
    return (
        colour_profile
        or (marker == 0xE0 and start.startswith(b"JFIF"))
        or (marker == 0xEE and start.startswith(b"Adobe"))
    )


def _strip_png(data: bytes) -> bytes:
    parts, at = [_PNG_MAGIC], 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in _PNG_KEPT:
            parts.append(data[at : at + 12 + length])
        at += 12 + length
        if kind == b"IEND":
            return b"".join(parts)
    raise InputError("the picture is a PNG that is cut off")
