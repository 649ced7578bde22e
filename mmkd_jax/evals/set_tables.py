"""Rows of the tables that described sets come with, in their forms: CSV, TSV, text, JSON, JSONL, Parquet.

Which column means what is in a set's layout: `{"columns": {"question": "Question", "image": "Figure_path"}}` gives ours
by theirs; a column that is not named there has our name already, or is not there.
"""

import csv
import dataclasses
import io as std_io
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mmkd_jax import io
from mmkd_jax.data.sources import Skipped, parquet
from mmkd_jax.data.sources.tables import below, picture
from mmkd_jax.errors import InputError, near

FORMS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of a file.

    Attributes:
      path: of the file.
      columns: theirs by ours.
      where: values that columns must have for a row to count.
      header: names of the columns of a file that does not say them.
      separator: between the values of a text file; by default commas, and tabs in `.tsv` and `.txt`.
    """

    path: epath.Path
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    where: Mapping[str, str] = dataclasses.field(default_factory=dict)
    header: Sequence[str] = ()
    separator: str = ""

    def rows(self, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Rows with our names beside theirs; `where_from` says which row of which file it is.

        Raises:
          InputError: the file is damaged, or lacks a column that is named or `needed`; says which.
        """
        for number, row in enumerate(_read(self.path, self.header, self.separator), 1):
            theirs = [self.columns.get(ours, ours) for ours in needed]
            for column in [*theirs, *self.columns.values(), *self.where]:
                if column not in row:
                    raise InputError(f"{self.path} has no column {column!r}; {near(column, row)}")
            if any(str(row[column]) != value for column, value in self.where.items()):
                continue
            ours = {name: row[column] for name, column in self.columns.items()}
            yield {**row, **ours, "where_from": f"{self.path}, row {number}"}


def files(inputs: Sequence[str]) -> list[epath.Path]:
    """Tables at the paths, or in folders at the paths, at any depth.

    Raises:
      InputError: there is none at a path.
    """
    found = []
    for path in map(io.as_path, inputs):
        here = [file for file in below(path) if file.suffix in FORMS] if path.is_dir() else [path]
        if not here or not path.exists():
            raise InputError(f"{path} holds no table; give a file whose name ends in {', '.join(FORMS)}")
        found += here
    return found


def place(pattern: str, row: Mapping[str, Any]) -> str:
    """A path with columns in braces (`imgs/{img_name}`) for a row; a pattern without braces names the column.

    `{slide_id.stem}` is the value of the column `slide_id` without the ending of a file's name.

    Raises:
      InputError: the row has no such column.
    """

    def value(column: str) -> str:
        whole = row.get(column.removesuffix(".stem") if column not in row else column)
        if whole in (None, ""):
            raise InputError(f"{row['where_from']}: there is no {column!r} for the path {pattern!r}")
        return str(whole) if column in row else pathlib.PurePosixPath(str(whole)).stem

    return re.sub(r"{(.*?)}", lambda match: value(match[1]), pattern) if "{" in pattern else value(pattern)


def image(root, pattern: str, row: Mapping[str, Any]) -> bytes | Skipped:
    """The picture of a row: bytes that it holds (as Parquet does), or those of the file that `pattern` names."""
    data = held(row, pattern)
    return picture(root / place(pattern, row)) if data is None else data


def held(row: Mapping[str, Any], pattern: str) -> bytes | None:
    """The picture that a row holds, None where it names a path."""
    value = row.get(pattern)
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if isinstance(data, bytes) else None


def text(row: Mapping[str, Any], name: str) -> str:
    """A value as text; "" where it is missing."""
    value = row.get(name)
    return "" if value is None or value != value else str(value).strip()


def _read(path, header: Sequence[str], separator: str) -> Iterator[dict[str, Any]]:
    if path.suffix not in FORMS:
        raise InputError(f"{path} is no table that can be read; its name must end in {', '.join(FORMS)}")
    if path.suffix == ".parquet":
        yield from parquet.rows(path)
    elif path.suffix in (".json", ".jsonl"):
        yield from _json(path)
    else:
        yield from _lines(path, header, separator or ("," if path.suffix == ".csv" else "\t"))


def _lines(path, header: Sequence[str], separator: str) -> Iterator[dict[str, Any]]:
    """Lines that begin with # are comments, as cBioPortal has them above the headings."""
    with path.open("rb") as raw, std_io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
        quoting = csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL
        lines = csv.reader((line for line in file if not line.startswith("#")), delimiter=separator, quoting=quoting)
        try:
            names = list(header) or [cell.strip() for cell in next(lines, [])]
            for cells in lines:
                if cells and len(cells) != len(names):
                    raise InputError(f"{path}, line {lines.line_num}: {len(cells)} values under {len(names)} columns")
                if cells:
                    yield dict(zip(names, cells))
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}, line {lines.line_num}: not a table in UTF-8 ({error})") from error


def _json(path) -> Iterator[dict[str, Any]]:
    """A list of objects, or an object a line."""
    try:
        told = path.read_text()
        rows = [json.loads(line) for line in told.splitlines() if line.strip()] if path.suffix == ".jsonl" else None
        rows = json.loads(told) if rows is None else rows
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} must hold a list of objects, one a row")
    yield from rows
