"""A JSONL file, a picture a line: `image` (path, from the file's folder) with `caption`, `label` or `findings`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.data.sources import Skipped, SourceRecord
from mmkd_jax.data.sources.tables import Columns, picture
from mmkd_jax.errors import InputError


def records(
    inputs: Sequence[str],
    *,
    name: str = "",
    columns: Mapping[str, str] | None = None,
    caption_fields: Sequence[str] = ("caption", "captions"),
    extra: Sequence[str] = ("caption_source",),
) -> Iterator[SourceRecord | Skipped]:
    """Pairs in the order of the lines. A line may hold the same optional fields as WebDataset metadata, and `key`.

    Args:
      inputs: JSONL files.
      name: of the set, where a line has no field `set`; by default the file's.
      columns: their names of fields by ours, see `tables.Columns`.
      caption_fields: fields with texts.
      extra: fields to keep.

    Raises:
      InputError: a file is missing or a line is not JSON with `image`.
    """
    meaning = Columns(columns or {}, caption_fields=caption_fields, extra=extra)
    for path in _paths(inputs):
        for fields in _lines(path):
            place = fields["image"]
            file = io.as_path(place) if "://" in place else path.parent / place
            yield meaning.record(fields, place, picture(file), name or path.name.split(".")[0])


def classes(
    inputs: Sequence[str], *, name: str = "", columns: Mapping[str, str] | None = None, **_: Any
) -> dict[str, list[str]]:
    """Class names as the lines have them."""
    meaning, found = Columns(columns or {}), {}
    for path in _paths(inputs):
        for here, names in meaning.classes(_lines(path), name or path.name.split(".")[0]).items():
            found[here] = list(dict.fromkeys([*found.get(here, []), *names]))
    return found


def _paths(inputs: Sequence[str]) -> list:
    if not inputs:
        raise InputError("jsonl needs --input: JSONL files")
    paths = [io.as_path(given) for given in inputs]
    for path in paths:
        if not path.exists() or path.is_dir():
            raise InputError(f"{path} is not a file; give a JSONL file")
    return paths


def _lines(path) -> Iterator[dict]:
    with path.open("r") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse(line, path, number)


def _parse(line: str, path, number: int) -> dict:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        raise InputError(f"{path}, line {number}: no field `image` with the picture's path")
    return fields
