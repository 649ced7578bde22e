"""What the page of an evaluation folder shows: gathered from results.json, predictions/ and kept examples."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.evals import comparison, outcomes, results
from mmkd_jax.evals.summary import MEAN
from mmkd_jax.report import compare, examples, floor, reliability, vqa
from mmkd_jax.report.markup import percent

EXAMPLES = "examples.json"  # pictures with answers, kept when the pairs set is at hand
RANKED = {"zeroshot": "balanced_accuracy", "linear_probe": "balanced_accuracy", "retrieval": "i2t_R@5"}


def keep_examples(out: str | os.PathLike, pairs, sets: Sequence[Any]) -> None:
    """Writes OUT/examples.json: pictures of every set in `sets` with what the leading model said of them."""
    rows = results.load(io.as_path(out) / "results.json")
    found: dict[str, list] = {"cases": [], "examples": [], "questions": []}
    for one in sets:
        for task, key, pick in (
            ("zeroshot", "cases", lambda model, one: examples.cases(out, model, pairs, one.name, one.class_names)),
            ("retrieval", "examples", lambda model, one: examples.examples(out, model, pairs, one.name, queries=2)),
        ):
            model = _lead([r for r in rows if (r["task"], r["dataset"]) == (task, one.name)], task)
            if model and (key != "cases" or one.class_names):
                with contextlib.suppress(InputError):  # an earlier evaluation's model, on other rows than these
                    found[key].append(pick(model, one))
        with contextlib.suppress(InputError):
            found["questions"] += [asked] if (asked := vqa.cases(out, rows, pairs, one.name)) else []
    io.write_json(io.as_path(out) / EXAMPLES, found)


def gather(out: str | os.PathLike) -> dict[str, Any]:
    """The data of the page, see `mmkd_jax.report`.

    Raises:
      InputError: there is no results.json, or it is damaged.
    """
    out = io.as_path(out)
    rows = results.load(out / "results.json")
    kept = io.read_json(out / EXAMPLES) if (out / EXAMPLES).exists() else {}
    records, notes = [], []
    for task, metric in RANKED.items():
        models = _ordered(rows, out, task)
        if len(models) > 1:
            try:
                records.append(_compared(out, models, task, metric))
            except InputError as error:
                notes.append(f"{task}: the models are not ranked, since {error}")
    means = [row for record in records for row in _means(record)]
    lead = _lead(rows, next((task for task in RANKED if any(row["task"] == task for row in rows)), ""))
    for record in records:
        notes += [f"{record['task']}: {note}" for note in (*compare.left_out(record), *record["notes"])]
    return {
        "title": out.name,
        **_headed(records, rows),
        "rows": [*rows, *means],
        **({"highlight": lead} if lead else {}),
        "comparisons": records,
        "calibration": _calibration(out, rows),
        "vqa": vqa.measure(out, rows),
        **kept,
        "notes": [*notes, *floor.shortfalls(out, rows), *_mixed(rows)],
        "provenance": _provenance(rows),
    }


def _ordered(rows: Sequence[Mapping], out, task: str) -> list[str]:
    """Models with outputs of a task, the best mean over the sets that all of them have first."""
    names = list(dict.fromkeys(row["model"] for row in rows if row["task"] == task))
    names = [name for name in names if outcomes.datasets(out, name, task)]
    scores = {name: _scores(rows, name, task) for name in names}
    common = set.intersection(*map(set, scores.values())) if scores else set()
    return sorted(names, key=lambda name: -sum(scores[name][dataset] for dataset in common))


def _scores(rows: Sequence[Mapping], model: str, task: str) -> dict[str, float]:
    """The metric that a task is ranked by, by set."""
    metric = RANKED[task]
    return {
        row["dataset"]: row["value"]
        for row in rows
        if (row["model"], row["task"]) == (model, task)
        and (row["metric"] == metric or row["metric"].startswith(f"{metric}_of_"))
        and not row["metric"].endswith("_strict")
    }


def _lead(rows: Sequence[Mapping], task: str) -> str | None:
    """The best model over the sets that all have, a student where there is one."""
    names = list(dict.fromkeys(row["model"] for row in rows if row["task"] == task))
    students = [name for name in names if not name.startswith(("teacher:", "features:"))]
    scores = {name: _scores(rows, name, task) for name in students or names}
    common = set.intersection(*map(set, scores.values())) if scores else set()
    return max(scores, key=lambda name: sum(scores[name][dataset] for dataset in common), default=None)


def _compared(out, models: Sequence[str], task: str, metric: str) -> dict[str, Any]:
    sets = {name for model in models for name in outcomes.datasets(out, model, task)}
    entries = [comparison.Contestant(os.fspath(out), model, model) for model in models]
    resamples = max(1000, 40 * len(sets))  # enough that one set can be told apart
    return comparison.compare(entries, task=task, metric=metric, resamples=resamples)


def _means(record: Mapping[str, Any]) -> list[dict]:
    """Result rows of the means over the sets that all models have."""
    summary = record["summary"]
    if not summary or len(summary["datasets"]) < 2 or record["task"] == "retrieval":
        return []
    n = sum(row["n"] for row in record["sets"] if row["dataset"] in summary["datasets"])
    context = {"profile": "mean_over_sets", "datasets": summary["datasets"]}
    about = {"checkpoint": "", "dataset": MEAN, "task": record["task"], "metric": record["metric"]}
    rest = {"n": n, "seed": record["seed"], "context": context}
    return [{"model": one["label"], **about, **one["mean"], **rest} for one in summary["models"]]


def _headed(records: Sequence[Mapping], rows: Sequence[Mapping]) -> dict[str, str]:
    """The finding in a sentence: who is first and by how much, or how good the only model is."""
    if records and records[0]["summary"]:
        record = records[0]
        rank = record["summary"]["models"][0]["mean_rank"]
        words = f"{record['task']}, {record['metric']}".replace("_", " ")
        among = f"of {len(record['models'])} models; paired by case, each set alike, 95 % intervals."
        lede = f"By {words}. Mean rank {rank['value']:.2f} ({rank['low']:.2f} to {rank['high']:.2f}) {among}"
        return {"headline": compare.headline(record), "lede": lede}
    for task, metric in RANKED.items():
        found = [row for row in rows if row["task"] == task and row["metric"].startswith(metric)]
        if found:
            row = max(found, key=lambda row: row["value"])
            where = f"{row['metric'].replace('_', ' ')} on {row['dataset']}"
            return {"headline": f"{row['model']}: {percent(row['value'])} % {where}"}
    return vqa.headed(rows)


def _calibration(out, rows: Sequence[Mapping]) -> list[dict[str, Any]]:
    """Of each model over the sets that all have zero-shot outputs on."""
    models = _ordered(rows, out, "zeroshot")
    common = [set(outcomes.datasets(out, model, "zeroshot")) for model in models]
    shared = sorted(set.intersection(*common)) if common else []
    return [reliability.measure(out, model, shared) for model in models] if shared else []


def _mixed(rows: Sequence[Mapping]) -> list[str]:
    """Models under whose name there are numbers of different weights."""
    hashes: dict[str, set[str]] = {}
    for row in rows:
        hashes.setdefault(row["model"], set()).add(row["context"].get("model_hash", ""))
    words = "its sets were evaluated with different weights; evaluate all of them again"
    return [f"{model}: {words}" for model, found in hashes.items() if len(found) > 1]


def _provenance(rows: Sequence[Mapping]) -> dict[str, Any]:
    models, sets = {}, {}
    for row in rows:
        told = {"from": row["checkpoint"], "hash": row["context"].get("model_hash", "")}
        models[row["model"]] = {name: value for name, value in told.items() if value}
        sets[row["dataset"]] = {"rows": row["n"], "split": row["context"].get("split_hash", "")[:12]}
    return {"models": models, "sets": sets, "seeds": ", ".join(map(str, sorted({row["seed"] for row in rows})))}
