"""The report's data, checked and arranged: which models, which sets, which number for both."""

import base64
import dataclasses
import io as memory
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from mmkd_jax.errors import InputError, near
from mmkd_jax.evals import results
from mmkd_jax.evals.summary import MEAN

FIELDS = {
    "title": str, "headline": str, "lede": str, "rows": list, "models": list, "highlight": str, "datasets": list,
    "comparisons": list, "calibration": list, "cases": list, "differences": list, "curves": dict,
    "curve_metrics": list, "timings": list, "examples": list, "questions": list, "vqa": list, "provenance": dict,
    "notes": list,
}  # fmt: skip
MODELS = ("student", "control", "teacher")  # what can be the best
KINDS = (*MODELS, "reference")
SHAPES = {
    "student": ("circle", "square", "triangle", "pentagon", "diamond"),
    "control": ("cross", "square", "triangle", "bar"),
}
_IMAGE = re.compile(r"data:image/(jpeg|png);base64,[A-Za-z0-9+/]+=*")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as it is shown; `style` is the class of its colour and `shape` that of its mark."""

    name: str
    label: str
    kind: str
    style: str = "t"
    shape: str = ""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set as it is shown."""

    name: str
    label: str
    detail: str = ""


class Board:
    """What the sections ask for.

    Raises:
      InputError: an unknown field, a field of another type, rows off the results' schema, an unknown model or set.
    """

    def __init__(self, data: Mapping[str, Any]):
        for name, value in data.items():
            if name not in FIELDS:
                raise InputError(f"the report has no field {name!r}; {near(name, FIELDS)}")
            if not isinstance(value, FIELDS[name]) and not (FIELDS[name] is list and isinstance(value, tuple)):
                raise InputError(f"the report's field {name!r} must be a {FIELDS[name].__name__}")
        self.data = data
        self.rows = results.check(data.get("rows", ()))
        self._index: dict[tuple, dict] = {}
        for row in self.rows:
            self._index.setdefault((row["task"], row["metric"], row["dataset"], row["model"]), row)
        models = self._models()
        lead = self._lead(models)
        self.models = _styled(models, lead)
        self.highlight = next((model for model in self.models if model.name == lead), None)

    def get(self, task: str, metric: str, dataset: str, model: str) -> dict | None:
        """One result row, or None; of several prompt profiles the first."""
        return self._index.get((task, metric, dataset, model))

    def datasets(self, task: str, metric: str) -> list[Dataset]:
        """The sets that have this number, the mean over sets first, the others as the data orders them."""
        names = list(dict.fromkeys(r["dataset"] for r in self.rows if r["task"] == task and r["metric"] == metric))
        order = [record["name"] for record in self.data.get("datasets", ())]
        names.sort(key=lambda name: (name != MEAN, order.index(name) if name in order else len(order)))
        return [self._dataset(name, task, metric) for name in names]

    def chance(self, task: str, dataset: str) -> float | None:
        """Balanced accuracy of guessing: one over the number of classes."""
        for row in self.rows:
            if row["task"] == task and row["dataset"] == dataset and row["context"].get("classes"):
                return 1 / row["context"]["classes"]
        return None

    def kind(self, *kinds: str) -> list[Model]:
        """The models of these kinds, in order."""
        return [model for model in self.models if model.kind in kinds]

    def best(self, task: str, metric: str, dataset: str, *kinds: str, lowest: bool = False) -> dict | None:
        """The best row among models of these kinds (all by default), the first among equals."""
        models = self.kind(*kinds) if kinds else self.models
        rows = [self.get(task, metric, dataset, model.name) for model in models]
        rows = [row for row in rows if row]
        return (min if lowest else max)(rows, key=lambda row: row["value"]) if rows else None

    def label(self, model: str) -> str:
        """How a model is called."""
        return next((m.label for m in self.models if m.name == model), model)

    def _models(self) -> list[Model]:
        names = list(dict.fromkeys(row["model"] for row in self.rows))
        records = [dict(record) for record in self.data.get("models", ())]
        for record in records:
            if not {"name"} <= set(record) <= {"name", "label", "kind"} or record.get("kind", "student") not in KINDS:
                raise InputError(f"model {record} must have a name, and may have a label and a kind of {KINDS}")
        listed = {record["name"] for record in records}
        records += [{"name": name} for name in names if name not in listed]
        models = []
        for record in (record for record in records if record["name"] in names):
            name = record["name"]
            kind = record.get("kind") or ("teacher" if name.startswith("teacher:") else "student")
            models.append(Model(name, record.get("label") or name.removeprefix("teacher:"), kind))
        return models

    def _lead(self, models: list[Model]) -> str | None:
        """Name of the model that the page is about."""
        name, names = self.data.get("highlight"), [model.name for model in models]
        if name and name not in names:
            raise InputError(f"the highlighted model {name!r} has no rows; {near(name, names)}")
        students = [model.name for model in models if model.kind == "student"]
        return name or (students or names or [None])[-1]

    def _dataset(self, name: str, task: str, metric: str) -> Dataset:
        for record in self.data.get("datasets", ()):
            if record["name"] == name:
                return Dataset(name, record.get("label") or name, record.get("detail") or self._detail(name, task))
        if name == MEAN:
            row = next(r for r in self.rows if (r["dataset"], r["task"], r["metric"]) == (MEAN, task, metric))
            sets = len(row["context"].get("datasets", ()))
            return Dataset(name, f"Mean of {sets} sets" if sets else "Mean", "each set counts alike")
        return Dataset(name, name.replace("_", " "), self._detail(name, task))

    def _detail(self, name: str, task: str) -> str:
        row = next(r for r in self.rows if r["dataset"] == name and r["task"] == task)
        classes, modality = row["context"].get("classes"), row["context"].get("modality")
        means = [r for r in self.rows if r["dataset"] == MEAN and r["task"] == task]
        beside = means and name not in means[0]["context"].get("datasets", [name])
        size = f"{classes} classes" if classes else None
        parts = [modality, size, f"n = {row['n']}", "not in the mean" if beside else None]
        return ", ".join(part for part in parts if part)


def _styled(models: list[Model], lead: str | None) -> list[Model]:
    """The models with a colour and a mark each; the highlighted one has the first of both."""
    students = sorted((m.name for m in models if m.kind == "student"), key=lambda name: name != lead)
    controls = [m.name for m in models if m.kind == "control"]
    looks = {name: (f"s{k % 5}", SHAPES["student"][k % 5]) for k, name in enumerate(students)}
    looks |= {name: ("c", SHAPES["control"][k % 4]) for k, name in enumerate(controls)}
    plain = ("t", "")
    return [dataclasses.replace(m, **dict(zip(("style", "shape"), looks.get(m.name, plain)))) for m in models]


def picture(uri: str) -> str:
    """`uri`, proven to be an embedded JPEG or PNG.

    Raises:
      InputError: it is anything else, such as a link to somewhere.
    """
    if not isinstance(uri, str) or not _IMAGE.fullmatch(uri):
        raise InputError("a report's picture must be an embedded data:image/jpeg or data:image/png URI")
    return uri


def thumbnail(image: Image.Image, size: int = 160) -> str:
    """A PIL image as a small JPEG data URI, its longer side at most `size` pixels."""
    small = image.convert("RGB")
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = memory.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
