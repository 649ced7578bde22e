"""Described sets of slides with a diagnosis: where each slide or its tiles or features lie, and whose it is.

A layout has the source `slides`, and either a table (`mmkd_jax.evals.set_tables`) with

    columns  theirs by ours: slide, label, and where they are there patient, split
    bag      path of a slide: a whole-slide image, a folder of tiles or a feature file, with columns in braces
             ("train_images/{image_id}.tiff")

or files whose paths say all:

    files    paths of slides with * ("training/*/*.tif")
    label    regular expression that finds the class in a path: its first group, or all that matched
    split    the same for the split

and for both `patient`, an expression that finds the patient in the slide's name or path where no column says it. The
labels are words of the record's classes; a slide whose label means none of them ("") is left out.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from mmkd_jax import io
from mmkd_jax.data import splits
from mmkd_jax.data.sources import Skipped
from mmkd_jax.data.sources.named import found as found_in
from mmkd_jax.errors import InputError
from mmkd_jax.evals import set_tables, sets
from mmkd_jax.evals.set_tables import text


@dataclasses.dataclass(frozen=True)
class Slide:
    """A slide with its diagnosis.

    Attributes:
      slide: its name, unique in the set.
      patient: slides of one are never divided between splits that are made; the slide where nothing is said.
      label: number of its class in the record's list.
      split: `train`, `val`, `test`.
      path: of the slide's image, folder of tiles or feature file.
    """

    slide: str
    patient: str
    label: int
    split: str
    path: str


def read(record: sets.SetRecord, root: str) -> Iterator[Slide | Skipped]:
    """The slides of a set, in the order of its files; one that is not there is `Skipped`.

    Raises:
      InputError: a file or column is missing, a label is none of the classes, or a slide comes twice.
    """
    found: list[Slide | Skipped] = []
    seen = set()
    for told in _of_files(record, root) if "files" in record.layout else _of_table(record, root):
        if told.slide in seen:
            raise InputError(f"set {record.name}: the slide {told.slide!r} comes twice")
        seen.add(told.slide)
        try:
            label = record.classes.number(told.word)
        except InputError as error:
            raise InputError(f"set {record.name}, slide {told.slide}: {error}") from error
        if label >= 0:
            one = Slide(told.slide, told.patient or told.slide, label, told.split or "train", str(told.path))
            found.append(one if told.path.exists() else Skipped(one.slide, f"{one.path} is not there"))
    if record.split:
        known = [one for one in found if isinstance(one, Slide)]
        made = splits.by_group(record.name, [o.patient for o in known], [(o.label,) for o in known], record.split)
        by_name = dict(zip((one.slide for one in known), made))
        found = [dataclasses.replace(o, split=by_name[o.slide]) if isinstance(o, Slide) else o for o in found]
    yield from found


class _Told(NamedTuple):
    """What the files say of a slide; `word` is its label."""

    slide: str
    patient: str
    word: str
    split: str
    path: epath.Path


def _of_table(record: sets.SetRecord, root: str) -> Iterator[_Told]:
    pattern = record.layout.get("patient", "")
    for row in sets.table_rows(record, root, ("slide", "label")):
        slide, path = text(row, "slide"), io.as_path(root) / set_tables.place(record.layout["bag"], row)
        word = text(row, "label")
        patient = text(row, "patient") or (found_in(pattern, slide, "patient") if _counts(record, word) else "")
        yield _Told(slide, patient, word, splits.plain(text(row, "split")), path)


def _counts(record: sets.SetRecord, word: str) -> bool:
    return record.classes.words.get(word) != ""


def _of_files(record: sets.SetRecord, root: str) -> Iterator[_Told]:
    folder, layout = io.as_path(root), record.layout
    if not folder.exists():
        raise InputError(f"set {record.name}: {folder} does not exist; give the folder that holds it")
    paths = sorted(folder.glob(layout["files"]), key=str)
    if not paths:
        raise InputError(f"set {record.name}: {folder} holds no {layout['files']}, which its layout says")
    for path in paths:
        key = path.relative_to(folder).as_posix()
        patient, word = (found_in(layout.get(name, ""), key, name) for name in ("patient", "label"))
        split = splits.plain(found_in(layout.get("split", ""), key, "split"))
        yield _Told(key, patient, word, split, path)
