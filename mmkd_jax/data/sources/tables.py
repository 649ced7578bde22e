"""What sources share whose pictures come with a row of named values: CSV, JSONL, Parquet, TensorFlow Datasets."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmkd_jax.data.sources import Skipped, SourceRecord, from_fields
from mmkd_jax.errors import InputError, near


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which values of a row mean what.

    Attributes:
      columns: their names by ours (`{"label": "dx", "group": "patient"}`); ours are those of `from_fields`, and `key`.
      findings: columns that each hold one finding: 1 there, 0 not there, -1 or nothing unknown.
      separator: between findings in one column of text (`{"findings": "Finding Labels"}`).
      caption_fields: values with texts.
      extra: values to keep.
    """

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    findings: Sequence[str] = ()
    separator: str = "|"
    caption_fields: Sequence[str] = ("caption", "captions")
    extra: Sequence[str] = ()

    def check(self, known: Iterable[str], where: Any) -> None:
        """Refuses names that a file does not have.

        Raises:
          InputError: there is one; names the nearest.
        """
        known = list(known)
        for name in [*self.columns.values(), *self.findings]:
            if name not in known:
                raise InputError(f"{where} has no column {name!r}; {near(name, known)}")

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row under our names, without empty values."""
        fields = dict(row) | {ours: row.get(theirs) for ours, theirs in self.columns.items()}
        fields = {name: value for name, value in fields.items() if not _empty(value)}
        if self.findings:
            fields["findings"] = {name: _number(row.get(name)) for name in self.findings}
        elif "findings" in self.columns:
            told = fields.get("findings", "")
            parts = told.split(self.separator) if isinstance(told, str) else told
            fields["findings"] = [str(part).strip() for part in parts if str(part).strip()]
        return fields

    def record(self, row: Mapping[str, Any], key: str, image: bytes | Skipped, source: str) -> SourceRecord | Skipped:
        """The record of a row; `key` and `source` count where the row does not say."""
        fields = self.fields(row)
        key = str(fields.get("key", key))
        if isinstance(image, Skipped):
            return Skipped(key, image.reason)
        return from_fields(
            fields, key=key, image=image, source=source, caption_fields=self.caption_fields, extra=self.extra
        )

    def classes(self, rows: Iterable[Mapping[str, Any]], source: str) -> dict[str, list[str]]:
        """Class names by set as the rows have them: the findings' columns, the words, or the labels in their order."""
        found: dict[str, set[str]] = {}
        numbered: dict[str, dict[int, str]] = {}
        for row in rows:
            fields = self.fields(row)
            here = str(fields.get("set") or source)
            words = fields.get("findings", [fields["label"]] if "label" in fields else [])
            found.setdefault(here, set()).update(map(str, words))
            if "label" in fields and str(fields.get("label_id", "")).isdigit():
                numbered.setdefault(here, {})[int(fields["label_id"])] = str(fields["label"])
        listed = {here: self.findings or sorted(words, key=_order) for here, words in found.items() if words}
        for here, names in numbered.items():  # the rows' own numbers, or none where they leave some out
            whole = sorted(names) == list(range(len(listed[here])))
            listed[here] = [names[number] for number in sorted(names)] if whole else []
        return {here: list(names) for here, names in listed.items() if names}


def picture(path) -> bytes | Skipped:
    """The bytes of a picture's file, or that it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        return Skipped(str(path), f"its picture cannot be read: {error.strerror or 'not there'}")


def below(folder) -> Iterator:
    """Files in a folder at any depth, in order of their names, none of them hidden."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith((".", "__MACOSX")):
            continue
        if path.is_dir():
            yield from below(path)
        else:
            yield path


def _empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _number(value: Any) -> Any:
    """-1 for nothing; a whole number where it is one, else what it was, for `Classes.several` to refuse."""
    if _empty(value):
        return -1
    try:
        return int(float(value)) if float(value).is_integer() else value
    except (TypeError, ValueError):
        return value


def _order(word: str) -> tuple:
    """Numbers by size, before words."""
    return (0, int(word), "") if word.isdigit() else (1, 0, word)
