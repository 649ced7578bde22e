"""Many sets at a glance: means by modality, and on how many sets each model beats each other one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmkd_jax.evals.summary import MEAN
from mmkd_jax.report.board import Board
from mmkd_jax.report.document import table
from mmkd_jax.report.markup import Markup, element, percent


def modalities(board: Board, task: str, metric: str) -> Markup | None:
    """Models by modalities: the mean over a modality's sets; a model that lacks some has no mean, and says which."""
    names = [one.name for one in board.datasets(task, metric) if one.name != MEAN]
    groups: dict[str, list[str]] = {}
    for name in names:
        row = next(r for r in board.rows if (r["dataset"], r["task"], r["metric"]) == (name, task, metric))
        groups.setdefault(row["context"].get("modality") or "other", []).append(name)
    if len(names) < 2:
        return None
    columns = ["Model", *(_headed(modality, sets) for modality, sets in sorted(groups.items()))]
    cells: dict[str, list[tuple[float | None, list[str]]]] = {}
    for model in board.models:
        for _, sets in sorted(groups.items()):
            rows = {name: board.get(task, metric, name, model.name) for name in sets}
            lacking = [name for name, row in rows.items() if row is None]
            value = None if lacking else float(np.mean([row["value"] for row in rows.values()]))
            cells.setdefault(model.name, []).append((value, lacking))
    models = [m for m in board.models if any(value is not None for value, _ in cells[m.name])]
    known = [value for m in models for value, _ in cells[m.name] if value is not None]
    if not known:
        return None
    best = [
        max((v for m in models if (v := cells[m.name][k][0]) is not None), default=None) for k in range(len(groups))
    ]
    body = []
    for model in models:
        shown = [_cell(*cell, best[k], min(known), max(known)) for k, cell in enumerate(cells[model.name])]
        lead = "lead" if model == board.highlight else None
        body.append(element("tr", element("th", model.label, scope="row"), shown, class_=lead))
    return table(f"By modality: {metric.replace('_', ' ')}, in percent, each set alike", columns, body)


def _headed(modality: str, sets: Sequence[str]) -> Markup:
    count = f"{len(sets)} set" + ("s" if len(sets) > 1 else "")
    return element("span", modality.replace("_", " "), element("small", count), title=", ".join(sets))


def _cell(value: float | None, lacking: Sequence[str], best: float | None, low: float, high: float) -> Markup:
    if value is None:
        return element("td", "–", element("small", f"lacks {len(lacking)}"), title="lacks " + ", ".join(lacking))
    depth = 0.03 + 0.32 * ((value - low) / (high - low) if high > low else 0)
    text = element("b", percent(value)) if value == best else percent(value)
    return element("td", text, style=f"background:rgb(var(--shade) / {depth:.3f})")


def duels(record: Mapping[str, Any]) -> Markup | None:
    """On how many of the common sets the model of a row is above that of a column.

    Args:
      record: of `mmkd_jax.evals.comparison.compare`.
    """
    if not record["summary"]:
        return None
    common = [row for row in record["sets"] if row["dataset"] in record["summary"]["datasets"]]
    labels = [one["label"] for one in record["models"]]
    values = {label: [row["values"][label]["value"] for row in common] for label in labels}
    body = []
    for mine in labels:
        cells = []
        for theirs in labels:
            won = sum(a > b for a, b in zip(values[mine], values[theirs]))
            depth = 0.03 + 0.32 * won / len(common)
            style = f"background:rgb(var(--shade) / {depth:.3f})"
            cells.append(element("td", "·") if mine == theirs else element("td", won, style=style))
        body.append(element("tr", element("th", mine, scope="row"), cells))
    return table(f"Sets won, of {len(common)}: the row against the column", ("", *labels), body)
