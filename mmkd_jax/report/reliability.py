"""Calibration as a picture: how often answers of a confidence are right, one panel a model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmkd_jax.evals import calibration, results
from mmkd_jax.report.board import Board
from mmkd_jax.report.markup import Markup, element, percent

WIDTH, HEIGHT = 320, 260
LEFT, RIGHT, TOP, BOTTOM = 44, 300, 50, 222


def measure(out, model: str, datasets: Sequence[str], task: str = "zeroshot") -> dict[str, Any]:
    """Confidence and share of right answers of one model, in bins over sets that count alike.

    Args:
      out: folder with `predictions/`.
      model: name in the results.
      datasets: sets that `task` gave probabilities for.
      task: whose.

    Returns:
      `{"model", "datasets", "ece", "bins": [{"confidence", "right", "share"}]}`, ECE being the mean over sets and bins
      without answers left out.
    """
    total = np.zeros((3, calibration.BINS))  # share, confidence and right answers of each bin
    errors = []
    for dataset in datasets:
        stored = results.load_predictions(out, model, dataset, task)
        confidence = np.asarray(stored["scores"], np.float64).max(axis=1)
        right = stored["scores"].argmax(axis=1) == stored["labels"]
        once = np.ones((1, len(right)), np.int64)
        errors.append(float(calibration.expected_calibration_error(confidence, right, once)[0]))
        place = np.clip(np.ceil(confidence * calibration.BINS).astype(int) - 1, 0, calibration.BINS - 1)
        for row, values in enumerate((np.ones(len(right)), confidence, right)):
            total[row] += np.bincount(place, values, calibration.BINS) / len(right) / len(datasets)
    bins = [
        {"confidence": float(c / share), "right": float(r / share), "share": float(share)}
        for share, c, r in total.T
        if share > 0
    ]
    return {"model": model, "datasets": list(datasets), "ece": float(np.mean(errors)), "bins": bins}


def panels(board: Board, measured: Sequence[dict[str, Any]]) -> list[Markup]:
    """An `<svg>` a model."""
    return [_panel(board, one) for one in measured]


def _panel(board: Board, one: dict[str, Any]) -> Markup:
    def x(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * value

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * value

    label = board.label(one["model"])
    style = next((m.style for m in board.models if m.name == one["model"]), "t")
    parts = [
        element("text", label, x=8, y=18, class_="name"),
        element("text", f"calibration error {percent(one['ece'])} %", x=8, y=35, class_="tiny"),
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(element("line", x1=LEFT, x2=RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(element("text", f"{100 * tick:.0f}", x=LEFT - 7, y=y(tick) + 4, text_anchor="end", class_="tiny"))
        parts.append(
            element("text", f"{100 * tick:.0f}", x=x(tick), y=BOTTOM + 16, text_anchor="middle", class_="tiny")
        )
    parts.append(element("line", x1=x(0), y1=y(0), x2=x(1), y2=y(1), class_="chance"))
    middle = {"x": (LEFT + RIGHT) / 2, "y": BOTTOM + 32, "text_anchor": "middle", "class_": "tiny"}
    parts.append(element("text", "confidence, in percent; upwards: how many are right", **middle))
    points = "L".join(f"{x(b['confidence']):.1f} {y(b['right']):.1f}" for b in one["bins"])
    marks = []
    for b in one["bins"]:
        words = (
            f"confidence {percent(b['confidence'])}: {percent(b['right'])} % right ({percent(b['share'])} % of rows)"
        )
        size = 2.5 + 9 * float(np.sqrt(b["share"]))
        at = {"cx": x(b["confidence"]), "cy": y(b["right"]), "r": size, "class_": "mark"}
        marks.append(element("circle", element("title", words), **at))
    words = f"{label}: calibration error {percent(one['ece'])} percent, mean of {len(one['datasets'])} sets"
    return element(
        "svg", element("title", words), parts,
        element("g", element("path", d=f"M{points}", class_="curve"), marks, class_=style),
        class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=words,
    )  # fmt: skip
