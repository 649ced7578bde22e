"""Described sets: one JSON record says how a set lies on disk, what is in it and how its classes are asked for.

A record of our own lies in `registry/`; a user's lies as `set.json` in the set's folder, or anywhere:

    {"name": "lesions", "layout": {"source": "csv", "input": "labels.csv", "image": "images/{image_id}.jpg",
                                   "columns": {"label": "dx", "group": "patient"}},
     "modality": "dermoscopy", "classes": {"mel": "melanoma", "nv": "melanocytic nevus"}, "split": {"test": 0.2},
     "prompts": {"templates": ["a photo of {}."], "synonyms": {"melanocytic nevus": ["mole"]}}}

`layout` names a source (`mmkd_jax.data.sources`; beside them `questions`, `patients` and `slides`, see `question_sets`,
`patient_sets` and `slide_sets`), its input below the root, and the source's options. `classes` is a list of names, or
an object from labels in the files to names; without it they are what the source says. `split` makes splits by group;
without it they are the layout's. What is known about a set further (`ABOUT`) is for people, and `evidence` says of each
field where it was seen, or that it is from memory.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.data import splits
from mmkd_jax.data.labels import Classes
from mmkd_jax.data.sources import About, Source, open_source
from mmkd_jax.errors import InputError, near
from mmkd_jax.evals import prompts, set_tables

ABOUT = ("title", "size", "url", "citation", "note", "paper")
# What a set of a task is good for, of the six types of task.
TASKS = {
    "classification": ("zero-shot classification", "linear probe"),
    "multilabel": ("zero-shot classification",),
    "retrieval": ("retrieval",),
    "vqa": ("VQA",),
    "survival": ("survival",),
    "diagnosis": ("diagnosis",),
}
TABLES = {"survival": "patients", "diagnosis": "slides"}  # sources of tables without pictures, see `table_rows`
_TABLE = ("columns", "where", "header", "separator")
_OPTIONS = {
    "patients": ("source", "input", *_TABLE, "events", "covariates", "unit", "bag", "slides"),
    "slides": ("source", "input", *_TABLE, "bag", "patient", "files", "label", "split"),
}
_QUESTIONS = "questions"
_TEXTS = ("name", "modality", "license", "title", "url", "citation", "note", "paper")


@dataclasses.dataclass(frozen=True)
class SetRecord:
    """A described set.

    Attributes:
      name: short name.
      layout: `source`, `input` (path or paths below the root, by default the root), and the source's options.
      task: `classification` (one class a picture), `multilabel` (several findings), `retrieval` (captions), `vqa`
        (questions), `survival` (patients and times), or `diagnosis` (slides and classes).
      modality: as in the templates of prompts: `xray`, `ct`, ...
      classes: class list, None as the source says.
      prompts: wording of the classes, {} for the modality's templates.
      split: fractions by split to make, {} as the layout has them.
      license: of the set.
      about: further fields of `ABOUT`; `size` is the number of pictures (questions, patients, slides) by split, and
        `paper` says how it is known that MMKD-CLIP (arXiv 2506.22567) was judged on the set.
      evidence: by field where it was seen, or "from memory"; `all` for those not named.
    """

    name: str
    layout: Mapping[str, Any]
    task: str = "classification"
    modality: str = ""
    classes: Classes | None = None
    prompts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    split: Mapping[str, float] = dataclasses.field(default_factory=dict)
    license: str = ""
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evidence: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def types(self) -> tuple[str, ...]:
        """Types of task that it is good for; without pictures to train on there is no probe."""
        tested_only = sum(self.split.values()) > 1 - 1e-9 or not self.about.get("size", {"train": 1}).get("train", 0)
        types = TASKS[self.task]
        return tuple(one for one in types if one != "linear probe" or not tested_only)

    def seen(self, field: str) -> str:
        """Where a field was seen, "from memory", or "ours"."""
        ours = field == "prompts" or (field == "split" and self.split)
        return self.evidence.get(field) or ("ours" if ours else self.evidence.get("all", ""))


def read(record: Any, where: str) -> SetRecord:
    """The set that a JSON object describes.

    Raises:
      InputError: an unknown or missing field, or one of the wrong form; says where.
    """
    own = [field.name for field in dataclasses.fields(SetRecord) if field.name != "about"]
    if not isinstance(record, Mapping):
        raise InputError(f"{where} does not hold an object that describes a set")
    for field in record:
        if field not in (*own, *ABOUT):
            raise InputError(f"{where}: there is no field {field!r}; {near(field, [*own, *ABOUT])}")
    for field in _TEXTS:
        if not isinstance(record.get(field, ""), str):
            raise InputError(f"{where}: {field} must be text")
    name, layout, task = record.get("name", ""), record.get("layout"), record.get("task", "classification")
    if not name or not name.isidentifier():
        raise InputError(f"{where}: the name {name!r} must be letters, digits and underscores")
    if not isinstance(layout, Mapping) or not isinstance(layout.get("source"), str):
        raise InputError(f'{where}: layout must be an object with the name of a source, {{"source": "folders"}}')
    if task not in TASKS:
        raise InputError(f"{where}: task {task!r} is unknown; {near(task, TASKS)}")
    _check_table(layout, task, where)
    classes = Classes.of(record["classes"], f"{where}, classes") if "classes" in record else None
    if task == "diagnosis" and classes is None:
        raise InputError(f"{where}: a diagnosis needs classes, an object from labels in the files to names")
    if classes is not None and len(classes.names) < 2 and task not in ("retrieval", "vqa"):
        raise InputError(f"{where}: {len(classes.names)} class names; at least two are needed")
    if record.get("prompts") and classes is not None:
        prompts.from_record(classes.names, record["prompts"], f"{where}, prompts")
    about = {field: record[field] for field in ABOUT if field in record}
    made = splits.check(record["split"], f"{where}, split") if record.get("split") else {}
    kept = {field: record[field] for field in own if field in record}
    return SetRecord(**{**kept, "classes": classes, "split": made, "about": about})


@functools.cache
def known() -> dict[str, SetRecord]:
    """The records of the registry by name."""
    found: dict[str, SetRecord] = {}
    for file in sorted((pathlib.Path(__file__).parent / "registry").glob("*.json")):
        for record in json.loads(file.read_text(encoding="utf-8")):
            one = read(record, f"{file.name}, {record.get('name')}")
            if one.name in found:
                raise InputError(f"{file.name}: the set {one.name!r} is there twice")
            found[one.name] = one
    return found


def find(name: str, root: str = "") -> SetRecord:
    """The record of that name: a JSON file, the `set.json` in `root` if it has the name, or the registry's.

    Raises:
      InputError: there is none.
    """
    if name.endswith(".json"):
        return read(io.read_json(name), name)
    if root and not io.as_path(root).exists():
        raise InputError(f"set {name}: {io.as_path(root)} does not exist; give the folder that holds it")
    own = io.as_path(root) / "set.json" if root else None
    record = read(io.read_json(own), str(own)) if own is not None and own.exists() else None
    if record is not None and record.name == name:
        return record
    if name in known():
        return known()[name]
    there = f", and {own} describes {record.name!r}" if record else f"; {own} would describe it" if own else ""
    raise InputError(f"no set {name!r} is known{there}; {near(name, known())}")


def open_set(record: SetRecord, root: str) -> Source:
    """The set below `root` as a source of pictures.

    Raises:
      InputError: `root` or the input below it does not exist, or the set has no pictures of its own.
    """
    if record.task in TABLES:
        raise InputError(f"set {record.name} is a table for {record.task}, not pictures; evaluate it in a suite")
    options = dict(record.layout)
    source, given = options.pop("source"), options.pop("input", "")
    source = "mmkd_jax.evals.question_sets" if source == _QUESTIONS else source
    opened = open_source(source, _inputs(record.name, root, given), **options)
    about = About(record.name, record.modality, record.license, _citation(record), record.classes, record.prompts)
    return dataclasses.replace(opened, about=dataclasses.replace(about, split=record.split))


def table_rows(record: SetRecord, root: str, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of the tables of a set of patients or slides, see `set_tables.Table.rows`.

    Raises:
      InputError: as `open_set`, and what the tables lack.
    """
    chosen = {name: record.layout[name] for name in _TABLE if name in record.layout}
    for path in set_tables.files(_inputs(record.name, root, record.layout.get("input", ""))):
        yield from set_tables.Table(path, **chosen).rows(needed)


