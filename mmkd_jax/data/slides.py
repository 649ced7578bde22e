"""Slides cut into tiles: folders of tiles, or whole-slide images by OpenSlide (extra `wsi`).

A tile is known by its place: the left and upper edge, in pixels of the slide's largest level. A folder's tiles carry it
in their names, as the last two numbers (`NAME_x1024_y512.jpg`, `1024_512.png`); without two numbers in every name they
lie in rows of one square, in the order of their names.
"""

import dataclasses
import importlib
import math
import os
import re
from collections.abc import Iterator

import numpy as np
from etils import epath
from PIL import Image

from mmkd_jax import io, preprocess
from mmkd_jax.errors import InputError

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
WHOLE = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".bif", ".vsi")
THUMBNAIL = 1024  # px of a slide's longer side, for its tissue and its picture
TISSUE = 0.3  # share of a tile that is tissue, below which it is left out


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """A slide's tiles.

    Attributes:
      name: of the slide.
      places: left and upper edges, int64 `[n, 2]`, px of the largest level.
      side: of a tile, px there.
      size: width and height of the slide, px there.
    """

    name: str
    places: np.ndarray
    side: int
    size: tuple[int, int]

    def pictures(self) -> Iterator[Image.Image]:
        """The tiles in order, RGB."""
        raise NotImplementedError

    def thumbnail(self) -> Image.Image:
        """The slide at `THUMBNAIL` px at most, or a picture of its tiles in their places."""
        scale = min(1.0, THUMBNAIL / max(self.size))
        sheet = Image.new("RGB", [max(1, round(side * scale)) for side in self.size], "white")
        for place, picture in zip(self.places, self.pictures()):
            corners = [round(v * scale) for v in (*place, *(place + self.side))]
            small = picture.resize((max(1, corners[2] - corners[0]), max(1, corners[3] - corners[1])))
            sheet.paste(small, (corners[0], corners[1]))
        return sheet


