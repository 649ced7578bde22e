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
    "differences": list, "curves": dict, "curve_metrics": list, "timings": list, "examples": list, "provenance": dict,
    "notes": list,
}  # fmt: skip
KINDS = ("student", "control", "teacher")
_IMAGE = re.compile(r"data:image/(jpeg|png);base64,[A-Za-z0-9+/]+=*")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as it is shown; `style` is the class of its colour and `shape` that of its mark."""

    name: str
    label: str
    kind: str
    style: str = "t"
    shape: str = "circle"


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
        self.models = self._models()
        self.highlight = self._highlight()

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
        models, used = [], {"student": 0, "control": 0}
        for record in (record for record in records if record["name"] in names):
            name = record["name"]
            kind = record.get("kind") or ("teacher" if name.startswith("teacher:") else "student")
            label = record.get("label") or name.removeprefix("teacher:")
            if kind == "teacher":
                models.append(Model(name, label, kind))
                continue
            place, used[kind] = used[kind], used[kind] + 1
            style = f"s{place % 5}" if kind == "student" else "c"
            shapes = ("circle", "square", "triangle", "diamond") if kind == "student" else ("cross", "square")
            models.append(Model(name, label, kind, style, shapes[place % len(shapes)]))
        return models

    def _highlight(self) -> Model | None:
        name = self.data.get("highlight")
        if name and name not in [model.name for model in self.models]:
            raise InputError(f"the highlighted model {name!r} has no rows; {near(name, [m.name for m in self.models])}")
        students = self.kind("student") or self.models
        return next((model for model in self.models if model.name == name), students[-1] if students else None)

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
        parts = [modality, f"{classes} classes" if classes else None, f"n = {row['n']}"]
        return ", ".join(part for part in parts if part)


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