def _check_table(layout: Mapping[str, Any], task: str, where: str) -> None:
    """Refuses a layout of pictures for a task on tables, the other way round, and unknown options of tables."""
    source = layout["source"]
    if source != TABLES.get(task) and (source in _OPTIONS or task in TABLES):
        wanted = f"must be {TABLES[task]!r}" if task in TABLES else "has no pictures"
        raise InputError(f"{where}: the source {source!r} is not for the task {task}: it {wanted}")
    for option in layout if source in _OPTIONS else ():
        if option not in _OPTIONS[source]:
            raise InputError(
                f"{where}: the source {source!r} has no option {option!r}; {near(option, _OPTIONS[source])}"
            )
    if layout.get("unit", "months") not in ("months", "days"):
        raise InputError(f"{where}: the unit of times must be months or days, not {layout['unit']!r}")
    if source == "slides" and ("bag" in layout) == ("files" in layout):
        raise InputError(f"{where}: layout needs either bag, the path of a slide with columns in braces, or files")


def _inputs(name: str, root: str, given: str | Sequence[str]) -> list[str]:
    folder = io.as_path(root)
    if not folder.exists():
        raise InputError(f"set {name}: {folder} does not exist; give the folder that holds it")
    return [_below(folder, path, name) for path in ([given] if isinstance(given, str) else given)]


def _below(folder, path: str, name: str) -> str:
    """The input at `path` below `folder`, which may have one `*` (`pathmnist*.npz`); or `folder` if that is a file."""
    if not path or not folder.is_dir():
        return str(folder)
    found = sorted(map(str, folder.glob(path))) if "*" in path else [str(folder / path)]
    if not found or not io.as_path(found[0]).exists():
        raise InputError(f"set {name}: {folder} holds no {path}, which its layout says")
    if len(found) > 1:
        raise InputError(f"set {name}: {folder} holds {len(found)} of {path}; give one of them instead: {found[0]}")
    return found[0]


def _citation(record: SetRecord) -> str:
    return str(record.about.get("citation") or record.about.get("url") or "")
