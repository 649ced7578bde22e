"""One table of a sweep: what each run ended with, and each setting's mean over training seeds with its interval."""

import csv
import io as memory
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from mmkd_jax import io, registry
from mmkd_jax.errors import InputError
from mmkd_jax.evals import results
from mmkd_jax.sweeps.plan import Plan, Run
from mmkd_jax.sweeps.runner import is_done
from mmkd_jax.train import metrics

SCHEMA = 1
LEVEL = 0.95
MEAN = "mean"
TRAIN = "train"  # task of the numbers that training logs
TIMED = ("pairs_per_second",)  # not of the result: another machine, another number


def write(plan: Plan) -> dict[str, Any]:
    """Writes table.json, table.csv, table.md, report.html and sweep.svg into the sweep's folder, from the whole runs.

    Nothing in them depends on when or where the runs were made.
    """
    from mmkd_jax.report import sweep as page

    table = collect(plan)
    io.write_json(plan.workdir / "table.json", table)
    io.write_text(plan.workdir / "table.csv", as_csv(table))
    io.write_text(plan.workdir / "table.md", as_markdown(table))
    page.write(plan.workdir, table)
    if plan.config.get("table"):  # a sweep's own way of telling, which writes over those
        registry.resolve(plan.config["table"], {}, "table")(plan)
    return table


def put_into(document: str | os.PathLike, plan: Plan) -> None:
    """Copies table.md into a Markdown file, between `<!-- NAME -->` and `<!-- /NAME -->`, and sweep.svg beside it.

    NAME is the sweep's. Where the file has no such place yet, it gets one at its end.

    Raises:
      InputError: runs are missing, there is no such file, or its place is not closed.
    """
    path, name = io.as_path(document), plan.config.get("name", "sweep")
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    check_place(document, name)
    if missing := [run.name for run in plan.runs if not is_done(plan, run)]:
        raise InputError(f"{len(missing)} runs are missing, first {missing[0]}; a document tells of a whole sweep only")
    text = path.read_text()
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2] or "\n"
    before = before if rest else f"{before.rstrip()}\n\n"
    io.write_text(path.parent / f"{name}.svg", (plan.workdir / "sweep.svg").read_text())
    told = f"{(plan.workdir / 'table.md').read_text()}\n![{name}]({name}.svg)\n"
    io.write_text(path, f"{before}{begin}\n{told}{end}{after}")


def check_place(document: str | os.PathLike, name: str) -> None:
    """Refuses a file that `put_into` could not write to.

    Raises:
      InputError: there is no such file, or its place is not one.
    """
    path = io.as_path(document)
    if not path.exists():
        raise InputError(f"there is no file {path} to put the table into")
    text = path.read_text()
    counts = text.count(f"<!-- {name} -->"), text.count(f"<!-- /{name} -->")
    if counts not in ((0, 0), (1, 1)) or text.find(f"<!-- {name} -->") > text.find(f"<!-- /{name} -->"):
        raise InputError(f"{path} must hold <!-- {name} --> and then <!-- /{name} -->, once each or not at all")


def collect(plan: Plan) -> dict[str, Any]:
    """The table as JSON values.

    Returns:
      `title`; `missing`, names of runs that are not whole; `runs`: [{name, overrides, values}] with values
      [{task, dataset, metric, value, low, high}] (low and high None without an interval); `settings`: [{label,
      overrides, seeds, values}], the same over seeds, with `each` seed's value and `interval`: "seeds" (Student's t,
      95 %, the test cases as they are), "cases" (one seed: that of its own result) or "".
    """
    whole = [run for run in plan.runs if is_done(plan, run)]
    records = [
        {"name": run.name.removeprefix("runs/"), "overrides": dict(run.overrides), "values": _values(plan, run)}
        for run in whole
    ]
    grouped: dict[str, list[int]] = {}
    for place, run in enumerate(whole):
        grouped.setdefault(io.hash_of(run.setting), []).append(place)
    return io.json_form(
        {
            "schema": SCHEMA,
            "title": plan.config.get("name", "sweep"),
            "missing": [run.name.removeprefix("runs/") for run in plan.runs if run not in whole],
            "runs": records,
            "settings": [_setting(whole[places[0]], [records[k] for k in places]) for places in grouped.values()],
        }
    )


