"""Training curves as small multiples."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mmkd_jax.report.board import Board
from mmkd_jax.report.markup import Markup, element, number

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 308, 44, 162


def panels(board: Board, curves: Mapping[str, Sequence], metrics: Sequence[str] = ()) -> list[Markup]:
    """One panel a run and metric, each on its own scale.

    Args:
      board: knows the label and colour of runs that are called like a model.
      curves: `{run: [(step, {metric: value})]}`.
      metrics: which to draw; by default `loss`, or a run's first metric where it has no loss.
    """
    drawn = []
    for run, points in curves.items():
        known = list(dict.fromkeys(name for _, values in points for name in values))
        for metric in [m for m in metrics if m in known] or [m for m in ("loss", *known) if m in known][:1]:
            line = [(float(step), float(values[metric])) for step, values in points if metric in values]
            line = [(step, value) for step, value in line if math.isfinite(value)]
            if line:
                style = next((m.style for m in board.models if run in (m.name, m.label)), "s4")
                drawn.append(_panel(board.label(run), metric, line, style))
    return drawn


def smooth(values: Sequence[float]) -> np.ndarray:
    """Running mean over a twentieth of the curve on either side, narrower at the ends; as long as the input."""
    values = np.asarray(values, float)
    reach = len(values) // 20
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(reach, np.minimum(place, len(values) - 1 - place))
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)


def _panel(run: str, metric: str, line: list[tuple[float, float]], style: str) -> Markup:
    steps, values = (np.array(column) for column in zip(*line))
    soft = smooth(values)
    low, high = float(values.min()), float(np.quantile(values, 0.99) if len(values) > 50 else values.max())
    low, high = (low - 1, high + 1) if high <= low else (low, high)
    x = LEFT + (RIGHT - LEFT) * (steps - steps.min()) / max(float(np.ptp(steps)), 1e-9)
    ticks = _ticks(low, high)
    bottom, top = min(ticks[0], low), max(ticks[-1], high)

    def y(value):
        return BOTTOM - (BOTTOM - TOP) * np.clip((value - bottom) / (top - bottom), 0, 1)

    parts = [
        element("text", run, x=8, y=17, class_="name"),
        element("text", f"{metric}: {number(soft[0])} → {number(soft[-1])}", x=8, y=33, class_="tiny"),
    ]
    for tick in ticks:
        parts.append(element("line", x1=LEFT, x2=RIGHT, y1=float(y(tick)), y2=float(y(tick)), class_="grid"))
        text = element("text", number(tick), x=LEFT - 6, y=float(y(tick)) + 4, text_anchor="end", class_="tiny")
        parts.append(text)
    ends = ((LEFT, "start", steps.min()), (RIGHT, "end", steps.max()))
    for place, anchor, step in ends:
        words = f"step {step:,.0f}" if anchor == "end" else f"{step:,.0f}"
        parts.append(element("text", words, x=place, y=BOTTOM + 17, text_anchor=anchor, class_="tiny"))
    drawing = [
        element("path", d=_path(x, y(values)), class_="raw"),
        element("path", d=_path(x, y(soft)), class_="curve"),
        element("circle", cx=float(x[-1]), cy=float(y(soft[-1])), r=3.5, class_="dot"),
    ]
    words = f"{run}, {metric}: from {number(soft[0])} to {number(soft[-1])} over {steps.max():,.0f} steps"
    return element(
        "svg", element("title", words), element("desc", "Thin: as logged. Thick: running mean."), parts,
        element("g", drawing, class_=style), class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
        aria_label=words,
    )  # fmt: skip


def _path(x: np.ndarray, y: np.ndarray, most: int = 400) -> str:
    """An SVG path through at most `most` points."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), most)).round().astype(int))
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x[kept], y[kept]))


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from `low` to `high`."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next((f for f in (5, 2.5, 2) if (high - low) / (step * f) >= 2), 1)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
