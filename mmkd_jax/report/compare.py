"""The page of a comparison of models, and the same in lines of text."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmkd_jax.evals.summary import MEAN
from mmkd_jax.report import bars
from mmkd_jax.report.board import Board
from mmkd_jax.report.document import document, table
from mmkd_jax.report.markup import Markup, element, interval, number, percent, signed
from mmkd_jax.report.plot import main_plot

MOST_LANES = 5  # models that the plot shows a lane each; of more, teachers share one
_ABSENT = "absent"
_READING = (
    "Differences are the first model minus the other, in points, paired by case on the same resamples, with 95 % "
    "intervals. p is corrected by Holm's method over the sets; a set decides where it is below 0.05."
)


def page(record: Mapping[str, Any]) -> str:
    """The whole document as text; it loads nothing from elsewhere.

    Args:
      record: of `mmkd_jax.evals.comparison.compare`.
    """
    title = f"{_first(record)} against {len(record['models']) - 1} other" + ("s" if len(record["models"]) > 2 else "")
    header = element(
        "header",
        element("p", f"{record['task']}, {record['metric']}".replace("_", " "), class_="kicker"),
        element("h1", headline(record)),
        element("p", _READING, class_="lede"),
    )
    plots = [element("div", _plot(record, width), class_=name) for name, width in (("wide", 1000), ("narrow", 380))]
    body = [
        header,
        element("section", element("h2", "Every set"), element("figure", plots, class_="panel")),
        element("section", element("h2", "Differences"), [_bars(record, k) for k in range(len(record["models"]) - 1)]),
        element("section", element("h2", "In numbers"), _table(record), summary(record)),
        _notes(record),
    ]
    return document(title, body)


def headline(record: Mapping[str, Any]) -> str:
    """The finding in one sentence, about the other model that comes closest."""
    if not record["summary"]:
        return f"{_first(record)}: no set is common to all models"
    closest = min(record["summary"]["differences"], key=lambda one: one["value"])
    return (
        f"{_first(record)} minus {closest['other']}: {signed(closest['value'])} points "
        f"({signed(closest['low'])} to {signed(closest['high'])}), mean of {_coverage(record)}"
    )


def lines(record: Mapping[str, Any]) -> list[str]:
    """The comparison for a terminal: a line a set and other model, then the means, ranks and what is absent."""
    found = [f"{record['task']} {record['metric']}: {_first(record)} minus each other model"]
    for row in record["sets"]:
        for other, one in zip(record["models"][1:], row["differences"]):
            found.append(f"{row['dataset']:20} {other['label']:24} {_words(one)}  n={row['n']}")
    if not record["summary"]:
        return [*found, "no set is common to all models: there is no mean"]
    for one in record["summary"]["differences"]:
        test = one["wilcoxon"]
        words = f"{one['wins']} won, {one['ties']} tied, {one['losses']} lost; signed-rank p={test['p_holm']:.3g}"
        found.append(f"{'mean of ' + _coverage(record):20} {one['other']:24} {_gain(one)} p={one['p']:.3g}  {words}")
    for one in record["summary"]["models"]:
        rank = one["mean_rank"]
        found.append(f"mean rank {rank['value']:.2f} [{rank['low']:.2f}, {rank['high']:.2f}] {one['label']}")
    return found + left_out(record) + [f"note: {note}" for note in record["notes"]]


def _first(record: Mapping[str, Any]) -> str:
    return record["models"][0]["label"]


def _coverage(record: Mapping[str, Any]) -> str:
    """How many of the sets the means are over: they cannot be read without it."""
    common, every = len(record["summary"]["datasets"]), len(record["sets"])
    shown = f"{every} set" if every == 1 else f"{every} sets"
    return shown if common == every else f"{common} of {shown}"


def left_out(record: Mapping[str, Any]) -> list[str]:
    """The sets that means are not over, and who lacks them."""
    return [f"not in the means: {one['dataset']} (absent: {', '.join(one['absent'])})" for one in record["left_out"]]


def _gain(one: Mapping[str, Any]) -> str:
    return f"{signed(one['value'])} [{signed(one['low'])}, {signed(one['high'])}]"


def _words(one: Mapping[str, Any] | None) -> str:
    return _ABSENT if one is None else f"{_gain(one)} p={one['p_holm']:.3g}" + ("  decides" if one["decided"] else "")


def _plot(record: Mapping[str, Any], width: int) -> Markup:
    rows = []
    for row in record["sets"]:
        context = {"classes": row["classes"]} if row["classes"] else {}
        rows += [
            _result(record, label, row["dataset"], row["n"], v, context) for label, v in row["values"].items() if v
        ]
    for one in record["summary"]["models"] if record["summary"] else ():
        n = sum(row["n"] for row in record["sets"] if row["dataset"] in record["summary"]["datasets"])
        context = {"datasets": record["summary"]["datasets"]}
        rows.append(_result(record, one["label"], MEAN, n, one["mean"], context))
    names = [one["label"] for one in record["models"]]
    models = [{"name": name, "kind": "student"} if len(names) <= MOST_LANES else {"name": name} for name in names]
    board = Board({"rows": rows, "models": models, "highlight": names[0]})
    return main_plot(board, width, task=record["task"], metric=record["metric"])


def _result(record: Mapping, model: str, dataset: str, n: int, value: Mapping, context: dict) -> dict:
    about = {"model": model, "checkpoint": "", "dataset": dataset, "task": record["task"], "metric": record["metric"]}
    return {**about, **value, "n": n, "seed": record["seed"], "context": context}


def _bars(record: Mapping[str, Any], k: int) -> Markup:
    """The sets in the order of their difference to one other model, the mean first, absent ones named."""
    other = record["models"][k + 1]["label"]
    given = [(row["dataset"], row["differences"][k]) for row in record["sets"] if row["differences"][k]]
    given.sort(key=lambda one: -one[1]["value"])
    labelled = [(name + (" (decides)" if one["decided"] else ""), one) for name, one in given]
    if record["summary"]:
        labelled.insert(0, (f"mean of {_coverage(record)}", record["summary"]["differences"][k]))
    shown = [{"label": label, **{key: one[key] for key in ("value", "low", "high")}} for label, one in labelled]
    gone = [row["dataset"] for row in record["sets"] if not row["differences"][k]]
    note = element("p", f"Absent: {', '.join(gone)}.", class_="note") if gone else None
    return element("div", element("h3", f"minus {other}"), bars.differences(shown), note, class_="panel padded")


def _table(record: Mapping[str, Any]) -> Markup:
    labels = [one["label"] for one in record["models"]]
    columns = ["Set", "n", *labels, *(f"minus {label}" for label in labels[1:])]
    body = []
    for row in record["sets"]:
        values = [row["values"][label] for label in labels]
        cells = [_cell(percent(v["value"]), interval(v)) if v else element("td", _ABSENT) for v in values]
        for one in row["differences"]:
            cells.append(_cell(signed(one["value"]), _p(one), bool(one["decided"])) if one else element("td", _ABSENT))
        body.append(element("tr", element("th", row["dataset"], scope="row"), element("td", row["n"]), cells))
    caption = f"{record['metric'].replace('_', ' ')}, in percent, and differences in points"
    return table(caption, columns, body)


def summary(record: Mapping[str, Any]) -> Markup | None:
    """Mean ranks, means, differences from the first model, wins and losses; None where no set is common."""
    if not record["summary"]:
        return None
    columns = ["Model", "Mean rank", "Mean", "Difference", "over sets too", "won, tied, lost", "signed-rank p", "least"]
    differences = {one["other"]: one for one in record["summary"]["differences"]}
    body = []
    for one in record["summary"]["models"]:
        rank, mean = one["mean_rank"], one["mean"]
        cells = [_cell(number(rank["value"]), f"{number(rank['low'])} to {number(rank['high'])}")]
        cells.append(_cell(percent(mean["value"]), interval(mean)))
        if found := differences.get(one["label"]):
            wide, test = found["over_sets"], found["wilcoxon"]
            cells.append(_cell(signed(found["value"]), f"{signed(found['low'])} to {signed(found['high'])}"))
            cells.append(element("td", f"{signed(wide['low'])} to {signed(wide['high'])}"))
            cells.append(element("td", f"{found['wins']}, {found['ties']}, {found['losses']}"))
            cells += [element("td", f"{test['p_holm']:.3g}"), _least(found["without"])]
        else:
            cells += [element("td", "–")] * 5
        body.append(element("tr", element("th", one["label"], scope="row"), cells))
    words = "Over the sets that all models have. “Over sets too”: an interval that covers the choice of sets. "
    words += "“Least”: the mean difference without the set that carries most of it."
    shown = table(f"Means of {_coverage(record)}", columns, body)
    return element("div", element("p", words, class_="note"), shown)


def _least(without: Sequence[Mapping[str, Any]]) -> Markup:
    """The mean difference nearest to 0 or beyond it that leaving out one set can make."""
    if not without:
        return element("td", "–")
    sign = 1 if sum(one["value"] for one in without) >= 0 else -1
    least = min(without, key=lambda one: sign * one["value"])
    return _cell(signed(least["value"]), f"without {least['dataset']}")


def _notes(record: Mapping[str, Any]) -> Markup | None:
    notes = [*left_out(record), *record["notes"]]
    shown = element("ul", [element("li", note) for note in notes], class_="notes")
    return element("section", element("h2", "Read with care"), shown) if notes else None


def _p(one: Mapping[str, Any]) -> str:
    return f"{signed(one['low'])} to {signed(one['high'])}, p {one['p_holm']:.2g}"


def _cell(text: str, small: str, strong: bool = False) -> Markup:
    return element("td", element("b", text) if strong else text, element("small", small))
