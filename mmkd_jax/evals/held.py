"""What a set of pairs holds to be evaluated on: classes, captions, questions, by source."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd_jax.data.rows import RowIndex
from mmkd_jax.errors import InputError, near
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


def sets_of(pairs, profile: str = "ensemble", split: str = "") -> list[EvalSet]:
    """The evaluation sets that a pairs set holds, by name.

    A source with classes and rows `<source>.test` is classified, with `<source>.train` for the probe if it is there;
    its rows without a class take no part. Where rows have findings, each is asked for by itself.
    A source without classes but with captioned rows `<source>.val` (else `<source>.test`) is retrieved. A source with
    questions is asked those on rows `<source>.test`.

    With a `split`, what choices are made on, all of that is asked on rows `<source>.<split>`; sets have these names,
    and of `<source>.train` only the other rows are trained on.

    Raises:
      InputError: no source has rows of that split that anything can be asked on.
    """
    names, found = set(pairs.row_names()), []
    for source in sorted({name.rpartition(".")[0] for name in names} - {""}):
        classes = tuple(pairs.classes.get(source, ()))
        questions = f"{source}.{split or 'test'}" in names and _questioned(pairs, f"{source}.{split or 'test'}")
        usual = ("test",) if classes or questions else ("val", "test")
        splits = [f"{source}.{one}" for one in ((split,) if split else usual)]
        indices = [pairs.rows(one) for one in splits if one in names]
        indices = [_labelled(pairs, index) for index in indices] if classes else indices
        index = next((index for index in indices if len(index.rows)), None)
        if index is None:
            continue
        name, modality = (f"{source}.{split}" if split else source), _modality(pairs, index.rows)
        train = _train(pairs, f"{source}.train", index, labelled=bool(classes)) if f"{source}.train" in names else {}
        if classes:
            wording = {"profile": profile, "name": source, "own": pairs.prompts.get(source)}
            known, more = prompts.default(classes, modality, **wording), train
            targets = _findings(pairs, index.rows, len(classes))
            if targets is not None:  # nothing is trained on several findings
                more = {"targets": targets, "absent": prompts.absent_of(classes, **wording)}
            found.append(EvalSet(name, index.rows, index.hash, modality, class_names=classes, prompts=known, **more))
        elif (captions := bool(np.asarray(pairs.table["captions"])[index.rows].any())) or questions:
            more = {"captions": captions, "questions": questions, **(train if questions else {})}
            found.append(EvalSet(name, index.rows, index.hash, modality, **more))
    if split and not found:
        known = sorted({name.rpartition(".")[2] for name in names if "." in name})
        raise InputError(f"no source has rows of a split {split!r} to be judged on; {near(split, known)}")
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


def _train(pairs, name: str, tested: RowIndex, *, labelled: bool) -> dict[str, Any]:
    """Rows to train on, as fields of an `EvalSet`: none of those that are tested on where these are a part of them."""
    index = _labelled(pairs, pairs.rows(name)) if labelled else pairs.rows(name)
    if (held_out := np.isin(index.rows, tested.rows)).any():
        index = RowIndex(index.rows[~held_out], index.set_hash, index.name, {**index.made, "without": tested.name})
    return {"train_rows": index.rows, "train_hash": index.hash}


def _modality(pairs, rows: np.ndarray) -> str:
    index = np.asarray(pairs.table["modality"])[rows]
    return str(pairs.modalities[int(np.bincount(index).argmax())])
