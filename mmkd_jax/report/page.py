"""The page: sections in reading order, one style sheet, nothing from elsewhere."""

from collections.abc import Mapping
from typing import Any

from mmkd_jax.report import bars, compare, curves, further, ranks, reliability, tables, tiles, vqa
from mmkd_jax.report.board import Board
from mmkd_jax.report.document import document
from mmkd_jax.report.markup import Markup, element
from mmkd_jax.report.plot import main_plot

TASK, METRIC = "zeroshot", "balanced_accuracy"


def page(data: Mapping[str, Any]) -> str:
    """The whole document as text."""
    board = Board(data)
    title = data.get("title") or "mmkd_jax report"
    scores = [_main(board), _ranks(board), _tables(board), _calibration(board), _cases(board), _retrieval(board)]
    scores.append(_section("Questions about pictures", None, *vqa.section(board), name="questions"))
    lede = "As results.json has them, with 95 % intervals below."
    scores.append(_section("Further numbers", lede, *further.sections(board), name="further"))
    return document(title, [_hero(board, title), *scores, _training(board), _about(board)])


def _section(title: str, lede: str | None, *content, name: str) -> Markup | None:
    if not any(content):
        return None
    intro = element("p", lede, class_="lede") if lede else None
    return element("section", element("h2", title), intro, content, id=name)


def _hero(board: Board, title: str) -> Markup:
    headline, lede = board.data.get("headline"), board.data.get("lede")
    return element(
        "header",
        element("p", title, class_="kicker"),
        element("h1", headline or title),
        element("p", lede, class_="lede") if lede else None,
        element("div", tiles.tiles(board, TASK, METRIC), class_="tiles"),
    )


def _main(board: Board) -> Markup | None:
    plots = None
    if board.datasets(TASK, METRIC):
        wide = element("div", main_plot(board, 1000), class_="wide")
        narrow = element("div", main_plot(board, 380), class_="narrow")
        plots = element("figure", wide, narrow, class_="panel")
    compared = None
    if records := board.data.get("differences"):
        words = "Mean over sets, paired by case on the same resamples; in points of balanced accuracy, 95 % intervals."
        compared = element(
            "div", element("h3", "Differences"), element("p", words, class_="note"), bars.differences(records),
            class_="panel padded",
        )  # fmt: skip
    return _section("Who is better where", None, plots, compared, name="scores")


def _ranks(board: Board) -> list[Markup | None]:
    """Over many sets: by modality, ranks, wins and losses, a part for each task that was compared."""
    modal = ranks.modalities(board, TASK, METRIC)
    lede = "The mean over a modality's sets, each set alike. Bold: the best of the column."
    sections = [_section("By modality", lede, modal, name="modalities")]
    for record in board.data.get("comparisons", ()):
        words = f"{record['task']}, {record['metric']}".replace("_", " ")
        lede = (
            f"By {words}: 1 is best, equals share a rank. Differences: {record['models'][0]['label']} minus the model."
        )
        shown = [compare.summary(record), ranks.duels(record)]
        title = f"Ranks: {record['task']}".replace("_", " ")
        sections.append(_section(title, lede, *shown, name=f"ranks-{record['task']}"))
    return sections


def _calibration(board: Board) -> Markup | None:
    measured = board.data.get("calibration", ())
    drawn = [element("figure", one, class_="panel") for one in reliability.panels(board, measured)]
    lede = "On the dotted line, answers are right as often as their probability says; below it, they are too sure. "
    lede += "Zero-shot, over the sets that all models have, each set alike; larger dots hold more answers."
    shown = element("div", drawn, class_="multiples") if drawn else None
    return _section("Whether probabilities can be believed", lede, shown, name="calibration")


def _cases(board: Board) -> Markup | None:
    shown = tables.cases(board.data.get("cases", ()))
    lede = "Drawn at random, not chosen: first what the model of each set's best zero-shot score had right, then wrong."
    return _section("Right and wrong", lede, *shown, name="cases")


def _tables(board: Board) -> list[Markup | None]:
    words = {
        "zeroshot": ("Zero-shot, in numbers", "Balanced accuracy in percent from prompts alone; 95 % intervals below."),
        "linear_probe": (
            "Linear probe",
            "Logistic regression on frozen image features, strength chosen on a part of the training images.",
        ),
    }
    sections = []
    for task, (title, lede) in words.items():
        others = [(name, tables.scores(board, task, name)) for name in ("accuracy", "macro_f1", "macro_auc")]
        more = [table for _, table in others if table]
        folded = element("details", element("summary", "Accuracy, macro F1, AUC"), more) if more else None
        sections.append(_section(title, lede, tables.scores(board, task, METRIC), folded, name=task))
    return sections


def _retrieval(board: Board) -> list[Markup | None]:
    strict = tables.retrieval(board, strict=True)
    summary = element("summary", "Strict reading: only an item's own partner counts")
    folded = element("details", summary, element("div", strict, class_="pair")) if strict else None
    merged = element("div", tables.retrieval(board, strict=False), class_="pair")
    lede = "Held-out pairs. Recall at 1, 5 and 10 in percent, and the median rank. A case's own items count as right."
    numbers = _section("Retrieval", lede, merged if strict or "<table" in merged else None, folded, name="retrieval")
    shown = tables.examples(board.data.get("examples", ()))
    lede = "Queries drawn at random, not chosen. The number is the cosine."
    return [numbers, _section("What it finds", lede, *shown, name="examples")]


def _training(board: Board) -> list[Markup | None]:
    drawn = curves.panels(board, board.data.get("curves", {}), board.data.get("curve_metrics", ()))
    panels = element("div", [element("figure", one, class_="panel") for one in drawn], class_="multiples")
    lede = "Thin: as logged. Thick: running mean. Each panel has its own scale."
    timings = board.data.get("timings")
    stages = element("div", bars.timeline(timings), class_="panel padded") if timings else None
    return [
        _section("Training", lede, panels if drawn else None, name="training"),
        _section("Where the time went", None, stages, name="time"),
    ]


def _about(board: Board) -> list[Markup | None]:
    notes = [element("li", note) for note in board.data.get("notes", ())]
    provenance = board.data.get("provenance", {})
    return [
        _section("Read with care", None, element("ul", notes, class_="notes") if notes else None, name="notes"),
        _section("Provenance", None, _facts(provenance) if provenance else None, name="provenance"),
    ]


def _facts(record: Mapping) -> Markup:
    """Nested facts as definition lists."""
    parts = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            shown = _facts(value)
        elif isinstance(value, list | tuple):
            shown = element("ul", [element("li", _facts(v) if isinstance(v, Mapping) else v) for v in value])
        else:
            shown = value
        parts.append(element("div", element("dt", key), element("dd", shown)))
    return element("dl", parts)
