"""Visual questions on the page: how many answers are right, what of it needs the picture, and some to look at."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmkd_jax import preprocess
from mmkd_jax.errors import InputError
from mmkd_jax.evals import bootstrap, results, stored_cases
from mmkd_jax.report import bars
from mmkd_jax.report.board import Board, picture, thumbnail
from mmkd_jax.report.document import table
from mmkd_jax.report.markup import Markup, element, interval, percent, signed

SHOWN = 6  # examples of right answers, and of wrong ones
_TITLES = {
    "vqa": "Trained on frozen features, tested on other pictures",
    "vqa_fusion": "Cross-attention between words and patches, trained on frozen towers, tested on other pictures",
    "vqa_fusion_unfrozen": "Cross-attention, trained together with the towers, tested on other pictures",
    "vqa_zeroshot": "Without training: each answer as a statement",
    "vqa_pubmedclip": "As PubMedCLIP counts: the published split, which shares pictures",
}
_COLUMNS = {
    "accuracy": "All", "closed_accuracy": "Closed", "open_accuracy": "Open", "open_token_f1": "Open, token F1",
    "open_bleu1": "Open, BLEU-1", "yes_no_accuracy": "Yes or no", "yes_no_auc": "Yes or no, AUC",
    "blind_accuracy": "All, without the picture", "picture_gain": "Gained by the picture",
}  # fmt: skip
_READING = (
    "Percent of answers that are the true one word for word, after both are spelled alike; 95 % intervals below, over "
    "pictures. Closed questions allow a few answers, open ones any. Without the picture: the same method on the "
    "question alone; what it gains beside that is what the model sees."
)


def measure(out, rows: Sequence[Mapping], resamples: int = 1000) -> list[dict[str, Any]]:
    """Accuracy of the best model of each set and task less that of each other one, paired by question.

    Args:
      out: folder with `predictions/`.
      rows: result rows; those of other tasks are not looked at.
      resamples: of the intervals.

    Returns:
      `{"dataset", "task", "first", "differences": [{"label", "value", "low", "high"}]}` for every set and task that two
      models were asked the same questions of.
    """
    found = []
    for task, dataset in dict.fromkeys((r["task"], r["dataset"]) for r in rows if r["task"] in _TITLES):
        own = [r for r in rows if (r["task"], r["dataset"], r["metric"]) == (task, dataset, "accuracy")]
        own.sort(key=lambda row: -row["value"])
        differences = []
        for other in own[1:]:
            with contextlib.suppress(InputError):  # predictions that are not there, or of other questions
                differences.append(_difference(out, own[0], other, resamples))
        if differences:
            found.append({"dataset": dataset, "task": task, "first": own[0]["model"], "differences": differences})
    return found


def _difference(out, first: Mapping, other: Mapping, resamples: int) -> dict[str, Any]:
    a, b = (results.load_predictions(out, row["model"], row["dataset"], row["task"]) for row in (first, other))
    if not np.array_equal(a["ids"], b["ids"]):
        raise InputError(f"{first['model']} and {other['model']} were asked different questions")
    seed = bootstrap.seed_of(first["seed"], first["dataset"], *a["ids"].tolist())
    drawn = bootstrap.draw(len(a["ids"]), resamples, seed, units=a["groups"])
    both, seed = [], bootstrap.seed_of(first["seed"], first["dataset"], "seeds")
    for one in (a, b):
        value, resampled = stored_cases.of_questions(stored_cases.questions(one), "accuracy")
        both.append(bootstrap.Estimate(value, resampled(drawn, seed)))
    estimate = bootstrap.difference(*both)
    low, high = estimate.interval()
    return {"label": f"minus {other['model']}", "value": estimate.value, "low": low, "high": high}


def headed(rows: Sequence[Mapping]) -> dict[str, str]:
    """The page's headline and what stands below it, of the best model; {} without questions."""
    found = [row for row in rows if row["task"] == "vqa" and row["metric"] == "accuracy"]
    if not found:
        return {}
    best = max(found, key=lambda row: row["value"])
    said = {"headline": f"{best['model']}: {percent(best['value'])} % of questions on {best['dataset']} right"}
    same = [row for row in rows if all(row[name] == best[name] for name in ("task", "dataset", "model"))]
    for gain in (row for row in same if row["metric"] == "picture_gain"):
        words = f"{signed(gain['value'])} points ({signed(gain['low'])} to {signed(gain['high'])})"
        said["lede"] = f"Seeing the picture changes that by {words}, beside the same method on the question alone."
    return said


