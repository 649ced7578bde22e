"""Examples for the report, from a run's predictions and the pictures of its pairs set."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd_jax import preprocess
from mmkd_jax.errors import InputError
from mmkd_jax.evals import results
from mmkd_jax.report.board import thumbnail


def examples(out, model: str, pairs, dataset: str, *, queries: int = 4, top: int = 3, seed: int = 0) -> dict[str, Any]:
    """Queries drawn at random from different groups, in both directions, with the best answers.

    Args:
      out: folder with `predictions/`.
      model: name in the results.
      pairs: the pairs set that was evaluated.
      dataset: name of a retrieved set.
      queries: number of queries a direction.
      top: answers a query.
      seed: of the draw.

    Returns:
      `{"model", "dataset", "i2t": [{"image", "caption", "rank", "pool", "top": [{"caption", "cosine", "right"}]}],
      "t2i": [{"caption", "rank", "pool", "top": [{"image", "caption", "cosine", "right"}]}]}`, images as data URIs.

    Raises:
      InputError: the set was not retrieved with this model, or fewer than one query is asked for.
    """
    if queries < 1 or top < 1:
        raise InputError("examples need at least one query and one answer")
    stored = results.load_predictions(out, model, dataset, "retrieval")
    texts, caption_of, groups = stored["texts"].tolist(), stored["caption_of"], stored["groups"]
    said = set(zip(groups.tolist(), caption_of.tolist()))
    pictures = {}

    def image(i: int) -> str:
        if i not in pictures:
            pictures[i] = thumbnail(preprocess.decode(pairs.read(int(stored["rows"][i])).image))
        return pictures[i]

    drawn = _draw(groups, 2 * queries, seed)
    found = {"model": model, "dataset": dataset, "i2t": [], "t2i": []}
    for i in drawn[:queries]:
        answers = [
            {"caption": texts[j], "cosine": float(cosine), "right": (int(groups[i]), int(j)) in said}
            for j, cosine in list(zip(stored["i2t_best"][i], stored["i2t_cosine"][i]))[:top]
        ]
        about = {"image": image(i), "caption": texts[caption_of[i]], "rank": int(stored["i2t_rank"][i])}
        found["i2t"].append({**about, "pool": len(texts), "top": answers})
    for j in caption_of[drawn[queries:] or drawn]:
        answers = [
            {"image": image(int(i)), "caption": texts[caption_of[i]], "cosine": float(cosine),
             "right": (int(groups[i]), int(j)) in said}
            for i, cosine in list(zip(stored["t2i_best"][j], stored["t2i_cosine"][j]))[:top]
        ]  # fmt: skip
        about = {"caption": texts[j], "rank": int(stored["t2i_rank"][j])}
        found["t2i"].append({**about, "pool": len(caption_of), "top": answers})
    return found


def cases(
    out,
    model: str,
    pairs,
    dataset: str,
    classes: Sequence[str],
    *,
    each: int = 6,
    task: str = "zeroshot",
    seed: int = 0,
) -> dict[str, Any]:
    """Pictures that a classification had right and wrong, drawn at random from different groups.

    Args:
      out: folder with `predictions/`.
      model: name in the results.
      pairs: the pairs set that was evaluated.
      dataset: name of a classified set.
      classes: its class names.
      each: pictures at most, of those right and of those wrong.
      task: whose scores.
      seed: of the draw.

    Returns:
      `{"model", "dataset", "accuracy", "right": [...], "wrong": [...]}`, of `{"image", "truth", "answer", "score"}`.

    Raises:
      InputError: the set was not classified with this model, or not on rows of these pairs.
    """
    stored = results.load_predictions(out, model, dataset, task)
    rows = {name: row for row, name in enumerate(np.asarray(pairs.table["id"]).astype(str).tolist())}
    answers, right = stored["scores"].argmax(axis=1), stored["scores"].argmax(axis=1) == stored["labels"]
    found = {"model": model, "dataset": dataset, "accuracy": float(right.mean())}
    for name, those in (("right", np.flatnonzero(right)), ("wrong", np.flatnonzero(~right))):
        found[name] = []
        for i in those[_draw(stored["groups"][those], each, seed)]:
            if stored["ids"][i] not in rows:
                raise InputError(f"{dataset} was evaluated on other rows (id {stored['ids'][i]}); evaluate it again")
            picture = preprocess.decode(pairs.read(rows[stored["ids"][i]]).image)
            words = {"truth": classes[stored["labels"][i]], "answer": classes[answers[i]]}
            found[name].append({"image": thumbnail(picture), **words, "score": float(stored["scores"][i, answers[i]])})
    return found


def _draw(groups: np.ndarray, count: int, seed: int) -> list[int]:
    """Up to `count` rows of different groups."""
    order = np.random.default_rng(seed).permutation(len(groups))
    _, first = np.unique(groups[order], return_index=True)
    return [int(i) for i in order[np.sort(first)]][:count]
