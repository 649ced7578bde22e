"""Plots of stored features: where each teacher is strong, and how far teachers agree, modality by modality."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd_jax.report.markup import Markup, element
from mmkd_jax.report.plot import mark

Record = Mapping[str, Any]

_COLOURS = ("s0", "s1", "s2", "s3", "s4", "best", "c")
_SHAPES = ("circle", "square", "triangle", "diamond", "pentagon", "cross")
_ROW, _CELL = 34, 30  # pixels


def dots(record: Record, value: str, title: str, width: int) -> Markup:
    """A row for each modality, in it a mark for each feature set.

    Args:
      record: of `mmkd_jax.data.agreement.measure`.
      value: `r_at_1` or `matched`.
      title: what it is called.
      width: pixels; below 600 the modalities stand above their rows.
    """
    narrow = width < 600
    left, right, head = (20, width - 20, 18) if narrow else (200, width - 30, 0)
    low, high = _range(record, value)
    legend, top = _legend(list(record["sets"]), width, 44)
    bottom = top + (_ROW + head) * len(record["modalities"])

    def x(number: float) -> float:
        return left + (right - left) * (number - low) / (high - low)

    parts = [element("text", title, x=20, y=26, class_="title"), legend]
    for tick in range(round(5 * low), round(5 * high) + 1):
        at = x(tick / 5)
        parts.append(element("line", x1=at, x2=at, y1=top, y2=bottom, class_="grid"))
        text = f"{tick / 5:.1f}".replace("-", "−")
        parts.append(element("text", text, x=at, y=bottom + 17, text_anchor="middle", class_="tiny"))
    for row, modality in enumerate(record["modalities"]):
        y = top + (_ROW + head) * row
        parts += _row(record, modality, value, x, y + head + _ROW / 2, 20, y + 14 if narrow else y + _ROW / 2 + 4)
        parts.append(element("line", x1=20, x2=width - 20, y1=y + head + _ROW, y2=y + head + _ROW, class_="rule"))
    return _svg(title, width, bottom + 28, parts)


def grid(record: Record, modality: str | None) -> Markup | None:
    """How far every two feature sets agree, as a square of shades; None where nothing is known."""
    names = list(record["sets"])
    found = {}
    for one in record["pairs"]:
        number = one["agreement"] if modality is None else one["by_modality"].get(modality)
        if number is not None:
            found[one["sets"][0], one["sets"][1]] = found[one["sets"][1], one["sets"][0]] = number
    if not found:
        return None
    left, top = 150, 56
    title = modality or "all modalities"
    parts = [element("text", title, x=14, y=24, class_="name")]
    for i, row in enumerate(names):
        middle = top + _CELL * i + _CELL / 2 + 4
        parts.append(
            element("text", _cut(f"{i + 1} {row}", 20), x=left - 8, y=middle, text_anchor="end", class_="tiny")
        )
        at = left + _CELL * i + _CELL / 2
        parts.append(element("text", i + 1, x=at, y=top - 8, text_anchor="middle", class_="tiny"))
        for j, column in enumerate(names):
            parts.append(
                _cell(row, column, 1.0 if i == j else found.get((row, column)), left + _CELL * j, top + _CELL * i)
            )
    side = _CELL * len(names)
    return _svg(f"Agreement, {title}", left + side + 16, top + side + 14, parts)


def _row(record: Record, modality: str, value: str, x, middle: float, left: float, label: float) -> list[Markup]:
    """The marks of a modality, and its name with the largest number of pairs that a set has of it."""
    found = {name: one["by_modality"].get(modality) for name, one in record["sets"].items()}
    pairs = max((one["rows"] for one in found.values() if one), default=0)
    small = element("tspan", f"  {pairs} pairs", class_="tiny")
    parts = [element("text", modality, small, x=left, y=label, class_="name")]
    for place, (name, one) in enumerate(found.items()):
        if one and one[value] is not None:
            tip = element("title", f"{name}, {modality}: {one[value]:.3f}")
            apart = min(2.5, 22 / len(found)) * (place - (len(found) - 1) / 2)  # pixels: equal ones stay in sight
            shape = mark(_shape(place), x(one[value]), middle + apart, 5)
            parts.append(element("g", tip, shape, class_=_colour(place)))
    return parts


def _cell(row: str, column: str, number: float | None, x: float, y: float) -> Markup:
    if number is None:
        return element("text", "–", x=x + _CELL / 2, y=y + _CELL / 2 + 4, text_anchor="middle", class_="tiny")
    tip = element("title", f"{row} and {column}: {number:.3f}")
    depth = 0.04 + 0.46 * min(max(number, 0.0), 1.0)
    shade = f"fill:rgb(var(--shade) / {depth:.3f})"
    square = element("rect", x=x + 1, y=y + 1, width=_CELL - 2, height=_CELL - 2, rx=4, style=shade)
    text = f"{100 * number:.0f}".replace("-", "−")
    words = element("text", text, x=x + _CELL / 2, y=y + _CELL / 2 + 4, text_anchor="middle", class_="tiny")
    return element("g", tip, square, words)


def _range(record: Record, value: str) -> tuple[float, float]:
    """Fifths that hold all values and 0; up to 1 for shares."""
    found = [m[value] for one in record["sets"].values() for m in one["by_modality"].values() if m[value] is not None]
    low = math.floor(5 * min([*found, 0.0]) - 1e-9) / 5 if min([*found, 0.0]) < 0 else 0.0
    high = 1.0 if value == "r_at_1" else math.ceil(5 * max([*found, 0.2]) - 1e-9) / 5
    return low, high


def _legend(names: Sequence[str], width: int, y: float) -> tuple[list[Markup], float]:
    """Marks with names, in as many lines as they need, and where they end."""
    parts, x = [], 20.0
    for place, name in enumerate(names):
        wide = 36 + 6.4 * len(name)
        if x > 20 and x + wide > width - 12:
            x, y = 20.0, y + 22
        parts.append(element("g", mark(_shape(place), x + 7, y + 6, 5), class_=_colour(place)))
        parts.append(element("text", name, x=x + 18, y=y + 10.5, class_="soft"))
        x += wide
    return parts, y + 24


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


def _shape(place: int) -> str:
    return _SHAPES[place % len(_SHAPES)]


def _svg(title: str, width: float, height: float, parts: Sequence) -> Markup:
    return element(
        "svg", element("title", title), list(parts), class_="chart", viewBox=f"0 0 {width:.0f} {math.ceil(height)}",
        role="img", aria_label=title,
    )  # fmt: skip


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
