"""The page of a survival study: Kaplan-Meier curves by risk group, and what each model's numbers are."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmkd_jax.report import bars
from mmkd_jax.report.document import document, table
from mmkd_jax.report.markup import Markup, element, number

WIDTH, HEIGHT = 460, 322
LEFT, RIGHT, TOP, BOTTOM = 46, 446, 54, 250
GROUPS = (("low", "lower risk", "s0"), ("high", "higher risk", "best"))
METRICS = {
    "c_index": "C-index", "c_index_ipcw": "C-index, IPCW", "auc": "AUC over time", "brier": "Brier score, integrated",
}  # fmt: skip
LEDE = (
    "Each patient's risk comes from a model that was fitted without the patient's fold. The C-index is the share of "
    "pairs of patients of which the one with the higher risk has the earlier event: 0.5 is chance, 1 is perfect. The "
    "Brier score is an error: lower is better. Brackets: 95 % intervals."
)


def page(study: Mapping[str, Any]) -> str:
    """The document of what `evals.survival_study.evaluate` returns."""
    parts = [_cohort(one, study["unit"]) for one in study["cohorts"]]
    names = ", ".join(one["name"] for one in study["cohorts"])
    head = element(
        "header", element("p", f"Survival · {study['name']}", class_="kicker"), element("h1", headline(study)),
        element("p", LEDE, class_="lede"),
    )  # fmt: skip
    facts = element("p", f"Cohorts: {names}. Intervals from {study['resamples']} resamples of patients within folds, "
                    f"seed {study['seed']}. Event: {study['config']['event']}.", class_="note")  # fmt: skip
    return document(f"Survival: {study['name']}", head, *parts, facts)


def headline(study: Mapping[str, Any]) -> str:
    """The finding in a sentence: whether the last model is better than the first, or how good the only one is."""
    cohorts = study["cohorts"]
    pairs = [one for cohort in cohorts for one in cohort["differences"]]
    if pairs:
        names = list(cohorts[0]["models"])
        against = names[0]
        model = [name for name in names if name.partition(":")[0] == against.partition(":")[0]][-1]
        model = model if model != against else names[-1]
        same = [one for one in pairs if (one["model"], one["against"]) == (model, against)]
        better, worse = sum(one["low"] > 0 for one in same), sum(one["high"] < 0 for one in same)
        rest = len(same) - better - worse
        return (f"{_plain(model)} against {_plain(against)}: better in {better}, worse in {worse}, "
                f"not told apart in {rest} of {len(same)} cohorts")  # fmt: skip
    values = [next(iter(one["models"].values()))["metrics"]["c_index"]["value"] for one in cohorts]
    model = _plain(next(iter(cohorts[0]["models"])))
    span = f"{min(values):.2f}" if len(values) == 1 else f"{min(values):.2f} to {max(values):.2f}"
    return f"{model}: C-index {span} in {len(values)} cohort{'s' * (len(values) > 1)}"


def _cohort(one: Mapping[str, Any], unit: str) -> Markup:
    left = f" Without a fold or a covariate, and left out: {one['left_out']}." if one["left_out"] else ""
    lede = f"{one['n']} patients, {one['events']} events.{left}"
    plots = [element("figure", km(name, told, unit), class_="panel") for name, told in one["models"].items()]
    return element(
        "section", element("h2", one["name"]), element("p", lede, class_="lede"),
        element("div", plots, class_="multiples", style="margin-bottom:20px"),
        _numbers(one, unit), _incomplete(one), _differences(one), _folds(one),
    )  # fmt: skip


def _numbers(one: Mapping[str, Any], unit: str) -> Markup:
    names = [name for name in METRICS if any(name in told["metrics"] for told in one["models"].values())]
    times = dict.fromkeys(n for told in one["models"].values() for n in told["metrics"] if n.startswith("auc@"))
    columns = ["Model", *(METRICS[name] for name in names), *(f"AUC at {n.removeprefix('auc@')} {unit}" for n in times)]
    body = []
    for model, told in one["models"].items():
        cells = [_cell(told["metrics"].get(name)) for name in (*names, *times)]
        body.append(element("tr", element("th", _plain(model), scope="row"), cells))
    return table("Means over the tested folds", columns, body)


def _incomplete(one: Mapping[str, Any]) -> Markup | None:
    """Which intervals rest on resamples that not every fold is in."""
    worst: dict[str, int] = {}
    for told in one["models"].values():
        for name, count in told["incomplete"].items():
            worst[name] = max(count, worst.get(name, 0))
    listed = ", ".join(f"{METRICS.get(name, name)} {count}" for name, count in worst.items() if count)
    words = "Resamples in which a fold had too few events for a number, so that it is the mean over the others"
    return element("p", f"{words}: {listed}.", class_="note") if listed else None


def _cell(metric: Mapping[str, float] | None) -> Markup:
    if metric is None:
        return element("td", "–")
    return element("td", f"{metric['value']:.3f}", element("small", f"{metric['low']:.3f}–{metric['high']:.3f}"))


def _differences(one: Mapping[str, Any]) -> Markup | None:
    if not one["differences"]:
        return None
    words = "Paired by patient on the same resamples; in hundredths of the C-index, 95 % intervals."
    records = [
        {"label": f"{_plain(d['model'])} less {_plain(d['against'])}", **{k: d[k] for k in ("value", "low", "high")}}
        for d in one["differences"]
    ]
    return element("div", element("h3", "Differences of the C-index"), element("p", words, class_="note"),
                   bars.differences(records), class_="panel padded")  # fmt: skip


def _folds(one: Mapping[str, Any]) -> Markup:
    models = list(one["models"])
    body = []
    for k, fold in enumerate(one["models"][models[0]]["folds"]):
        cells = [element("td", fold["n"]), element("td", fold["events"])]
        for model in models:
            told = one["models"][model]["folds"][k]
            cells.append(element("td", f"{told['c_index']:.3f}", element("small", f"chose {number(told['chosen'])}")))
        body.append(element("tr", element("th", f"fold {fold['fold']}", scope="row"), cells))
    shown = table("C-index by tested fold", ["Fold", "patients", "events", *map(_plain, models)], body)
    return element("details", element("summary", "Fold by fold, with the penalty or number of steps chosen"), shown)


def km(name: str, told: Mapping[str, Any], unit: str) -> Markup:
    """Kaplan-Meier curves of the two risk groups with 95 % bands, the log-rank test and the numbers at risk.

    Args:
      name: of the model.
      told: its record: `curves` of `evals.survival.curves`, `log_rank`.
      unit: of time.
    """
    groups = [(label, style, told["curves"][key]) for key, label, style in GROUPS if key in told["curves"]]
    end = max(float(np.max(one["time"])) for _, _, one in groups)
    step = _step(end)

    def x(time) -> np.ndarray:
        return LEFT + (RIGHT - LEFT) * np.asarray(time, float) / end

    def y(share) -> np.ndarray:
        return BOTTOM - (BOTTOM - TOP) * np.asarray(share, float)

    p = told["log_rank"]["p"]
    words = f"log-rank p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    parts = [element("text", _plain(name), x=10, y=20, class_="name"),
             element("text", f"share without the event; {words}", x=10, y=38, class_="tiny")]  # fmt: skip
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = float(y(share))
        parts.append(element("line", x1=LEFT, x2=RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(element("text", f"{100 * share:.0f} %", x=LEFT - 6, y=at + 4, text_anchor="end", class_="tiny"))
    ticks = np.arange(0, end + 1e-9, step)
    for tick in ticks:
        last = tick == ticks[-1]
        label, anchor = (f"{tick:g} {unit}", "end") if last else (f"{tick:g}", "middle")
        place = min(float(x(tick)) + 24, RIGHT + 8) if last else float(x(tick))
        parts.append(element("text", label, x=place, y=BOTTOM + 16, text_anchor=anchor, class_="tiny"))
    for row, (label, style, one) in enumerate(groups):
        parts.append(_curve(one, x, y, end, style))
        at = BOTTOM + 40 + 18 * row
        mark = element("circle", cx=14, cy=at - 4, r=5, class_="mark")
        counts = f"{label}: {one['n']} patients, {one['events']} events; at risk"
        risk = " · ".join(f"{_at_risk(one, tick)} at {tick:g}" for tick in ticks[1:4])
        parts.append(element("g", mark, element("text", f"{counts} {risk}", x=26, y=at, class_="tiny"), class_=style))
    described = f"{_plain(name)}: Kaplan-Meier curves of {' and '.join(label for label, _, _ in groups)}, {words}"
    return element("svg", element("title", described), parts, class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}",
                   role="img", aria_label=described)  # fmt: skip


def _curve(one: Mapping[str, Any], x, y, end: float, style: str) -> Markup:
    """The step curve with its band."""
    time = np.concatenate([[0.0], one["time"]])
    values = {name: np.concatenate([[1.0], one[name]]) for name in ("survival", "low", "high")}
    line = _steps(x(time), y(values["survival"]))
    upper, lower = _steps(x(time), y(values["high"])), _steps(x(time), y(values["low"]))
    band = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in upper + lower[::-1]) + "Z"
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in line)
    return element("g", element("path", d=band, style="fill:currentColor;opacity:.13;stroke:none"),
                   element("path", d=path, class_="curve"), class_=style)  # fmt: skip


def _steps(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """Corners of a step function that holds each value up to the next point."""
    return [point for k in range(len(x)) for point in ([(x[k], y[k - 1])] if k else []) + [(x[k], y[k])]]


def _at_risk(one: Mapping[str, Any], time: float) -> int:
    return int(np.sum(np.asarray(one["watched"]) >= time))


def _step(end: float) -> float:
    """A round distance between three to six ticks."""
    step = 10 ** math.floor(math.log10(end / 3))
    return next(step * f for f in (5, 2, 1) if end / (step * f) >= 2.5)


def _plain(model: str) -> str:
    kind, _, rest = model.partition(": ")
    return f"{rest} ({'Cox regression' if kind == 'cox' else 'attention, hazards'})" if rest else model
