"""The main numbers of the page, large."""

from collections.abc import Mapping, Sequence

from mmkd_jax.evals.summary import MEAN
from mmkd_jax.report.board import Board
from mmkd_jax.report.markup import Markup, duration, element, percent


def tiles(board: Board, task: str = "zeroshot", metric: str = "balanced_accuracy") -> list[Markup]:
    """The main numbers: means of the highlighted model and the best single teacher, sets won, time taken."""
    sets = [one.name for one in board.datasets(task, metric)]
    own = board.highlight
    found = []
    if MEAN in sets and own and (row := board.get(task, metric, MEAN, own.name)):
        found.append(("lead", percent(row["value"]), "%", f"{own.label}: {_where(board, task, metric)}", _range(row)))
    if MEAN in sets and (row := board.best(task, metric, MEAN, "teacher")):
        name = f"best single teacher ({board.label(row['model'])})"
        found.append(("teacher", percent(row["value"]), "%", name, _range(row)))
    duels = _duels(board, sets, task, metric)
    if duels:
        won = sum(own_value >= teacher for own_value, teacher in duels)
        words = "sets on which it is at least as good as the best teacher of that set"
        found.append(("", str(won), f"of {len(duels)}", words, None))
    if timings := board.data.get("timings"):
        total = duration(sum(seconds for _, seconds in timings))
        first, _, rest = total.partition(" ")
        found.append(("", first, rest, "from data to this page", None))
    return [
        element("div", element("strong", value, element("small", f" {unit}")), element("span", text),
                element("em", extra) if extra else None, class_=f"tile {kind}".strip())
        for kind, value, unit, text, extra in found
    ]  # fmt: skip


def _where(board: Board, task: str, metric: str) -> str:
    names = {"zeroshot": "zero-shot", "linear_probe": "linear probe"}
    return f"{names.get(task, task)} {metric.replace('_', ' ')}, {board.datasets(task, metric)[0].label.lower()}"


def _range(row: Mapping) -> str:
    return f"95 % interval {percent(row['low'])} to {percent(row['high'])}"


def _duels(board: Board, sets: Sequence[str], task: str, metric: str) -> list[tuple[float, float]]:
    rows = []
    for name in sets:
        own = board.get(task, metric, name, board.highlight.name) if board.highlight else None
        best = board.best(task, metric, name, "teacher")
        if own and best and name != MEAN:
            rows.append((own["value"], best["value"]))
    return rows
