"""A CSV or TSV file with one picture a line, and columns that say where it is and what it shows."""

import csv
import io as std_io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.data.sources import Skipped, SourceRecord
from mmkd_jax.data.sources.tables import Columns, picture
from mmkd_jax.errors import InputError, near


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
    one_of: Sequence[str] = (),
) -> Iterator[SourceRecord | Skipped]:
    """Pairs in the order of the lines.

    Args:
      inputs: CSV files; a file whose name ends in `.tsv` has tabs.
      name: of the set; by default the file's.
      image: column with the picture's path from the file's folder, or a path with columns in braces
        (`images/{image_id}.jpg`). A column may also be called by its number: `#0` is the first.
      columns, findings, separator, caption_fields, extra: see `tables.Columns`.
      one_of: columns of a class each; a picture's is the first that holds 1.

    Raises:
      InputError: a file is missing or not a table, or has no such column.
    """
    meaning = Columns(columns or {}, findings, separator, caption_fields, extra)
    for path in _paths(inputs):
        for row in _rows(path, meaning, image, one_of):
            place = _place(row, image)
            file = io.as_path(place) if "://" in place else path.parent / place
            yield meaning.record(row, place, picture(file), name or path.stem)


def classes(
    inputs: Sequence[str],
    *,
    name: str = "",
    image: str = "image",
    columns: Mapping[str, str] | None = None,
    findings: Sequence[str] = (),
    separator: str = "|",
    one_of: Sequence[str] = (),
    **_: Any,
) -> dict[str, list[str]]:
    """Class names as the files have them."""
    meaning, found = Columns(columns or {}, findings, separator), {}
    if one_of:
        return {name or path.stem: list(one_of) for path in _paths(inputs)}
    for path in _paths(inputs):
        for here, names in meaning.classes(_rows(path, meaning, image), name or path.stem).items():
            found[here] = list(dict.fromkeys([*found.get(here, []), *names]))
    return found


def _paths(inputs: Sequence[str]) -> list:
    if not inputs:
        raise InputError("csv needs --input: CSV or TSV files")
    paths = [io.as_path(given) for given in inputs]
    for path in paths:
        if not path.exists() or path.is_dir():
            raise InputError(f"{path} is not a file; give a CSV or TSV file")
    return paths


def _rows(path, meaning: Columns, image: str, one_of: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """The lines by column, all of the header's length; with the label that the columns `one_of` say."""
    with path.open("rb") as raw, std_io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            header = [cell.strip() for cell in next(lines, [])]
            numbers = [f"#{number}" for number in range(len(header))]
            meaning.check([*header, *numbers], path)
            for column in [*(re.findall(r"{(.*?)}", image) if "{" in image else [image]), *one_of]:
                if column not in header and column not in numbers:
                    what = "a class" if column in one_of else "the pictures"
                    raise InputError(f"{path} has no column {column!r} for {what}; {near(column, header)}")
            for cells in lines:
                if cells and len(cells) != len(header):
                    raise InputError(f"{path}, line {lines.line_num}: {len(cells)} values under {len(header)} columns")
                if cells:
                    row = dict(zip(numbers, cells)) | dict(zip(header, cells))
                    yield row | ({"label": _shown(row, one_of)} if one_of else {})
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}, line {lines.line_num}: not CSV in UTF-8 ({error})") from error


def _shown(row: Mapping[str, str], one_of: Sequence[str]) -> str:
    """The first of the columns that holds 1, "" if none does."""
    return next((column for column in one_of if row[column].strip() in ("1", "1.0")), "")


def _place(row: Mapping[str, str], image: str) -> str:
    """Path of a row's picture."""
    return re.sub(r"{(.*?)}", lambda match: row[match[1]], image) if "{" in image else row[image]
