"""A JSONL file with one pair a line: `image` (path, from the file's folder) and `caption` or `captions`."""

import json
from collections.abc import Iterator, Sequence

from mmkd_jax import io
from mmkd_jax.data.sources import Skipped, SourceRecord, from_fields
from mmkd_jax.errors import InputError


def records(
    inputs: Sequence[str],
    *,
    name: str = "",
    caption_fields: Sequence[str] = ("caption", "captions"),
    extra: Sequence[str] = ("caption_source",),
) -> Iterator[SourceRecord | Skipped]:
    """Pairs in the order of the lines. A line may hold the same optional fields as WebDataset metadata, and `key`.

    Args:
      inputs: JSONL files.
      name: of the set, where a line has no field `set`; by default the file's.
      caption_fields: fields with texts.
      extra: fields to keep.

    Raises:
      InputError: a file is missing or a line is not JSON with `image`.
    """
    if not inputs:
        raise InputError("jsonl needs --input: JSONL files")
    for given in inputs:
        path = io.as_path(given)
        if not path.exists() or path.is_dir():
            raise InputError(f"{path} is not a file; give a JSONL file")
        with path.open("r") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    fields = _parse(line, path, number)
                    yield _record(fields, path, name or path.name.split(".")[0], caption_fields, extra)


def _parse(line: str, path, number: int) -> dict:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        raise InputError(f"{path}, line {number}: no field `image` with the picture's path")
    return fields


def _record(fields, path, source, caption_fields, extra) -> SourceRecord | Skipped:
    key = str(fields.get("key") or fields["image"])
    image = io.as_path(fields["image"]) if "://" in fields["image"] else path.parent / fields["image"]
    try:
        data = image.read_bytes()
    except OSError as error:
        return Skipped(key, f"its picture cannot be read: {error.strerror or 'not there'}")
    return from_fields(fields, key=key, image=data, source=source, caption_fields=caption_fields, extra=extra)