@dataclasses.dataclass(frozen=True, eq=False)
class Folder(Tiles):
    """Tiles as pictures in a folder: `files` in the order of `places`."""

    files: tuple[epath.Path, ...] = ()

    def pictures(self) -> Iterator[Image.Image]:
        """See `Tiles`."""
        for path in self.files:
            try:
                yield preprocess.decode(path.read_bytes()).convert("RGB")
            except InputError as error:
                raise InputError(f"{path}: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Whole(Tiles):
    """Tissue of a whole-slide image: tiles of `pixels` px a side, read from level `level` and made that size."""

    path: str = ""
    level: int = 0
    pixels: int = 256

    def pictures(self) -> Iterator[Image.Image]:
        """See `Tiles`."""
        with _opened(self.path) as slide:
            side = max(1, round(self.side / slide.level_downsamples[self.level]))
            for x, y in self.places.tolist():
                yield _rgb(_guarded(self.path, slide.read_region, (x, y), self.level, (side, side))).resize(
                    (self.pixels, self.pixels), Image.Resampling.BILINEAR
                )

    def thumbnail(self) -> Image.Image:
        """See `Tiles`."""
        with _opened(self.path) as slide:
            return _small(self.path, slide)


def open_slide(path: str | os.PathLike, *, magnification: float = 20.0, pixels: int = 256) -> Tiles:
    """The tiles of a slide: of a folder, or of the tissue in a whole-slide image.

    Args:
      path: folder of pictures, or a file that OpenSlide reads.
      magnification: of the objective at which a whole slide is cut.
      pixels: side of its tiles at that magnification.

    Raises:
      InputError: it is not there, is neither, cannot be read, says no magnification, or holds no tile.
    """
    path = io.as_path(path)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise InputError(f"there is no slide {path}; leave it out of the table, or see where slides lie")
    if path.suffix.lower() not in WHOLE:
        raise InputError(f"{path} is no slide: a folder of pictures, or one of {', '.join(WHOLE)}")
    return _whole(os.fspath(path), magnification, pixels)


def tissue(thumbnail: np.ndarray) -> np.ndarray:
    """Where a slide's picture `[h, w, 3]` uint8 shows tissue, bool `[h, w]`.

    Stains are coloured, glass is not: Otsu's threshold (IEEE Trans. SMC 9(1), 1979) on saturation, at least 15 of 255,
    and not black, as outside of what was scanned.
    """
    rgb = thumbnail.astype(np.int64)
    brightest, darkest = rgb.max(axis=-1), rgb.min(axis=-1)
    saturation = (255 * (brightest - darkest) // np.maximum(brightest, 1)).astype(np.int64)
    return (saturation > max(15, _otsu(saturation))) & (brightest > 30)


def _otsu(values: np.ndarray) -> int:
    """The threshold that parts 0 to 255 in two classes of the largest variance between them."""
    share = np.bincount(values.ravel(), minlength=256) / values.size
    below, mean = np.cumsum(share), np.cumsum(share * np.arange(256))
    between = np.divide(
        (mean[-1] * below - mean) ** 2, below * (1 - below), out=np.zeros(256), where=below * (1 - below) > 1e-12
    )
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return int(best[len(best) // 2]) if between.max() > 0 else 0


def _folder(path: epath.Path) -> Folder:
    files = sorted((one for one in path.iterdir() if one.suffix.lower() in PICTURES), key=lambda one: one.name)
    if not files:
        raise InputError(f"{path} holds no picture ({', '.join(PICTURES)}); a slide's folder holds its tiles")
    try:
        side = max(preprocess.decode(files[0].read_bytes()).size)
    except InputError as error:
        raise InputError(f"{files[0]}: {error}") from error
    found = [re.findall(r"\d+", one.stem)[-2:] for one in files]
    places = np.array(found, np.int64) if all(len(one) == 2 for one in found) else np.zeros((0, 2), np.int64)
    if len(np.unique(places, axis=0)) < len(files):  # no places in the names
        across = math.isqrt(len(files) - 1) + 1
        places = side * np.stack([np.arange(len(files)) % across, np.arange(len(files)) // across], axis=1)
    elif (places < len(files) + 1).all():  # columns and rows, not pixels
        places = places * side
    size = (places.max(axis=0) + side).tolist()
    return Folder(path.name, places, side, (size[0], size[1]), tuple(files))


def _whole(path: str, magnification: float, pixels: int) -> Whole:
    with _opened(path) as slide:
        side = round(pixels * _objective(path, slide) / magnification)
        level = slide.get_best_level_for_downsample(side / pixels * 1.01)
        small = np.asarray(_small(path, slide))
        scale = small.shape[1] / slide.dimensions[0]
        width, height = slide.dimensions
    covered = np.pad(np.cumsum(np.cumsum(tissue(small), axis=0), axis=1), ((1, 0), (1, 0)))
    places = []
    for y in range(0, height - side + 1, side):
        upper = min(round(y * scale), small.shape[0] - 1)
        lower = min(max(round((y + side) * scale), upper + 1), small.shape[0])
        for x in range(0, width - side + 1, side):
            left = min(round(x * scale), small.shape[1] - 1)
            right = min(max(round((x + side) * scale), left + 1), small.shape[1])
            inside = covered[lower, right] - covered[upper, right] - covered[lower, left] + covered[upper, left]
            if inside >= TISSUE * (right - left) * (lower - upper):
                places.append((x, y))
    if not places:
        raise InputError(f"{path}: no tile of {side} px shows tissue; look at the slide, or leave it out")
    name = epath.Path(path).stem
    return Whole(name, np.array(places, np.int64), side, (width, height), path, level, pixels)


def _objective(path: str, slide) -> float:
    """Magnification of the largest level: as the file says, or from its microns a pixel (0.25 at 40)."""
    said = slide.properties
    for name, factor in (("openslide.objective-power", None), ("openslide.mpp-x", 10.0)):
        try:
            return float(said[name]) if factor is None else factor / float(said[name])
        except (KeyError, ValueError, ZeroDivisionError):
            continue
    resolution = _resolution(said)
    if resolution:
        return 10.0 / resolution
    raise InputError(f"{path} says neither its magnification nor its microns a pixel; cut it into tiles another way")


def _resolution(said) -> float | None:
    """Microns a pixel by the resolution tags of a plain TIFF."""
    unit = {"centimeter": 10000.0, "inch": 25400.0}.get(said.get("tiff.ResolutionUnit", ""))
    try:
        return unit / float(said["tiff.XResolution"]) if unit else None
    except (KeyError, ValueError, ZeroDivisionError):
        return None


def _library(path: str):
    """OpenSlide, an extra."""
    try:
        return importlib.import_module("openslide")
    except ImportError as error:
        raise InputError(f"{path} needs OpenSlide; install the extra `wsi`, or give folders of tiles") from error


def _opened(path: str):
    openslide = _library(path)
    try:
        return openslide.OpenSlide(path)
    except (openslide.OpenSlideError, OSError) as error:
        raise InputError(f"{path} is no slide that can be read ({error}); copy it again or leave it out") from error


def _guarded(path: str, read, *args):
    """OpenSlide's answer; a damaged tile is wrong input."""
    try:
        return read(*args)
    except _library(path).OpenSlideError as error:
        raise InputError(f"{path} is damaged ({error}); copy it again or leave it out") from error


def _small(path: str, slide) -> Image.Image:
    return _rgb(_guarded(path, slide.get_thumbnail, (THUMBNAIL, THUMBNAIL)))


def _rgb(picture: Image.Image) -> Image.Image:
    """On white where there is nothing."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    sheet = Image.new("RGB", picture.size, "white")
    sheet.paste(picture, mask=picture.getchannel("A"))
    return sheet
