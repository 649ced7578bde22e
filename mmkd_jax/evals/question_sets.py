"""A source of pictures with questions, from the tables that published sets of visual questions come as.

A layout with the source `questions` names tables (`mmkd_jax.evals.set_tables`) and what their columns mean. Each
picture becomes one record whose field `qa` lists its questions, as `mmkd_jax.evals.vqa_questions` reads them; its group
is the picture's id, so that splits that are made never divide it. A picture that the files have in several splits
becomes a record in each.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.data import splits as split_names
from mmkd_jax.data.sources import Skipped, SourceRecord
from mmkd_jax.errors import InputError
from mmkd_jax.evals import set_tables, vqa_questions
from mmkd_jax.evals.set_tables import Table, text

_SPLIT = re.compile(r"[-_.]")  # a table's name begins with its split: train.json, validation-00000-of-00003.parquet


def records(
    inputs: Sequence[str],
    *,
    name: str = "",
    image: str = "image",
    columns: Mapping[str, str] | None = None,
    types: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    splits: Mapping[str, str] | None = None,
    named: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    header: Sequence[str] = (),
    separator: str = "",
) -> Iterator[SourceRecord | Skipped]:
    """Pictures in the order of their first questions.

    Args:
      inputs: tables, or folders that hold some.
      name: of the set; by default the first table's.
      image: column with the picture or its path from the table's folder, or a path with columns in braces.
      columns: theirs by ours: question, answer, answer_type, image_id, split.
      types: closed or open by what answer_type says; by default those words in any case. Without that column an answer
        is closed if it is yes or no, or if there are options.
      options: columns with the answers to choose from.
      splits: ours by what the column of splits says, "" for all that are not named; unnamed ones stay as they are.
      named: splits by name of the table, where no column says them and its name does not begin with one.
      where: values that columns must have for a row to count.
      header, separator: see `set_tables.Table`.

    Raises:
      InputError: a table or column is missing, an answer's type is unknown, a question or an answer is empty.
    """
    chosen = {"columns": columns or {}, "where": where or {}, "header": header, "separator": separator}
    tables = [set_tables.Table(path, **chosen) for path in set_tables.files(inputs)]
    meaning = _Meaning(image, types or {}, tuple(options), splits or {}, named or {})
    asked: dict[str, dict[str, list]] = {}
    for table, row in meaning.rows(tables):
        of_picture = asked.setdefault(meaning.image_id(row), {}).setdefault(meaning.split(table, row), [])
        of_picture.append({"qid": len(of_picture), **meaning.entry(row), "official_split": meaning.split(table, row)})
    left = dict(asked)
    for table, row in meaning.rows(tables):  # again, since pictures may lie in the tables and not all fit in memory
        by_split = left.pop(id := meaning.image_id(row), {})
        data = set_tables.image(table.path.parent, image, row) if by_split else b""
        for split, questions in by_split.items():
            key = id if len(by_split) == 1 else f"{id} ({split})"
            if isinstance(data, Skipped):
                yield Skipped(key, data.reason)
                continue
            yield SourceRecord(
                key=key, image=data, captions=(), source=name or tables[0].path.stem, split=split, group=id,
                extra={vqa_questions.FIELD: questions},
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Meaning:
    """What the columns mean; fields as the arguments of `records`."""

    image: str
    types: Mapping[str, str]
    options: tuple[str, ...]
    splits: Mapping[str, str]
    named: Mapping[str, str]

    def rows(self, tables: Sequence[Table]) -> Iterator[tuple[Table, dict[str, Any]]]:
        for table in tables:
            for row in table.rows(("question", "answer", *self.options)):
                yield table, row

    def image_id(self, row: Mapping[str, Any]) -> str:
        """What the files call the picture, or its path, or its bytes where it has neither."""
        if text(row, "image_id"):
            return text(row, "image_id")
        data = set_tables.held(row, self.image)
        return set_tables.place(self.image, row) if data is None else io.sha256(data)[:16]

    def split(self, table: Table, row: Mapping[str, Any]) -> str:
        told = text(row, "split")
        told = self.splits.get(told, self.splits.get("", told)) or self.named.get(table.path.name, "")
        return (
            split_names.plain(told)
            if told
            else split_names.NAMES.get(_SPLIT.split(table.path.name)[0].lower(), "train")
        )

    def entry(self, row: Mapping[str, Any]) -> dict[str, Any]:
        for name in ("question", "answer"):
            if not text(row, name):
                raise InputError(f"{row['where_from']}: the {name} is empty; leave the row out")
        options = [text(row, name) for name in self.options if text(row, name)]
        entry = {name: text(row, name) for name in ("question", "answer")} | {"answer_type": self._type(row, options)}
        return entry | ({"options": options} if options else {})

    def _type(self, row: Mapping[str, Any], options: Sequence[str]) -> str:
        told = text(row, "answer_type")
        if not told:
            return "closed" if options or text(row, "answer").lower() in ("yes", "no") else "open"
        meant = self.types.get(told, told.lower())
        if meant not in vqa_questions.TYPES:
            raise InputError(f"{row['where_from']}: the answer type {told!r} is neither closed nor open; see types")
        return meant