def cases(out, rows: Sequence[Mapping], pairs, dataset: str, seed: int = 0) -> dict[str, Any] | None:
    """Questions that the set's best model had right and wrong, drawn at random from different pictures.

    Returns:
      `{"model", "dataset", "accuracy", "right": [...], "wrong": [...]}`, of
      `{"image", "question", "truth", "answer", "blind"}`; None where the set was asked nothing.

    Raises:
      InputError: predictions are missing, or are on rows that `pairs` has not.
    """
    own = [r for r in rows if (r["task"], r["dataset"], r["metric"]) == ("vqa", dataset, "accuracy")]
    if not own:
        return None
    best = max(own, key=lambda row: row["value"])
    stored = results.load_predictions(out, best["model"], dataset, "vqa")
    right = stored["answers"] == stored["truth"]
    found: dict[str, Any] = {"model": best["model"], "dataset": dataset, "accuracy": float(right.mean())}
    order = np.random.default_rng(seed).permutation(len(right))
    used: set[int] = set()
    for name, those in (("right", order[right[order]]), ("wrong", order[~right[order]])):
        found[name] = []
        for i in those.tolist():
            if len(found[name]) < SHOWN and int(stored["groups"][i]) not in used:
                used.add(int(stored["groups"][i]))
                found[name].append(_example(pairs, stored, i))
    return found


def _example(pairs, stored: Mapping[str, np.ndarray], i: int) -> dict[str, Any]:
    pair = pairs.read(int(stored["rows"][i]))
    if str(pairs.table["id"][int(stored["rows"][i])]) != str(stored["ids"][i]).partition("/")[0]:
        raise InputError("the questions were asked on other rows; evaluate the set again")
    words = {"question": "questions", "truth": "truth", "answer": "answers", "blind": "blind"}
    texts = {name: str(stored[key][i]) for name, key in words.items()}
    return {"image": thumbnail(preprocess.decode(pair.image)), **texts}


def section(board: Board) -> list[Markup]:
    """The content of the page's part on questions; [] without."""
    parts: list[Markup] = []
    for task, title in _TITLES.items():
        for one in board.datasets(task, "accuracy"):
            caption = f"{one.label}: {title}"
            parts += [_table(board, task, one.name, caption), *_differences(board, task, one.name)]
    for block in board.data.get("questions", ()):
        parts += _cases(block)
    return [element("p", _READING, class_="note"), *parts] if parts else []


def _table(board: Board, task: str, dataset: str, caption: str) -> Markup:
    models = [model for model in board.models if board.get(task, "accuracy", dataset, model.name)]
    shown = [name for name in _COLUMNS if any(board.get(task, name, dataset, model.name) for model in models)]
    if task == "vqa_zeroshot":
        shown.remove("accuracy")  # only closed questions are asked
    body = []
    for model in models:
        cells = [_number(board.get(task, name, dataset, model.name), name) for name in shown]
        body.append(_line(model.label, cells))
    context = next(r["context"] for r in board.rows if (r["task"], r["dataset"]) == (task, dataset))
    common = context.get("commonest_answer", {})
    if common:
        known = {f"{kind}_accuracy": element("td", percent(value)) for kind, value in common.items()}
        body.append(_line("always the commonest answer", [known.get(name, element("td", "–")) for name in shown]))
    asked = max(row["n"] for row in board.rows if (row["task"], row["dataset"]) == (task, dataset))
    note = [f"{asked} questions on {context.get('pictures')} pictures"]
    if context.get("seeds", 1) > 1:
        note.append(f"means of {context['seeds']} training seeds; intervals are over pictures and seeds")
    if context.get("shared_pictures"):
        note.append(f"{context['shared_pictures']} of the pictures are also trained on, which makes numbers too high")
    if "open" in (reachable := context.get("reachable", {})):
        note.append(
            f"{percent(reachable['open'])} % of open test questions have an answer that training questions have"
        )
    headings = ["Model", *(_COLUMNS[name] for name in shown)]
    return element("div", table(caption, headings, body), element("p", "; ".join(note) + ".", class_="note"))


def _line(name: str, cells: Sequence[Markup]) -> Markup:
    return element("tr", element("th", name, scope="row"), list(cells))


def _number(row: Mapping | None, name: str) -> Markup:
    if row is None:
        return element("td", "–")
    if name == "picture_gain":
        return element("td", signed(row["value"]), element("small", f"{signed(row['low'])} to {signed(row['high'])}"))
    return element("td", percent(row["value"]), element("small", interval(row)))


def _differences(board: Board, task: str, dataset: str) -> list[Markup]:
    for one in board.data.get("vqa", ()):
        if (one["task"], one["dataset"]) == (task, dataset):
            title = f"{board.label(one['first'])} minus the others, in points of accuracy, paired by question"
            return [element("div", element("h3", title), bars.differences(one["differences"]), class_="panel padded")]
    return []


def _cases(block: Mapping) -> list[Markup]:
    rows = [element("div", [_case(one, kind) for one in block[kind]], class_="gallery") for kind in ("right", "wrong")]
    title = f"{block['dataset']}: {block['model']}, {percent(block['accuracy'])} % right, drawn at random"
    return [element("h3", title.replace("_", " ")), element("div", rows, class_="panel padded")]


def _case(item: Mapping, kind: str) -> Markup:
    verdict = element("span", "✓ right" if kind == "right" else "✗ wrong", class_="verdict")
    truth = None if kind == "right" else element("div", "true: ", element("q", item["truth"]))
    blind = element("small", "without the picture: ", element("q", item["blind"]))
    image = element("img", src=picture(item["image"]), alt=item["question"], loading="lazy")
    said = [element("b", item["question"]), element("div", verdict, " ", element("q", item["answer"])), truth, blind]
    words = element("figcaption", said)
    return element("figure", image, words, class_=kind)
