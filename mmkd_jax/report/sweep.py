"""The page of a sweep: its table, and a plot of each main number with intervals over training seeds."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.report import curves
from mmkd_jax.report.document import document
from mmkd_jax.report.markup import Markup, element, number
from mmkd_jax.report.plot import css
from mmkd_jax.sweeps.table import TRAIN, column, headline, key

LANE = 30  # pixels of a setting
MOST = 12  # plots on the page
NOTE = (
    "Large: mean over training seeds. Small: each seed. Bars: 95 % interval over seeds (Student's t, the test cases as "
    "they are); of a single seed the bar is that of its test cases, where there is one."
)


def write(folder: str | os.PathLike, table: Mapping[str, Any]) -> None:
    """Writes FOLDER/report.html and FOLDER/sweep.svg (the first of the main numbers), atomically.

    Args:
      folder: the sweep's.
      table: of `mmkd_jax.sweeps.table.collect`.
    """
    folder = io.as_path(folder)
    io.write_text(folder / "report.html", page(table))
    if names := headline(table):
        io.write_text(folder / "sweep.svg", plot(table, names[0], 1000, alone=True) + "\n")


def page(table: Mapping[str, Any]) -> str:
    """The whole document as text; it loads nothing from elsewhere."""
    names = headline(table)
    missing = table["missing"]
    title = f"Sweep {table['title']}"
    words = f"{len(table['runs'])} runs, {len(table['settings'])} settings."
    if missing:
        words += f" Missing: {', '.join(missing)}."
    plots = [
        element("figure", element("div", plot(table, name, 1000), class_="wide"),
                element("div", plot(table, name, 380), class_="narrow"), class_="panel")
        for name in names[:MOST]
    ]  # fmt: skip
    others = [k for k in dict.fromkeys(key(v) for s in table["settings"] for v in s["values"]) if k not in names]
    more = element("details", element("summary", "Everything else"), _table(table, others)) if others else None
    body = [
        element("header", element("p", "mmkd_jax sweep", class_="kicker"), element("h1", title),
                element("p", words, class_="lede")),
        element("section", element("h2", "Plots"), element("p", NOTE, class_="lede"), plots),
        element("section", element("h2", "Table"), _table(table, names), more),
        element("section", element("h2", "Runs"), _runs(table, names)),
    ]  # fmt: skip
    return document(title, body)


def plot(table: Mapping[str, Any], name: tuple[str, str, str], width: int, *, alone: bool = False) -> Markup:
    """One number of every setting as an `<svg>` dot plot.

    Args:
      table: of `mmkd_jax.sweeps.table.collect`.
      name: (task, dataset, metric) of the number.
      width: pixels; below 600 the settings stand above their marks.
      alone: with its own background and styles, to stand as a file.
    """
    rows = [(one["label"], v) for one in table["settings"] for v in one["values"] if key(v) == name]
    narrow = width < 600
    left, right, top = (20, width - 22, 60) if narrow else (400, width - 110, 60)
    lane = LANE + 20 if narrow else LANE
    bottom = top + lane * len(rows)
    reach = [x for _, v in rows for x in (v["low"], v["high"], v["value"], *v["each"]) if x is not None]
    low, high = min(reach), max(reach)
    pad = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = low - pad, high + pad

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    parts = []
    for tick in curves._ticks(low, high):
        parts.append(element("line", x1=x(tick), x2=x(tick), y1=top, y2=bottom, class_="grid"))
        parts.append(element("text", number(tick), x=x(tick), y=bottom + 17, text_anchor="middle", class_="tiny"))
    for place, (label, value) in enumerate(rows):
        y = top + lane * (place + 0.5) + (10 if narrow else 0)
        parts.append(_marks(label, value, x, y))
        at = {"x": left, "y": y - 17} if narrow else {"x": 20, "y": y + 4}
        room = 42 if narrow else 46
        shown = label if len(label) <= room else label[: room - 1] + "…"
        parts.append(element("text", shown, element("title", label), class_="name", **at))
        if not narrow:
            parts.append(element("text", number(value["value"]), x=right + 20, y=y + 4, class_="gain"))
    title, height = column(name), math.ceil(bottom + 32)
    heading = element("text", title, x=20, y=32, class_="name" if narrow else "title")
    words = ". ".join(f"{label}: {number(value['value'])}" for label, value in rows)
    style = element("style", css("theme", "chart")) if alone else None
    paper = element("rect", width=width, height=height, rx=10, class_="paper") if alone else None
    return element(
        "svg", element("title", title), element("desc", words), style, paper, heading, parts,
        xmlns="http://www.w3.org/2000/svg", class_="chart", viewBox=f"0 0 {width} {height}",
        width=width if alone else None, height=height if alone else None, role="img", aria_label=title,
    )  # fmt: skip


def _marks(label: str, value: Mapping[str, Any], x, y: float) -> Markup:
    tip = f"{label}: {number(value['value'])}"
    bar = None
    if value["low"] is not None:
        tip += f" ({number(value['low'])} to {number(value['high'])})"
        bar = element("line", x1=x(value["low"]), x2=x(value["high"]), y1=y, y2=y, class_="whisker")
    seeds = [element("circle", cx=x(one), cy=y, r=3, class_="hollow") for one in value["each"]]
    mean = element("circle", cx=x(value["value"]), cy=y, r=6, class_="mark")
    return element("g", element("title", tip), bar, mean, seeds if len(seeds) > 1 else None, class_="s0")


def _table(table: Mapping[str, Any], names: Sequence[tuple[str, str, str]]) -> Markup:
    head = element("tr", [element("th", text, scope="col") for text in ("Setting", "Seeds", *map(column, names))])
    body = []
    for one in table["settings"]:
        found = {key(value): value for value in one["values"]}
        cells = [element("th", one["label"], scope="row"), element("td", one["seeds"])]
        cells += [_cell(found.get(name)) for name in names]
        body.append(element("tr", cells))
    return _scroll("Means over training seeds", head, body)


def _runs(table: Mapping[str, Any], names: Sequence[tuple[str, str, str]]) -> Markup:
    head = element("tr", [element("th", text, scope="col") for text in ("Run", *map(column, names))])
    body = []
    for one in table["runs"]:
        found = {key(value): value for value in one["values"]}
        body.append(element("tr", element("th", one["name"], scope="row"), [_cell(found.get(name)) for name in names]))
    return _scroll("Every run", head, body)


def _cell(value: Mapping[str, Any] | None) -> Markup:
    if value is None:
        return element("td", "–")
    span = None
    if value["low"] is not None:
        span = element("small", f"{number(value['low'])} to {number(value['high'])}")
    digits = number(value["value"]) if value["task"] != TRAIN else f"{value['value']:.4g}"
    return element("td", digits, span)


def _scroll(caption: str, head: Markup, body: list[Markup]) -> Markup:
    shown = element("table", element("caption", caption), element("thead", head), element("tbody", body))
    return element("div", shown, class_="scroll", tabindex=0, role="region", aria_label=caption)
