"""Questions with answers on the pictures of a set, and which of them are for training.

A picture's record holds them under `qa`: a list of objects with `question`, `answer`, `answer_type` (closed or open)
and, where known, `qid` (unique on a picture) and `official_split` (train or test).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmkd_jax.errors import InputError
from mmkd_jax.evals.vqa_answers import normalise

FIELD = "qa"
TYPES = ("closed", "open")


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """Of one or more pictures, q in all; every attribute is `[q]`.

    Attributes:
      ids: of picture and question; rows: of the picture in its set of pairs; groups: what may not be divided.
      texts: the questions; answers: normalised.
      closed: whether one of few answers is asked for.
      published: the split that the set's authors made, "" where they say nothing.
    """

    ids: np.ndarray
    rows: np.ndarray
    groups: np.ndarray
    texts: np.ndarray
    answers: np.ndarray
    closed: np.ndarray
    published: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: np.ndarray) -> "Questions":
        """Those at places, or where a mask is true."""
        return Questions(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


def read(data, rows: np.ndarray) -> Questions:
    """The questions on pictures.

    Args:
      data: the `base.TaskData` of the set.
      rows: int64 `[n]` of the set of pairs.

    Raises:
      InputError: a question or answer is missing, an answer's type is unknown, or a question comes twice.
    """
    pairs, groups = data.features.pairs, data.groups(rows)
    found = []
    for row, group, id in zip(np.asarray(rows).tolist(), groups.tolist(), data.ids(rows).tolist()):
        for number, entry in enumerate(_listed(pairs.read(row).extra.get(FIELD, ()), f"{data.set.name}, picture {id}")):
            fields = _checked(entry, f"{data.set.name}, picture {id}, question {number + 1}")
            found.append((f"{id}/{entry.get('qid', number)}", row, group, *fields))
    columns = [np.array(column) for column in zip(*found)] or [np.array([])] * 7
    ids, counts = np.unique(columns[0], return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{data.set.name}: question {ids[counts > 1][0]} comes twice; give each of a picture its qid")
    return Questions(*columns)


def by_picture(data) -> tuple[Questions, Questions]:
    """Questions to train on and to test on, no picture (or patient) of which is in both.

    Raises:
      InputError: one is, or there are no questions on one side.
    """
    train, test = read(data, data.set.train_rows), read(data, data.set.rows)
    shared = np.intersect1d(train.groups, test.groups)
    if len(shared):
        number = np.isin(test.groups, shared).sum()
        raise InputError(
            f"{data.set.name}: {number} test questions are on pictures or patients that are trained on; split by group"
        )
    return _filled(data, train, test)


def as_published(data) -> tuple[Questions, Questions]:
    """Questions by the split that the set's authors made of them, whatever the split of the pictures.

    Raises:
      InputError: a question does not say where it belongs, or there are none on one side.
    """
    all_of_them = read(data, np.unique(np.concatenate([data.set.train_rows, data.set.rows])))
    unknown = ~np.isin(all_of_them.published, ("train", "test"))
    if unknown.any():
        raise InputError(
            f"{data.set.name}: question {all_of_them.ids[unknown][0]} has official_split "
            f"{str(all_of_them.published[unknown][0])!r}, not train or test; take the task vqa, which splits by picture"
        )
    test = all_of_them.published == "test"
    return _filled(data, all_of_them[~test], all_of_them[test])


def _filled(data, train: Questions, test: Questions) -> tuple[Questions, Questions]:
    for name, one in (("train", train), ("test", test)):
        if not len(one):
            raise InputError(f"{data.set.name} has no questions to {name} on")
    return train, test


def _listed(entries: Any, where: str) -> Sequence[Mapping]:
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, Mapping) for entry in entries):
        raise InputError(f"{where}: {FIELD} is not a list of objects with question, answer and answer_type")
    return entries


def _checked(entry: Mapping, where: str) -> tuple[str, str, bool, str]:
    """Text, normalised answer, whether it is closed, and the published split."""
    for name in ("question", "answer"):
        value = entry.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise InputError(f"{where}: {name} is {value!r}, not text; mend or leave out the question")
    kind = str(entry.get("answer_type", "")).lower()
    if kind not in TYPES:
        raise InputError(f"{where}: answer_type {entry.get('answer_type')!r} is unknown; it must be closed or open")
    answer = str(entry["answer"])
    split = str(entry.get("official_split") or "").lower()
    return str(entry["question"]).strip(), normalise(answer) or answer.strip().lower(), kind == "closed", split
