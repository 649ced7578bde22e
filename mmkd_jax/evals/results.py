"""results.json: rows of one schema, merged by model, and the same as CSV; and per-sample outputs for paired tests."""

import csv
import io as memory
import math
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mmkd_jax import io
from mmkd_jax.data import npz
from mmkd_jax.errors import InputError

SCHEMA = 1
FIELDS = {
    "model": str, "checkpoint": str, "dataset": str, "task": str, "metric": str,
    "value": float, "low": float, "high": float, "n": int, "seed": int, "context": dict,
}  # fmt: skip
_COLUMNS = ("profile", "feature_layer", "modality", "split_hash", "model_hash")  # of the context, in the CSV


def check(rows: Iterable[Mapping]) -> list[dict]:
    """The rows as plain dicts, proven to follow the schema.

    Raises:
      InputError: a field is missing, unknown, of another type, or not finite; or two rows say the same thing.
    """
    checked, seen = [], set()
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or set(row) != set(FIELDS):
            raise InputError(f"result row {number} must have exactly the fields {', '.join(FIELDS)}")
        for name, kind in FIELDS.items():
            right = isinstance(row[name], (int, float) if kind is float else kind) and not isinstance(row[name], bool)
            if not right or (kind is float and not math.isfinite(row[name])):
                raise InputError(f"result row {number}: {name} is {row[name]!r}, not a {kind.__name__}")
        if identity(row) in seen:
            raise InputError(f"result row {number} repeats {row['model']}, {row['dataset']}, {row['metric']}")
        seen.add(identity(row))
        checked.append(dict(row))
    return checked


def identity(row: Mapping) -> tuple:
    """What a row is about; a later row with the same identity replaces an earlier one."""
    named = (row["model"], row["dataset"], row["task"], row["metric"], row["seed"])
    return (*named, row["context"].get("profile"), row["context"].get("feature_layer"))


def save(path, rows: Iterable[Mapping]) -> None:
    """Writes `{"schema": 1, "rows": [...]}` atomically, and beside it the same numbers for spreadsheets (`.csv`)."""
    rows, path = check(rows), io.as_path(path)
    io.write_json(path, {"schema": SCHEMA, "rows": rows})
    io.write_text(path.with_suffix(".csv"), as_csv(rows))


def as_csv(rows: Iterable[Mapping]) -> str:
    """The rows as CSV: the fields but the context, and of that what says what a number is about."""
    text, fields = memory.StringIO(), [name for name in FIELDS if name != "context"]
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*fields, *_COLUMNS])
    for row in rows:
        table.writerow([*(row[name] for name in fields), *(row["context"].get(name, "") for name in _COLUMNS)])
    return text.getvalue()


def load(path) -> list[dict]:
    """Reads what `save` wrote.

    Raises:
      InputError: no such file, another schema version, or rows that break the schema.
    """
    record = io.read_json(path)
    found = record.get("schema") if isinstance(record, dict) else None
    if found != SCHEMA or not isinstance(record.get("rows"), list):
        raise InputError(f"{path} has results schema {found!r}, this version reads {SCHEMA}; evaluate again")
    return check(record["rows"])


def merge(old: Sequence[Mapping], new: Sequence[Mapping]) -> list[dict]:
    """`old` and `new` together; new rows replace old ones of the same identity, in place."""
    rows = {identity(row): dict(row) for row in check(old)}
    return check(list((rows | {identity(row): dict(row) for row in check(new)}).values()))


def update(path, rows: Sequence[Mapping]) -> list[dict]:
    """Merges `rows` into the file (made if absent) and returns all its rows. One writer at a time."""
    merged = merge(load(path), rows) if io.as_path(path).exists() else check(rows)
    save(path, merged)
    return merged


def file_name(name: str) -> str:
    """`name` percent-encoded for use as a file name: `teacher:clip` becomes `teacher%3Aclip`; names stay different."""
    if not name:
        raise InputError("a model or data set needs a name")
    safe = urllib.parse.quote(name, safe="")
    return "%2E" + safe[1:] if safe.startswith(".") else safe


def predictions_path(out, model: str, dataset: str, task: str):
    """Where the per-sample outputs of one model on one task lie."""
    return io.as_path(out) / "predictions" / file_name(model) / f"{file_name(dataset)}.{file_name(task)}.npz"


def heads_path(out, model: str, dataset: str):
    """Where what tasks train on one model's features or towers lies."""
    return io.as_path(out) / "heads" / file_name(model) / file_name(dataset)


def save_predictions(path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays as one `.npz` atomically; no pickles, so text is stored as fixed-width unicode."""
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    for name, value in arrays.items():
        if value.dtype.hasobject:
            raise InputError(f"predictions {name!r} hold Python objects; store text or numbers")
    io.write_bytes(path, npz.to_bytes(**arrays))


def load_predictions(out, model: str, dataset: str, task: str) -> dict[str, np.ndarray]:
    """Reads what a run stored of `model` on `dataset`.

    Raises:
      InputError: there is none, or the file is damaged.
    """
    path = predictions_path(out, model, dataset, task)
    if not path.exists():
        raise InputError(f"{path} does not exist; evaluate {model} on {dataset} ({task}) first")
    return npz.read(path, "per-sample predictions")