def over_seeds(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and Student's 95 % interval of float values; no interval for one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - reach, mean + reach


def headline(table: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(task, dataset, metric) of the numbers that are shown first: scores of tasks, then a final loss.

    That is the contrastive one where it is logged: sums with different weights are not comparable.
    """
    known = list(dict.fromkeys(key(value) for one in table["settings"] for value in one["values"]))
    wanted = {"zeroshot": "balanced_accuracy", "linear_probe": "balanced_accuracy", "retrieval": "i2t_R@5_of_"}
    scores = [k for k in known if k[2].startswith(wanted.get(k[0], "\0")) and not k[2].endswith("_strict")]
    scores.sort(key=lambda k: (list(wanted).index(k[0]), k[1] != MEAN))
    losses = [(TRAIN, "", "loss/task"), (TRAIN, "", "loss")]
    return scores + [k for k in losses if k in known][:1]


def key(value: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a value is of."""
    return value["task"], value["dataset"], value["metric"]


def column(name: tuple[str, str, str]) -> str:
    """How a number is called above its column."""
    task, dataset, metric = name
    return f"final {metric}" if task == TRAIN else f"{dataset} {task} {metric}".replace("_", " ")


def as_csv(table: Mapping[str, Any]) -> str:
    """One line a setting and number, floats in full."""
    fields = list(dict.fromkeys(field for one in table["settings"] for field in one["overrides"]))
    buffer = memory.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*fields, "seeds", "task", "dataset", "metric", "value", "low", "high", "interval"])
    for one in table["settings"]:
        for value in one["values"]:
            numbers = [value[k] for k in ("task", "dataset", "metric", "value", "low", "high", "interval")]
            writer.writerow([*(_text(one["overrides"].get(f, "")) for f in fields), one["seeds"], *numbers])
    return buffer.getvalue()


def as_markdown(table: Mapping[str, Any]) -> str:
    """One line a setting, its main numbers with their intervals."""
    columns = headline(table)
    lines = ["| setting | seeds | " + " | ".join(map(column, columns)) + " |", "| --- " * (len(columns) + 2) + "|"]
    for one in table["settings"]:
        found = {key(value): value for value in one["values"]}
        cells = [_cell(found.get(name)) for name in columns]
        lines.append("| " + " | ".join([one["label"].replace("|", "\\|"), str(one["seeds"]), *cells]) + " |")
    lines += ["", f"Missing: {', '.join(table['missing'])}"] if table["missing"] else []
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "–"
    span = "" if value["low"] is None else f" ({value['low']:.4f} to {value['high']:.4f})"
    return f"{value['value']:.4f}{span}"


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _label(setting: Mapping[str, Any]) -> str:
    return (
        setting.get("label")
        or ", ".join(f"{field} = {_text(value)}" for field, value in setting.items())
        or "as configured"
    )


def _values(plan: Plan, run: Run) -> list[dict[str, Any]]:
    """What a run ended with: its result rows, their mean over classified sets, and its last logged numbers."""
    folder = plan.workdir / run.name
    rows = results.load(plan.workdir / run.scores / "results.json") if run.scores else []
    values = [{k: row[k] for k in ("task", "dataset", "metric", "value", "low", "high")} for row in rows]
    grouped: dict[tuple[str, str], list[float]] = {}
    for value in values:
        if value["metric"] == "balanced_accuracy":
            grouped.setdefault((value["task"], value["metric"]), []).append(value["value"])
    for (task, metric), found in grouped.items():
        if len(found) > 1:
            mean = {"value": float(np.mean(found)), "low": None, "high": None}
            values.append({"task": task, "dataset": MEAN, "metric": metric, **mean})
    lines = metrics.read(folder)
    if not lines:
        raise InputError(f"{folder} has no metrics.jsonl; delete {plan.workdir / 'done'} and sweep again")
    for name, value in lines[-1].items():
        if name != "step" and name not in TIMED:
            values.append({"task": TRAIN, "dataset": "", "metric": name, "value": value, "low": None, "high": None})
    return values


def _setting(first: Run, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One setting's numbers over its seeds; a number that not every seed has is left out."""
    by_seed = [{key(value): value for value in record["values"]} for record in records]
    values = []
    for name in by_seed[0]:
        found = [one[name] for one in by_seed if name in one]
        if len(found) < len(by_seed):
            continue
        mean, low, high = over_seeds([value["value"] for value in found])
        kind = "seeds"
        if len(found) == 1:
            low, high = found[0]["low"], found[0]["high"]
            kind = "cases" if low is not None else ""
        task, dataset, metric = name
        each = [value["value"] for value in found]
        about = {"task": task, "dataset": dataset, "metric": metric, "value": mean, "low": low, "high": high}
        values.append({**about, "interval": kind, "each": each})
    setting = first.setting
    return {"label": _label(setting), "overrides": setting, "seeds": len(records), "values": values}
