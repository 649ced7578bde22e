"""The embedded source: real medical pictures that ordinary Python packages carry, so that nothing is downloaded.

The extra `demo` installs the packages (pydicom and pydicom-data: CT, MRI, X-ray, ultrasound; nibabel: brain MRI;
scikit-image: immunohistochemistry, fundus; mahotas: fluorescence). There are 15 pictures, volumes or clips, cut
here into about a thousand crops of 128 px, each with captions made from what is known of the picture: modality, body
part, view, place of the crop in the picture. No patient data is read, and burnt-in text is cut away.

It is enough to show that everything runs, not to judge quality. Most classes are crops of one picture, hence of one
patient: train and test are disjoint regions of it (disjoint frames of a clip, distant slices of a volume), and only
head CT is split by picture. Groups are parts of a picture; crops at the border of two parts overlap. A model that does
well here has learned to tell a dozen pictures apart.
"""

import importlib.resources
import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from mmkd_jax.data.sources import SourceRecord
from mmkd_jax.data.sources.pictures import PICTURES, Box, Picture
from mmkd_jax.errors import InputError

MADE = "crops of a few real pictures that Python packages carry; shows that everything runs, says nothing of quality"
SIZE = 128  # pixels a side of every crop as stored
LIMIT = {"train": 48, "test": 16}  # crops of one class and picture
_FLAT = 6.0  # grey levels: a crop with less standard deviation shows nothing

_PHRASES = {
    "xray": "X-ray",
    "ct": "CT slice",
    "mri": "MRI slice",
    "ultrasound": "Ultrasound",
    "histopathology": "Histopathology",
    "microscopy": "Fluorescence microscopy",
    "fundus": "Colour fundus photograph",
}


def records(inputs: Sequence[str] = ()) -> Iterator[SourceRecord]:
    """The crops, always the same in the same order: picture by picture, train before test.

    Raises:
      InputError: `inputs` is not empty, or a package of the extra `demo` is missing.
    """
    if inputs:
        raise InputError(f"the source 'sample' makes its own pairs and takes no input, not {inputs[0]!r}")
    names = classes()
    for picture in PICTURES:
        with _path(picture) as path:
            frames = picture.read(str(path))
        for split in picture.boxes:
            for number, (label, frame, box) in enumerate(_chosen(picture, frames, split)):
                where = _where(frames[frame].shape, box)
                yield SourceRecord(
                    key=f"{picture.name}-{split}-{number:03d}",
                    image=_encode(frames[frame], box),
                    captions=_captions(picture, label, where, box),
                    source=picture.source,
                    split=split,
                    modality=picture.modality,
                    label=label,
                    label_id=names[picture.source].index(label) if label else -1,
                    group=f"{picture.name}-{split}-{where}",
                    license=picture.license,
                    article=picture.article,
                    extra={"picture": picture.name, "frame": frame, "box": list(box)},
                )


def classes(inputs: Sequence[str] = ()) -> dict[str, list[str]]:
    """Class names of the labelled sets, in order of `label_id`."""
    del inputs
    fixed = {source: set() for source in ("sample_radiology", "sample_ultrasound")}
    for picture in PICTURES:
        if picture.source in fixed:
            fixed[picture.source].add(picture.label)
    return {
        **{source: sorted(labels) for source, labels in fixed.items()},
        "sample_microscopy": ["fluorescent cell nuclei", "immunostained epithelium", "immunostained stroma"],
        "sample_retina": ["macula", "optic disc", "peripheral retina"],
    }


def _path(picture: Picture):
    """Context manager that gives the picture's file."""
    try:
        file = importlib.resources.files(picture.package) / picture.file
    except ModuleNotFoundError as error:
        raise InputError(
            f"the embedded pictures need the extra 'demo' ({picture.package} is missing): bash launch/setup.sh demo"
        ) from error
    if not file.is_file():
        raise InputError(f"the installed package {picture.package} has no {picture.file}; set up 'demo' anew")
    return importlib.resources.as_file(file)


def _chosen(picture: Picture, frames: list[np.ndarray], split: str) -> list[tuple[str, int, Box]]:
    """(class, frame, box) of the crops of one split: at most `LIMIT` a class, evenly over all that show something."""
    found: dict[str, list[tuple[str, int, Box]]] = {}
    for frame in picture.frames[split]:
        for region in picture.boxes[split]:
            for box in _tiles(region, picture.sizes):
                crop = frames[frame][box[1] : box[3], box[0] : box[2]]
                if _grey(crop[::4, ::4]).std() < _FLAT:
                    continue
                label = picture.label if isinstance(picture.label, str) else picture.label(crop, box)
                found.setdefault(label, []).append((label, frame, box))
    chosen = []
    for label in sorted(found):
        count = min(LIMIT[split], len(found[label]))
        chosen += [found[label][i] for i in np.linspace(0, len(found[label]) - 1, count).round().astype(int)]
    return chosen


def _grey(crop: np.ndarray) -> np.ndarray:
    return crop.mean(axis=2) if crop.ndim == 3 else crop


def _tiles(region: Box, sizes: Sequence[int]) -> Iterator[Box]:
    """Boxes of each size inside `region`, two thirds overlapping, from corner to corner."""
    left, top, right, bottom = region
    for size in sizes:
        if size > min(right - left, bottom - top):
            continue
        columns, rows = (max(1, round(3 * (span - size) / size) + 1) for span in (right - left, bottom - top))
        for y in np.linspace(top, bottom - size, rows).astype(int).tolist():
            for x in np.linspace(left, right - size, columns).astype(int).tolist():
                yield x, y, x + size, y + size


def _encode(frame: np.ndarray, box: Box) -> bytes:
    file = io.BytesIO()
    crop = np.ascontiguousarray(frame[box[1] : box[3], box[0] : box[2]])
    Image.fromarray(crop).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def _where(shape: Sequence[int], box: Box) -> str:
    """Place of a crop in its picture, "upper left" to "lower right"."""
    x, y = (box[0] + box[2]) / 2 / shape[1], (box[1] + box[3]) / 2 / shape[0]
    return f"{('upper', 'middle', 'lower')[int(y * 3)]} {('left', 'centre', 'right')[int(x * 3)]}"


def _captions(picture: Picture, label: str, where: str, box: Box) -> tuple[str, str]:
    """One caption that says what and where, one that names class and modality."""
    view = "close" if box[2] - box[0] == min(picture.sizes) else "wide"
    shown = f", showing {label}" if label and not isinstance(picture.label, str) else ""
    return (
        f"{picture.subject}{shown}: {view} view of the {where} part.",
        f"{_PHRASES[picture.modality]}, {label or 'detail'}, {where}.",
    )
