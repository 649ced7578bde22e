"""What a ladder found (configs/sweeps/ladder.py): one table and plot of all its rungs, over cases and training seeds.

Rungs are compared on the same resamples of the same cases and of the same training seeds.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmkd_jax import io
from mmkd_jax.evals import bootstrap, results, summary
from mmkd_jax.sweeps.plan import Plan, Run
from mmkd_jax.sweeps.runner import is_done
from mmkd_jax.train import metrics

MODEL, TASK, METRIC = "student", "zeroshot", "balanced_accuracy"
BASE, PLUS, CONTROL = "public", "+routing", "clip_only"
SCORE, PROBE = (TASK, "mean", METRIC), ("linear_probe", "mean", METRIC)
HEAD = (
    "| rung | zero-shot | minus `public` | minus the one before | linear probe | unseen set | recall@5 "
    "| steps to `public` | pairs/s |"
)


@dataclasses.dataclass(frozen=True)
class Rung:
    """One setting with its whole runs, in the order of their training seeds.

    Attributes:
      label: its name.
      runs: of the plan.
      score: mean zero-shot balanced accuracy over the scored sets, cases and seeds.
    """

    label: str
    runs: tuple[Run, ...]
    score: bootstrap.Estimate


def write(plan: Plan) -> None:
    """Writes ladder.json, and the ladder's own table.md and sweep.svg into the sweep's folder, from the whole runs.

    Rungs of which a seed is missing are left out, so that all are means over the same seeds.
    """
    from mmkd_jax.report import sweep as page

    rungs = collect(plan)
    if not rungs:
        return
    table = record(plan, rungs)
    io.write_json(plan.workdir / "ladder.json", table)
    io.write_text(plan.workdir / "table.md", as_markdown(table))
    io.write_text(plan.workdir / "sweep.svg", page.plot(_plotted(table), SCORE, 1000, alone=True) + "\n")


def collect(plan: Plan) -> list[Rung]:
    """The rungs whose runs are all whole, in the plan's order."""
    by_label: dict[str, list[Run]] = {}
    for run in plan.runs:
        by_label.setdefault(run.overrides["label"], []).append(run)
    return [
        Rung(label, tuple(runs), _score(plan, runs))
        for label, runs in by_label.items()
        if all(is_done(plan, run) for run in runs)
    ]


def record(plan: Plan, rungs: Sequence[Rung]) -> dict[str, Any]:
    """The table as JSON values: `rungs` and `references`, a dict each with the numbers of `as_markdown`."""
    by_label = {rung.label: rung for rung in rungs}
    base = by_label.get(BASE)
    target = statistics.fmean(_curve(plan, run)[-1][1] for run in base.runs) if base else None
    table = []
    for rung in rungs:
        before = by_label.get(_before(rung.label, [one.label for one in rungs]))
        table.append(
            {
                "rung": rung.label,
                "seeds": len(rung.runs),
                "score": _numbers(rung.score),
                "each": [_score(plan, [run]).value for run in rung.runs],
                "minus_public": _minus(rung, base),
                "minus_before": _minus(rung, before),
                "before": before.label if before else None,
                **_others(plan, rung),
                "steps_to_public": [_reached(_curve(plan, run), target) for run in rung.runs],
                "pairs_per_second": statistics.median(_rates(plan, rung)),
            }
        )
    scored = _scored(plan)
    about = {"title": plan.config["name"], "scored": scored, "made": _made(plan, rungs)}
    return io.json_form({**about, "rungs": table, "references": _references(plan, scored)})


