"""Attention over a slide as a picture: the slide, and on it where attention lies, tile by tile."""

import base64
import io as memory

import numpy as np
from PIL import Image, ImageDraw

# Anchors of a scale from dark violet over red to yellow, which grows lighter all the way: it is read without colours.
SCALE = np.array([(20, 11, 52), (101, 21, 110), (186, 54, 85), (242, 115, 35), (252, 231, 110)], np.float64)
SHADE = 0.55  # how much of a tile's colour is attention


def ranks(attention: np.ndarray) -> np.ndarray:
    """Attention `[n]` as the share of tiles that have less, 0 to 1: a few large weights leave the rest visible."""
    attention = np.asarray(attention, np.float64)
    order = np.argsort(np.argsort(attention, kind="stable"), kind="stable")
    return order / max(1, len(attention) - 1)


def colours(shares: np.ndarray) -> np.ndarray:
    """uint8 `[n, 3]` of shares from 0 to 1."""
    place = np.clip(shares, 0, 1) * (len(SCALE) - 1)
    return (
        np.stack([np.interp(place, np.arange(len(SCALE)), SCALE[:, k]) for k in range(3)], axis=1)
        .round()
        .astype(np.uint8)
    )


def draw(
    thumbnail: Image.Image, places: np.ndarray, side: int, size: tuple[int, int], attention: np.ndarray,
    marked: np.ndarray | None = None,
) -> Image.Image:  # fmt: skip
    """The slide with its tiles coloured by the rank of their attention.

    Args:
      thumbnail: of the slide.
      places: left and upper edges of the tiles, `[n, 2]`, px of the largest level.
      side: of a tile, px there.
      size: of the slide, px there.
      attention: `[n]`.
      marked: bool `[n]`, tiles that get a frame: those known to matter.
    """
    picture = thumbnail.convert("RGB")
    scale = np.array(picture.size) / np.array(size)
    corners = np.concatenate([places * scale, (places + side) * scale], axis=1).round().astype(int)
    layer = picture.copy()
    paint = ImageDraw.Draw(layer)
    for (left, upper, right, lower), colour in zip(corners.tolist(), colours(ranks(attention)).tolist()):
        paint.rectangle((left, upper, max(left, right - 1), max(upper, lower - 1)), fill=tuple(colour))
    picture = Image.blend(picture, layer, SHADE)
    paint = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 250))
    for (left, upper, right, lower), mark in zip(corners.tolist(), [] if marked is None else marked.tolist()):
        if mark:
            paint.rectangle((left, upper, right - 1, lower - 1), outline=(0, 200, 255), width=width)
    return picture


def embedded(picture: Image.Image, longest: int = 640) -> str:
    """A data URI, the longer side at most `longest` px."""
    small = picture.convert("RGB")
    small.thumbnail((longest, longest))
    stream = memory.BytesIO()
    small.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
