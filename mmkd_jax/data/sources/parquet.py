"""Parquet files with pictures in a column, as Hugging Face datasets write them.

Layout: https://huggingface.co/docs/hub/datasets-image (a column `image` of `{bytes, path}`; names of classes in the
schema's metadata `huggingface`). Splits come from a column, or else from file names (`test-00000-of-00001.parquet`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.data import splits
from mmkd_jax.data.sources import Skipped, SourceRecord
from mmkd_jax.data.sources.tables import Columns, below, picture
from mmkd_jax.errors import InputError

_ROWS = 32  # read at a time, so that few pictures are in memory


def records(
    inputs: Sequence[str],
    *,
    name: str = "",
    image: str = "image",
    columns: Mapping[str, str] | None = None,
    findings: Sequence[str] = (),
    separator: str = "|",
    caption_fields: Sequence[str] = ("caption", "captions"),
    extra: Sequence[str] = (),
) -> Iterator[SourceRecord | Skipped]:
    """Pairs in the order of file names and rows.

    Args:
      inputs: Parquet files, or folders that hold some at any depth.
      name: of the set; by default the input's.
      image: column with the picture: bytes, or `{bytes, path}`, or its path from the file's folder.
      columns, findings, separator, caption_fields, extra: see `tables.Columns`.

    Raises:
      InputError: no such file, no such column, or pyarrow is missing.
    """
    meaning = Columns(columns or {}, findings, separator, caption_fields, extra)
    for path, source in _files(inputs):
        for number, row in enumerate(_rows(path, meaning, image)):
            held = row.pop(image)
            row = {"split": _split(path)} | row
            yield meaning.record(row, f"{path.stem}-{number:06d}", _bytes(held, path), name or source)


def classes(
    inputs: Sequence[str],
    *,
    name: str = "",
    columns: Mapping[str, str] | None = None,
    findings: Sequence[str] = (),
    separator: str = "|",
    **_: Any,
) -> dict[str, list[str]]:
    """Class names of the schema, or as the rows have them."""
    meaning, found = Columns(columns or {}, findings, separator), {}
    label = meaning.columns.get("findings", meaning.columns.get("label", "label"))
    for path, source in _files(inputs):
        names = _named(_open(path), path).get(label)
        here = {name or source: names} if names else meaning.classes(_rows(path, meaning, None), name or source)
        for set_name, more in here.items():
            found[set_name] = list(dict.fromkeys([*found.get(set_name, []), *more]))
    return found


def rows(path) -> Iterator[dict[str, Any]]:
    """All values of all rows, in order.

    Raises:
      InputError: it is not a whole Parquet file, or pyarrow is missing.
    """
    for batch in _open(path).iter_batches(batch_size=_ROWS):
        yield from batch.to_pylist()


def _files(inputs: Sequence[str]) -> list[tuple]:
    """Files with the name of their set."""
    if not inputs:
        raise InputError("parquet needs --input: Parquet files or folders that hold some")
    files = []
    for path in map(io.as_path, inputs):
        found = [f for f in below(path) if f.suffix == ".parquet"] if path.is_dir() else [path]
        if not path.exists() or not found:
            raise InputError(f"{path} holds no .parquet file; give a Parquet file or a folder with some")
        files += [(file, path.name if path.is_dir() else path.stem) for file in found]
    return files


def _open(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError("Parquet files need the extra 'parquet' (pyarrow): bash launch/setup.sh parquet") from error
    try:
        return pyarrow.parquet.ParquetFile(path.open("rb"))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a whole Parquet file ({error}); get it again") from error


def _rows(path, meaning: Columns, image: str | None) -> Iterator[dict[str, Any]]:
    """Rows as Python values, numbers of classes as their names; without the pictures where `image` is None."""
    file = _open(path)
    known = file.schema_arrow.names
    meaning.check(known, path)
    if image is not None and image not in known:
        raise InputError(f"{path} has no column {image!r} for the pictures; it has {', '.join(known)}")
    named = _named(file, path)
    kinds = {column: str(file.schema_arrow.field(column).type) for column in known}
    wanted = [column for column in known if column == image or "binary" not in kinds[column]]
    for batch in file.iter_batches(batch_size=_ROWS, columns=wanted):
        for row in batch.to_pylist():
            yield row | {column: _name(row[column], names, path) for column, names in named.items() if column in row}


def _named(file, path) -> dict[str, list[str]]:
    """Names of the classes by column, from Hugging Face's metadata."""
    try:
        told = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        features = told.get("info", {}).get("features", {})
        return {column: names for column, feature in features.items() if (names := _names(feature))}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: its Hugging Face metadata cannot be read ({error})") from error


def _names(feature: Any) -> list[str] | None:
    """The names of a class label, or of a list of them."""
    if isinstance(feature, list) and len(feature) == 1:
        return _names(feature[0])
    if isinstance(feature, dict):
        return feature.get("names") if feature.get("_type") == "ClassLabel" else _names(feature.get("feature"))
    return None


def _name(value: Any, names: list[str], path) -> Any:
    """The name of a class's number; -1 and nothing are none."""
    if isinstance(value, list):
        return [_name(one, names, path) for one in value]
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise InputError(f"{path}: {value!r} is not the number of one of its {len(names)} classes")
    return names[value]


def _split(path) -> str:
    """The split that a file's name begins with, "train" where it begins with none."""
    return splits.NAMES.get(path.name.split("-")[0].split(".")[0].lower(), "train")


def _bytes(held: Any, path) -> bytes | Skipped:
    """The picture's bytes, held or in a file."""
    data, place = (held.get("bytes"), held.get("path")) if isinstance(held, dict) else (held, held)
    if isinstance(data, bytes):
        return data
    return picture(path.parent / place) if isinstance(place, str) else Skipped("", "it has no picture")