def as_markdown(table: Mapping[str, Any]) -> str:
    """One line a rung, then one a reference; intervals are 95 %."""
    lines = [HEAD, "| --- " * (HEAD.count("|") - 1) + "|"]
    for one in table["rungs"]:
        cells = [_span(one[name], signed=name != "score") for name in ("score", "minus_public", "minus_before")]
        cells += [_mean(one[name]) for name in ("linear_probe", "unseen", "recall")]
        cells += [_steps(one["steps_to_public"]), f"{one['pairs_per_second']:.0f}"]
        lines.append(f"| `{one['rung']}` | " + " | ".join(cells) + " |")
    for one in table["references"]:
        cells = [_span(one["score"], signed=False), "", "", _mean(one["linear_probe"]), "", "", "", ""]
        lines.append(f"| {one['name']} | " + " | ".join(cells) + " |")
    seeds = max((one["seeds"] for one in table["rungs"]), default=0)
    lines += [
        "",
        f"Zero-shot and linear probe: mean balanced accuracy over {', '.join(table['scored'])}. Intervals: 95 %, over "
        f"cases and {seeds} training seeds; differences are paired. Steps to `public`: of each seed, the first "
        "evaluation at or above the mean last score of `public`.",
        "",
        f"Commit {', '.join(f'`{commit}`' for commit in table['made']['commits']) or 'unknown'}, "
        f"{' or '.join(map(str, table['made']['cpus'])) or 'unknown'} CPU cores.",
    ]
    return "\n".join(lines) + "\n"


def _score(plan: Plan, runs: Sequence[Run]) -> bootstrap.Estimate:
    """Mean over the scored sets, then over seeds: the same seeds are drawn for every rung."""
    of_runs = []
    for run in runs:
        out = plan.workdir / run.scores
        found = [
            summary.estimates(out, MODEL, name, TASK, resamples=plan.config["bootstrap"])[0][METRIC]
            for name in _scored(plan)
        ]
        of_runs.append(bootstrap.mean_over_sets(found))
    return bootstrap.mean_over_seeds(of_runs)


def _scored(plan: Plan) -> list[str]:
    """The sets of the score: those that the config names, else all that a run was classified on."""
    named = list(plan.config["scored"])
    if named:
        return named
    whole = next(run for run in plan.runs if is_done(plan, run))
    rows = results.load(plan.workdir / whole.scores / "results.json")
    return sorted({row["dataset"] for row in rows if row["task"] == TASK})


def _before(label: str, labels: Sequence[str]) -> str:
    """The rung that one adds its switch to: `plus` for what stands beside it, else the one below."""
    if label.startswith("plus"):
        return PLUS
    return labels[labels.index(label) - 1] if label.startswith("+") else ""


def _minus(rung: Rung, other: Rung | None) -> list[float] | None:
    if other is None or other is rung or len(other.runs) != len(rung.runs):
        return None
    return _numbers(bootstrap.difference(rung.score, other.score))


def _numbers(estimate: bootstrap.Estimate) -> list[float]:
    return [estimate.value, *estimate.interval()]


def _others(plan: Plan, rung: Rung) -> dict[str, list[float]]:
    """Each seed's linear probe, balanced accuracy on sets beside the score, and recall of pictures' captions."""
    found: dict[str, list[float]] = {"linear_probe": [], "unseen": [], "recall": []}
    for run in rung.runs:
        rows = results.load(plan.workdir / run.scores / "results.json")
        of_run = {
            "linear_probe": [r for r in rows if r["task"] == "linear_probe" and r["dataset"] in _scored(plan)],
            "unseen": [r for r in rows if r["task"] == TASK and r["dataset"] in plan.config["beside"]],
        }
        values = {name: [r["value"] for r in part if r["metric"] == METRIC] for name, part in of_run.items()}
        values["recall"] = [r["value"] for r in rows if r["task"] == "retrieval" and _is_recall(r["metric"])]
        for name, part in values.items():
            if part:
                found[name].append(float(np.mean(part)))
    return found


def _made(plan: Plan, rungs: Sequence[Rung]) -> dict[str, list]:
    """By which commits, and on machines of how many CPU cores, the runs were made."""
    paths = [plan.workdir / run.name / "provenance.json" for rung in rungs for run in rung.runs]
    found = [io.read_json(path) for path in paths if path.exists()]
    return {
        "commits": sorted({one["commit"] for one in found if one.get("commit")}),
        "cpus": sorted({one["cpus"] for one in found if one.get("cpus")}),
    }


