"""What a set of pairs holds to be evaluated on: classes, captions, questions, by source."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd_jax.data.rows import RowIndex
from mmkd_jax.evals import prompts
from mmkd_jax.evals.prompts import Prompts


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """A data set as the tasks see it.

    Attributes:
      name: of the set, usually a source of the pairs set.
      rows: int64 rows of the pairs set that are tested on.
      split_hash: identity of `rows` in their set.
      modality: the most common one among the rows.
      train_rows: int64 rows for what is trained on frozen features, None without.
      train_hash: identity of `train_rows`.
      class_names: in the order of the labels; empty without classes.
      prompts: of the classes; None without classes.
      captions: whether the rows carry captions to retrieve.
      questions: whether pictures come with questions and answers.
      targets: where a row may have several of the classes: int `[n, classes]`, 1 there, 0 not there, -1 unknown.
      absent: prompts of each class not being there, for such sets; general ones when None.
    """

    name: str
    rows: np.ndarray
    split_hash: str
    modality: str = ""
    train_rows: np.ndarray | None = None
    train_hash: str = ""
    class_names: tuple[str, ...] = ()
    prompts: Prompts | None = None
    captions: bool = False
    questions: bool = False
    targets: np.ndarray | None = None
    absent: Prompts | None = None


def sets_of(pairs, profile: str = "ensemble") -> list[EvalSet]:
    """The evaluation sets that a pairs set holds, by name.

    A source with classes and rows `<source>.test` is classified, with `<source>.train` for the probe if it is there;
    its rows without a class take no part. Where rows have findings, each is asked for by itself.
    A source without classes but with captioned rows `<source>.val` (else `<source>.test`) is retrieved. A source with
    questions is asked those on rows `<source>.test`.
    """
    names, found = set(pairs.row_names()), []
    for source in sorted({name.rpartition(".")[0] for name in names} - {""}):
        classes = tuple(pairs.classes.get(source, ()))
        questions = f"{source}.test" in names and _questioned(pairs, f"{source}.test")
        splits = [f"{source}.{split}" for split in (("test",) if classes or questions else ("val", "test"))]
        indices = [pairs.rows(split) for split in splits if split in names]
        indices = [_labelled(pairs, index) for index in indices] if classes else indices
        index = next((index for index in indices if len(index.rows)), None)
        if index is None:
            continue
        modality = _modality(pairs, index.rows)
        if classes:
            train = _labelled(pairs, pairs.rows(f"{source}.train")) if f"{source}.train" in names else None
            wording = {"profile": profile, "name": source, "own": pairs.prompts.get(source)}
            known = prompts.default(classes, modality, **wording)
            more = {} if train is None else {"train_rows": train.rows, "train_hash": train.hash}
            targets = _findings(pairs, index.rows, len(classes))
            if targets is not None:
                more = {"targets": targets, "absent": prompts.absent_of(classes, **wording)}
            found.append(EvalSet(source, index.rows, index.hash, modality, class_names=classes, prompts=known, **more))
        elif (captions := bool(np.asarray(pairs.table["captions"])[index.rows].any())) or questions:
            more = _train(pairs, f"{source}.train") if questions and f"{source}.train" in names else {}
            found.append(
                EvalSet(source, index.rows, index.hash, modality, captions=captions, questions=questions, **more)
            )
    return found


def unprompted(sets: Sequence[EvalSet]) -> list[EvalSet]:
    """The sets as they are for a model that can be asked nothing in words."""
    return [dataclasses.replace(one, prompts=None, absent=None, questions=False) for one in sets]


def _labelled(pairs, index: RowIndex) -> RowIndex:
    """The rows of `index` that have a class, or a finding that is known."""
    has_class = np.asarray(pairs.table["label_id"])[index.rows] >= 0
    if "findings" in pairs.table:
        has_class = has_class | (pairs.table["findings"][index.rows] >= 0).any(axis=1)
    if has_class.all():
        return index
    return RowIndex(index.rows[has_class], index.set_hash, index.name, {**index.made, "only": "with a class"})


def _findings(pairs, rows: np.ndarray, classes: int) -> np.ndarray | None:
    """Int8 `[n, classes]` as in `EvalSet.targets`; None where the rows have one class each."""
    found = np.asarray(pairs.table["findings"])[rows, :classes] if "findings" in pairs.table else None
    return found if found is not None and (found >= 0).any() else None


def _questioned(pairs, name: str) -> bool:
    """Whether pictures of the row index come with questions."""
    return "questions" in pairs.table and bool(pairs.table["questions"][pairs.rows(name).rows].any())


def _train(pairs, name: str) -> dict[str, Any]:
    """Rows to train on, as fields of an `EvalSet`."""
    index = pairs.rows(name)
    return {"train_rows": index.rows, "train_hash": index.hash}


def _modality(pairs, rows: np.ndarray) -> str:
    index = np.asarray(pairs.table["modality"])[rows]
    return str(pairs.modalities[int(np.bincount(index).argmax())])
