"""The main plot: the score of every model on every set, with intervals, students beside their teachers."""

import dataclasses
import math
import pathlib
import textwrap

from mmkd_jax.evals.summary import MEAN
from mmkd_jax.report.board import Board, Dataset, Model
from mmkd_jax.report.markup import Markup, element, interval, percent, signed

LANE = 14  # pixels a model has in a row
_TASKS = {"zeroshot": "Zero-shot", "linear_probe": "Linear-probe"}
_METRICS = {
    "balanced_accuracy": "balanced accuracy", "accuracy": "accuracy", "macro_f1": "macro F1", "macro_auc": "macro AUC",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where things are: plot area from `left` to `right` pixels for scores from `low` to `high`."""

    width: int
    left: float
    right: float
    low: float
    high: float
    narrow: bool

    def x(self, value: float) -> float:
        """Pixel of a score."""
        share = (value - self.low) / (self.high - self.low)
        return self.left + (self.right - self.left) * min(max(share, 0.0), 1.0)


def css(*names: str) -> Markup:
    """Style sheets that lie beside this module."""
    folder = pathlib.Path(__file__).parent
    return Markup("".join((folder / f"{name}.css").read_text(encoding="utf-8") for name in names))


def main_plot(
    board: Board, width: int, *, task: str = "zeroshot", metric: str = "balanced_accuracy", alone: bool = False
) -> Markup:
    """A dot plot as an `<svg>`; a row a set, a lane a student, one lane for all teachers.

    Args:
      board: the data.
      width: pixels; below 600 the names stand above their rows.
      task: of the numbers.
      metric: a share.
      alone: with its own background, styles and themes, to stand as a file.
    """
    sets = board.datasets(task, metric)
    frame = _frame(board, sets, task, metric, width)
    legend, y = _legend(board, frame, 62, task, metric)
    body = [legend]
    top = y + 8
    y = top + 14
    for one in sets:
        row, height = _row(board, one, frame, y, task, metric)
        body.append(row)
        y += height
    grid = _grid(frame, top + 6, y)
    height = y + 34
    title = f"{_TASKS.get(task, task)} {_METRICS.get(metric, metric)}"
    note = "Percent, 95 % intervals. Dotted: chance."
    note += " Line: best teacher of the set." if board.kind("teacher") and not frame.narrow else ""
    head = [
        element("text", title, x=20, y=28, class_="title"),
        element("text", note, x=20, y=47, class_="soft"),
    ]
    paper = element("rect", width=width, height=height, rx=10, class_="paper") if alone else None
    style = element("style", css("theme", "chart")) if alone else None
    described = [element("title", title), element("desc", _description(board, sets, task, metric))]
    return element(
        "svg", described, style, paper, head, grid, body,
        xmlns="http://www.w3.org/2000/svg", class_="chart", viewBox=f"0 0 {width} {math.ceil(height)}",
        width=width if alone else None, height=math.ceil(height) if alone else None, role="img", aria_label=title,
    )  # fmt: skip


def _frame(board: Board, sets: list[Dataset], task: str, metric: str, width: int) -> Frame:
    rows = [board.get(task, metric, one.name, model.name) for one in sets for model in board.models]
    lows = [row["low"] for row in rows if row] + [c for one in sets if (c := board.chance(task, one.name))]
    low = math.floor(10 * min(lows, default=0) - 1e-9) / 10
    narrow = width < 600
    left, right = (20, width - 22) if narrow else (226, width - 168)
    return Frame(width, left, right, max(0.0, low), 1.0, narrow)


def _grid(frame: Frame, top: float, bottom: float) -> list[Markup]:
    step = 2 if frame.narrow or frame.high - frame.low > 0.7 else 1
    ticks = [t / 10 for t in range(0, 11, step) if t / 10 >= frame.low - 1e-9]
    lines = [element("line", x1=frame.x(t), x2=frame.x(t), y1=top, y2=bottom, class_="grid") for t in ticks]
    style = {"text_anchor": "middle", "class_": "tiny"}
    labels = [element("text", f"{100 * t:.0f}", x=frame.x(t), y=bottom + 18, **style) for t in ticks]
    return lines + labels


def _row(board: Board, one: Dataset, frame: Frame, y: float, task: str, metric: str) -> tuple[list[Markup], float]:
    """Marks of one set from `y` down, and the height that they take."""
    found = {m.name: board.get(task, metric, one.name, m.name) for m in board.models}
    own = [m for m in board.kind("student", "control") if found[m.name]]
    best = board.best(task, metric, one.name, "teacher")
    lanes = max(len(own) + bool(best), 2 if frame.narrow else 3)
    head = 26 if frame.narrow else 0
    height = head + lanes * LANE + 18
    middle = y + height / 2
    parts = [_background(one, frame, y, height)]
    first = y + head + 10 + LANE / 2 + (lanes - len(own) - bool(best)) * LANE / 2
    if (chance := board.chance(task, one.name)) and metric.endswith("accuracy"):
        parts.append(_vertical(frame.x(chance), y + head + 6, y + height - 6, "chance", f"chance {percent(chance)} %"))
    if best:
        parts.append(_vertical(frame.x(best["value"]), y + head + 6, y + height - 6, "reference"))
        parts.append(_teachers(board, found, best, frame, first + len(own) * LANE))
    for lane, model in enumerate(own):
        lead = model == board.highlight
        parts.append(_student(model, found[model.name], frame, first + lane * LANE, lead))
    parts += _names(one, frame, y, middle)
    parts += _gain(board, found, best, frame, y, middle)
    return parts, height


def _background(one: Dataset, frame: Frame, y: float, height: float) -> Markup:
    if one.name == MEAN:
        return element("rect", x=8, y=y, width=frame.width - 16, height=height, rx=8, class_="band")
    return element("line", x1=20, x2=frame.width - 20, y1=y + height, y2=y + height, class_="rule")


def _names(one: Dataset, frame: Frame, y: float, middle: float) -> list[Markup]:
    if frame.narrow:
        label = _cut(one.label, 24)
        room = int((frame.right - frame.left - 90 - 8 * len(label)) / 6)
        detail = element("tspan", f"  {_cut(one.detail, room)}", class_="tiny") if room > 8 else None
        return [element("text", label, detail, x=frame.left, y=y + 21, class_="name")]
    lines = textwrap.wrap(one.detail.replace(" = ", "\u00a0=\u00a0"), 33, max_lines=2, placeholder="…")
    top = middle + 3 - 7 * len(lines)
    names = [element("text", _cut(one.label, 26), x=20, y=top, class_="name")]
    return names + [element("text", text, x=20, y=top + 17 + 14 * k, class_="tiny") for k, text in enumerate(lines)]


def _gain(board: Board, found: dict, best: dict | None, frame: Frame, y: float, middle: float) -> list[Markup]:
    """At the right: the highlighted model's score, and its distance from the best teacher of the set."""
    own = found.get(board.highlight.name) if board.highlight else None
    if not own:
        return []
    score = percent(own["value"])
    gain = signed(own["value"] - best["value"]) if best else ""
    sense = "up" if gain.startswith("+") else "down" if gain.startswith("−") else "soft"
    if frame.narrow:
        last = element("tspan", f"  {gain}", class_=f"gain {sense}") if best else None
        return [element("text", score, last, x=frame.right, y=y + 21, text_anchor="end", class_="gain")]
    x = frame.right + 22
    parts = [element("text", score, x=x, y=middle - 3, class_="gain")]
    if best:
        parts.append(element("text", gain, x=x + 46, y=middle - 3, class_=f"gain {sense}"))
        name = board.label(best["model"])
        parts.append(element("text", _cut(f"vs {name}", 22), x=x, y=middle + 14, class_="tiny"))
    return parts


def _student(model: Model, row: dict, frame: Frame, y: float, lead: bool) -> Markup:
    size = 6.5 if lead else 5
    tip = element("title", f"{model.label}: {percent(row['value'])} ({interval(row)}), n = {row['n']}")
    marks = [_whisker(row, frame, y), mark(model.shape, frame.x(row["value"]), y, size)]
    return element("g", tip, marks, class_=f"{model.style} lead" if lead else model.style)


def _teachers(board: Board, found: dict, best: dict, frame: Frame, y: float) -> Markup:
    parts = []
    for model in board.kind("teacher", "reference"):
        row = found[model.name]
        if row and row is not best and not (model.kind == "reference" and row["value"] == best["value"]):
            tip = element("title", f"{model.label}: {percent(row['value'])} ({interval(row)})")
            shape = mark("circle" if model.kind == "teacher" else "diamond", frame.x(row["value"]), y, 4, "hollow")
            parts.append(element("g", tip, shape, class_="t" if model.kind == "teacher" else "best"))
    tip = element("title", f"{board.label(best['model'])} (best teacher): {percent(best['value'])} ({interval(best)})")
    marks = [_whisker(best, frame, y), mark("diamond", frame.x(best["value"]), y, 6)]
    return element("g", parts, element("g", tip, marks, class_="best"))


def _whisker(row: dict, frame: Frame, y: float) -> Markup:
    return element("line", x1=frame.x(row["low"]), x2=frame.x(row["high"]), y1=y, y2=y, class_="whisker")


def _vertical(x: float, top: float, bottom: float, kind: str, tip: str | None = None) -> Markup:
    return element("line", element("title", tip) if tip else None, x1=x, x2=x, y1=top, y2=bottom, class_=kind)


def mark(shape: str, x: float, y: float, size: float, kind: str = "mark") -> Markup:
    """A mark of about equal area whatever its shape; shapes tell models apart where colours do not."""
    if shape == "circle":
        return element("circle", cx=x, cy=y, r=size, class_=kind)
    if shape == "bar":
        return element("line", x1=x, x2=x, y1=y - size, y2=y + size, class_="stroke")
    if shape == "square":
        half = 0.88 * size
        return element("rect", x=x - half, y=y - half, width=2 * half, height=2 * half, rx=1.0, class_=kind)
    if shape == "cross":
        half = 0.75 * size
        left, right, top, bottom = (f"{v:.2f}" for v in (x - half, x + half, y - half, y + half))
        path = f"M{left} {top}L{right} {bottom}M{left} {bottom}L{right} {top}"
        return element("path", d=path, class_="stroke")
    corners = {"triangle": 3, "diamond": 4, "pentagon": 5}[shape]
    reach = size * {3: 1.25, 4: 1.2, 5: 1.1}[corners]
    angles = [2 * math.pi * k / corners - math.pi / 2 for k in range(corners)]
    points = " ".join(f"{x + reach * math.cos(a):.2f},{y + reach * math.sin(a):.2f}" for a in angles)
    return element("polygon", points=points, class_=kind)


def _legend(board: Board, frame: Frame, y: float, task: str, metric: str) -> tuple[list[Markup], float]:
    """Marks with names, in as many lines as they need, and where they end."""
    shown = {row["model"] for row in board.rows if (row["task"], row["metric"]) == (task, metric)}
    models = [m for m in board.models if m.name in shown]
    entries = [(m.style, m.shape, m.label, "mark") for m in models if m.kind in ("student", "control")]
    if any(m.kind == "teacher" for m in models):
        entries += [("best", "diamond", "best teacher", "mark"), ("t", "circle", "other teachers", "hollow")]
    entries += [("best", "diamond", m.label, "hollow") for m in models if m.kind == "reference"]
    parts, x = [], 20.0
    for style, shape, label, kind in entries:
        lead = bool(board.highlight) and label == board.highlight.label
        width = 36 + 6.4 * len(label)
        if x > 20 and x + width > frame.width - 12:
            x, y = 20.0, y + 22
        size = 6 if lead else 4 if kind == "hollow" else 5
        parts.append(element("g", mark(shape, x + 7, y + 6, size, kind), class_=style))
        parts.append(element("text", label, x=x + 18, y=y + 10.5, class_="name" if lead else "soft"))
        x += width
    return parts, y + 20


def _description(board: Board, sets: list[Dataset], task: str, metric: str) -> str:
    """The plot in words, for those who cannot see it."""
    parts = []
    for one in sets:
        rows = [(m.label, board.get(task, metric, one.name, m.name)) for m in board.models]
        parts.append(f"{one.label}: " + ", ".join(f"{label} {percent(r['value'])}" for label, r in rows if r))
    return ". ".join(parts) + "."


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip(" ,") + "…"