def _is_recall(metric: str) -> bool:
    return metric.startswith("i2t_R@5_of_") and not metric.endswith("_strict")


def _curve(plan: Plan, run: Run) -> list[tuple[int, float]]:
    """(step, score) at each evaluation in training."""
    lines = metrics.read(plan.workdir / run.name)
    names = [f"eval/{name}/{TASK}/{METRIC}" for name in _scored(plan)]
    return [(line["step"], float(np.mean([line[n] for n in names]))) for line in lines if all(n in line for n in names)]


def _reached(curve: Sequence[tuple[int, float]], target: float | None) -> int | None:
    """The first step whose score is the target or more; None where there is none."""
    return next((step for step, score in curve if target is not None and score >= target), None)


def _rates(plan: Plan, rung: Rung) -> list[float]:
    """Pairs a second of each logged interval but the first, which compiles."""
    lines = [line for run in rung.runs for line in metrics.read(plan.workdir / run.name)[1:]]
    return [line["pairs_per_second"] for line in lines if "pairs_per_second" in line] or [float("nan")]


def _references(plan: Plan, scored: Sequence[str]) -> list[dict[str, Any]]:
    """The teachers by themselves, the best of them for each set (chosen on the test cases), and what needs no model."""
    out = io.as_path(plan.config["references"])
    rows = results.load(out / "results.json") if (out / "results.json").exists() else []
    options = {"task": TASK, "resamples": plan.config["bootstrap"]}
    kept = {(row["model"], row["dataset"], row["task"]): row for row in rows if row["metric"] == METRIC}
    teachers = sorted({model for model, name, task in kept if model.startswith("teacher:") and task == TASK})
    teachers = [one for one in teachers if all((one, name, TASK) in kept for name in scored)]
    found = []
    for model in teachers:
        score = _numbers(summary.mean(out, model, scored, metric=METRIC, **options))
        found.append({"name": model, "score": score, "linear_probe": _probe(kept, model, scored)})
    if teachers:
        winners = [max(teachers, key=lambda one, name=name: kept[one, name, TASK]["value"]) for name in scored]
        each = [summary.estimates(out, model, name, **options)[0][METRIC] for model, name in zip(winners, scored)]
        score = _numbers(bootstrap.mean_over_sets(each))
        found.append({"name": "best teacher of each set, picked on its test cases", "score": score, "linear_probe": []})
    floor = _probe(kept, "floor:pixels", scored)
    return found + ([{"name": "pixels and a colour histogram", "score": None, "linear_probe": floor}] if floor else [])


def _probe(kept: Mapping[tuple[str, str, str], Mapping[str, Any]], model: str, scored: Sequence[str]) -> list[float]:
    values = [kept[model, name, "linear_probe"]["value"] for name in scored if (model, name, "linear_probe") in kept]
    return [float(np.mean(values))] if len(values) == len(scored) else []


def _span(numbers: Sequence[float] | None, *, signed: bool) -> str:
    if numbers is None:
        return ""
    value, low, high = (f"{x:+.3f}" if signed else f"{x:.3f}" for x in numbers)
    return f"{value} ({low} to {high})"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}" if values else ""


def _steps(reached: Sequence[int | None]) -> str:
    return ", ".join("never" if step is None else str(step) for step in reached)


def _plotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """The scores in the form of a sweep's table."""
    task, dataset, metric = SCORE
    rows = [(one["rung"], one["score"], one["each"]) for one in table["rungs"]]
    rows += [(one["name"], one["score"], [one["score"][0]]) for one in table["references"] if one["score"]]
    settings = []
    for label, (value, low, high), each in rows:
        number = {"task": task, "dataset": dataset, "metric": metric, "value": value, "low": low, "high": high}
        settings.append({"label": label, "values": [{**number, "each": each}]})
    return {"settings": settings}
