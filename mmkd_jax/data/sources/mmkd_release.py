"""MMKD-CLIP's own data for stage 2, as published: `meta.jsonl`, and a folder a sample with picture and features.

Layout (github.com/wangshansong1/MMKD-CLIP, MMKDCLIP_DATA): a line of `meta.jsonl` holds `folderid`, `id`, `imgpath`,
`metapath`, `txt` and `available_clips`, the teachers that were kept. Beside the picture lie `clips_output.pt`
(`TEACHER_img` and `TEACHER_txt`, float32 at the teacher's own width and unit length) and `clips_project_output.pt` (the
same at 512, not of unit length). The features become feature shards with `mmkd_jax.data.released`.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from mmkd_jax import io
from mmkd_jax.data.sources import Skipped, SourceRecord
from mmkd_jax.errors import InputError

META, SOURCE = "meta.jsonl", "mmkd_release"
# BIOMEDICA's labels of pictures (arXiv 2501.07171) in our words; other labels stay as they are.
MODALITIES = {
    "computerized tomography": "ct",
    "magnetic resonance": "mri",
    "x-ray radiography": "xray",
    "ultrasound": "ultrasound",
    "endoscopy": "endoscopy",
    "immunohistochemistry": "histopathology",
    "light microscopy": "microscopy",
    "electron microscopy": "electron_microscopy",
    "optical coherence tomography": "oct",
    "eye": "fundus",
    "skin": "dermoscopy",
    "positron emission tomography": "pet",
    "mammography": "mammography",
}


class Line(NamedTuple):
    """A line of `meta.jsonl`: the sample's key, its paths below the folder, caption, and the teachers kept."""

    key: str
    folder: str
    picture: str
    metadata: str
    caption: str
    teachers: tuple[str, ...]


def records(inputs: Sequence[str]) -> Iterator[SourceRecord | Skipped]:
    """The pairs, in the order of the lines.

    Args:
      inputs: folders that hold `meta.jsonl`.

    Raises:
      InputError: one holds none.
    """
    for folder in folders(inputs):
        for line in lines(folder):
            yield line if isinstance(line, Skipped) else _record(folder, line)


def folders(inputs: Sequence[str]) -> list[epath.Path]:
    """The inputs as paths.

    Raises:
      InputError: there is none, or one holds no `meta.jsonl`.
    """
    if not inputs:
        raise InputError(f"{SOURCE} needs --input: folders with {META}")
    found = [io.as_path(given) for given in inputs]
    for folder in found:
        if not (folder / META).exists():
            raise InputError(f"{folder / META} does not exist; give the folder of the published samples")
    return found


def lines(folder: epath.Path) -> Iterator[Line | Skipped]:
    """The lines of a folder's `meta.jsonl`; a line that is not what it should be is `Skipped`."""
    with (folder / META).open("r") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield _line(text, number)


def inside(folder: epath.Path, relative: str) -> epath.Path | None:
    """A path that `meta.jsonl` names, which may come from anyone; None where it leads out of the folder."""
    parts = pathlib.PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts or "\0" in relative:
        return None
    return folder / relative


def _line(text: str, number: int) -> Line | Skipped:
    try:
        fields = json.loads(text)
        named = [fields[name] for name in ("folderid", "id", "imgpath", "metapath", "txt")]
        teachers = fields["available_clips"]
        if not all(isinstance(value, str) for value in (*named, *teachers)):
            raise TypeError("not text")
    except (ValueError, KeyError, TypeError) as error:
        return Skipped(f"line {number}", f"is no sample ({type(error).__name__}: {error})")
    group, name, picture, metadata, caption = named
    return Line(f"{group}/{name}", f"features/{group}/{name}", picture, metadata, caption, tuple(teachers))


def _record(folder: epath.Path, line: Line) -> SourceRecord | Skipped:
    picture = inside(folder, line.picture)
    if picture is None:
        return Skipped(line.key, "its picture is outside of the folder")
    try:
        image = picture.read_bytes()
    except OSError as error:
        return Skipped(line.key, f"its picture cannot be read: {error.strerror or 'not there'}")
    about = _about(inside(folder, line.metadata))
    return SourceRecord(
        key=line.key,
        image=image,
        captions=(line.caption,),
        source=SOURCE,
        modality=_modality(about),
        group=str(about.get("article_accession_id", "")),
        license=str(about.get("article_license", "")),
        article=str(about.get("article_accession_id", "")),
    )


def _about(path: epath.Path | None) -> dict[str, Any]:
    """A sample's metadata, {} where they are missing or damaged: the pair is whole without them."""
    if path is None or not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _modality(about: dict[str, Any]) -> str:
    """The first label that we have a word for, else the first label."""
    labels = [*_texts(about.get("image_secondary_label")), *_texts(about.get("image_primary_label"))]
    known = [word for label, word in MODALITIES.items() if label in labels]
    return (known or [label.replace(" ", "_") for label in labels] or ["unknown"])[0]


def _texts(value: Any) -> list[str]:
    """A label or a list of them, in small letters."""
    values = value if isinstance(value, list) else [value]
    return [text.lower() for text in values if isinstance(text, str)]
