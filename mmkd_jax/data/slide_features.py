"""Features of slides' tiles by an encoder, kept slide by slide, so that an interrupted run goes on with the others.

FOLDER/SLIDE.npy    float16 [tiles, width]
FOLDER/SLIDE.json   places of the tiles, their side, the slide's size, who made them; written last
FOLDER/SLIDE.jpg    a picture of the slide
"""

import io as memory
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from mmkd_jax import io
from mmkd_jax.data.slides import Tiles
from mmkd_jax.errors import InputError


def make(tiles: Tiles, encoder: Any, folder: str | os.PathLike, *, batch: int = 64) -> epath.Path:
    """Encodes a slide's tiles unless it is done; returns the file of features.

    Args:
      tiles: of `slides.open_slide`.
      encoder: with `name`, `identity` and `encode_image`, see `evals.base.Encoder`.
      folder: of the features of this encoder.
      batch: tiles at a time.

    Raises:
      InputError: a tile cannot be read, or a feature is not finite; or the folder has another encoder's features.
    """
    folder = io.as_path(folder)
    path, told = folder / f"{tiles.name}.npy", folder / f"{tiles.name}.json"
    made = {"encoder": encoder.name, "identity": encoder.identity, "side": tiles.side, "size": list(tiles.size),
            "places": tiles.places.tolist()}  # fmt: skip
    if told.exists():
        before = io.read_json(told)
        if before["identity"] != encoder.identity:
            raise InputError(f"{folder} holds features of {before['encoder']}; use another folder for {encoder.name}")
        if before == made:
            return path
    parts, pending = [], []
    for picture in tiles.pictures():
        pending.append(picture)
        if len(pending) == batch:
            parts.append(_encoded(encoder, pending, batch, tiles.name))
            pending = []
    if pending:
        parts.append(_encoded(encoder, pending, batch, tiles.name))
    stream = memory.BytesIO()
    np.save(stream, np.concatenate(parts))
    io.write_bytes(path, stream.getvalue())
    stream = memory.BytesIO()
    tiles.thumbnail().save(stream, "JPEG", quality=88)
    io.write_bytes(folder / f"{tiles.name}.jpg", stream.getvalue())
    io.write_json(told, made)
    return path


def _encoded(encoder: Any, pictures: Sequence[Image.Image], batch: int, name: str) -> np.ndarray:
    """Float16 `[n, width]`; the last batch is filled up, so that the encoder sees one shape."""
    filled = [*pictures, *[pictures[-1]] * (batch - len(pictures))]
    found = np.asarray(encoder.encode_image(filled), np.float32)[: len(pictures)]
    if not np.isfinite(found).all():
        raise InputError(f"{encoder.name} gave features that are not finite for slide {name}; its weights are damaged")
    return found.astype(np.float16)
