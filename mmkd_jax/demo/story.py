"""A demo from beginning to end, and the page that tells it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from mmkd_jax import export, io, report
from mmkd_jax.demo.pipeline import Clock, Demo
from mmkd_jax.demo.scores import BEST, METRIC, Scores
from mmkd_jax.evals import summary
from mmkd_jax.evals.floor import FLOOR
from mmkd_jax.report.examples import examples
from mmkd_jax.train import metrics
from mmkd_jax.train.provenance import provenance

KINDS = {"stage1": "control", "clip_only": "control", "clip_only_3x": "control"}
LABELS = {
    "stage1": "stage 1 only",
    "clip_only": "no distillation",
    "clip_only_3x": "no distillation, 3x steps",
    "public": "recipe public",
    "mean": "recipe mean",
    "plus": "recipe plus",
    BEST: "best teacher of each set",
    FLOOR: "pixels (no model)",
}
EMBEDDED = (
    "The pictures are cut from a few sources that Python packages carry: enough to show that everything runs, "
    "far too few to judge quality."
)


def prepare(demo: Demo, clock: Clock) -> Scores:
    """What students learn from and are measured against: pairs, teachers, features, routing, teachers' scores."""
    _compile_once(demo.workdir)
    clock.run("pairs", demo.pairs)
    for name in demo.config.specialists:
        clock.run(f"teacher {name}", lambda name=name: demo.teacher(name))
    clock.run(f"features ({demo.captions})", demo.features)
    clock.run("routing", demo.routing)
    scores = Scores.of(demo)
    for name in demo.config.specialists:
        clock.run(f"evaluate teacher {name}", lambda name=name: scores.teacher(name))
    clock.run("pixel floor", scores.floor)
    return scores


def tell(demo: Demo) -> epath.Path:
    """Runs what is not there yet and returns the report's path."""
    clock = Clock(demo.workdir)
    scores = prepare(demo, clock)
    for seed in range(demo.seeds):
        for name in ("stage1", *demo.config.students):
            suffix = f"{name} ({demo.captions}, seed {seed})"
            clock.run(f"train {suffix}", lambda name=name, seed=seed: demo.student(name, seed))
            clock.run(f"evaluate {suffix}", lambda name=name, seed=seed: scores.student(name, seed))
    scores.summarise()
    if not (scores.out / "export").exists():
        export.export_checkpoint(demo.student("plus", 0), scores.out / "export", results=scores.rows)
    data = report_data(demo, scores, clock.parts)
    io.write_json(scores.out / report.DATA, data)
    report.write_report(scores.out / "report.html", data)
    io.write_text(scores.out / "main.svg", report.main_plot_svg(data))
    return scores.out / "report.html"


def report_data(demo: Demo, scores: Scores, timings: Mapping[str, float]) -> dict[str, Any]:
    """The report's data, see `mmkd_jax.report`."""
    found = io.read_json(scores.out / "summary.json")
    gain, best = found["plus_minus"]["clip_only"], found["mean"][BEST]
    plus = found["mean"]["plus"]
    what = "more" if gain["value"] >= 0 else "less"
    headline = (
        f"Distilled from three specialists, the student reads {plus[0]:.1%} of the pictures right, "
        f"{abs(gain['value']) * 100:.1f} points {what} than without them "
        f"(95 % interval of the difference {gain['low'] * 100:+.1f} to {gain['high'] * 100:+.1f})."
    )
    lede = (
        f"{found['metric'].capitalize()}, {_seeds(demo.seeds)}. The best specialist of each set, "
        f"picked with hindsight, reaches {best[0]:.1%}."
    )
    names = [*(f"teacher:{name}" for name in demo.config.specialists), BEST, FLOOR, "stage1", *demo.config.students]
    return {
        "title": "mmkd_jax demo",
        "headline": headline,
        "lede": lede,
        "rows": _over_seeds(demo, scores, names),
        "models": [
            {"name": name, "label": LABELS.get(name, name.removeprefix("teacher:")), "kind": _kind(name)}
            for name in names
        ],
        "highlight": "plus",
        "differences": [
            {"label": f"plus minus {LABELS[name]}", **{k: d[k] for k in ("value", "low", "high")}}
            for name, d in found["plus_minus"].items()
        ],
        "curves": {name: _curve(demo.student(name, 0)) for name in ("stage1", *demo.config.students)},
        "timings": list(timings.items()),
        "examples": _examples(demo, scores),
        "provenance": _provenance(demo),
        "notes": _notes(demo),
    }


def _over_seeds(demo: Demo, scores: Scores, names: Sequence[str]) -> list[dict]:
    """One row a model, set and metric: several training seeds become their mean, with an interval over both."""
    grouped: dict[tuple, list[dict]] = {}
    for row in scores.rows:
        layer = row["context"].get("feature_layer")
        grouped.setdefault((row["model"], row["dataset"], row["task"], row["metric"], layer), []).append(row)
    merged = []
    for (model, dataset, task, metric, _), rows in grouped.items():
        if len(rows) == 1 or model not in names:
            merged.append(rows[0])
        elif metric == METRIC:
            models = [f"{model}.seed{seed}" for seed in range(demo.seeds)]
            options = {"task": task, "metric": metric, "resamples": demo.config.bootstrap}
            whole = summary.row(scores.out, models, [dataset], name=model, **options)
            merged.append({**whole, "dataset": dataset, "n": rows[0]["n"], "context": rows[0]["context"]})
        else:
            mean = {key: float(np.mean([row[key] for row in rows])) for key in ("value", "low", "high")}
            merged.append({**rows[0], **mean})
    return merged


def _curve(run: epath.Path) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], {k: v for k, v in line.items() if k != "step"}) for line in metrics.read(run)]


def _examples(demo: Demo, scores: Scores) -> list[dict]:
    """Retrieval by the distilled student on the first retrieved set, if there is one."""
    retrieved = [one.name for one in scores.sets if one.captions and not one.class_names]
    return [examples(scores.out, "plus.seed0", demo.pairs(), retrieved[0])] if retrieved else []


def _provenance(demo: Demo) -> dict[str, Any]:
    pairs = demo.pairs()
    about = provenance()
    return {
        "commit": about["commit"],
        "command": " ".join(_without_paths(about["command"])),
        "versions": about["versions"],
        "device": f"{jax.devices()[0].device_kind}, {about['cpus']} cores",
        "pairs": {"hash": pairs.hash, "rows": str(len(pairs))},
        "licences": {name: f"{count} pictures" for name, count in pairs.manifest["counts"]["license"].items()},
    }


def _without_paths(command: Sequence[str]) -> list[str]:
    """The command with the last part of each path only: where somebody keeps data is nobody's business."""
    return [os.path.basename(word.rstrip("/")) if "/" in word else word for word in command]


def _notes(demo: Demo) -> list[str]:
    notes = [] if demo.data else [EMBEDDED]
    notes.append(
        "Intervals are 95 % bootstrap intervals over test cases" + (" and training seeds." if demo.seeds > 1 else ".")
    )
    if demo.seeds == 1:
        notes.append("One training seed: the spread between seeds is not in the intervals.")
    notes.append("The best teacher of each set is chosen on the test split itself: an upper reference, not a method.")
    notes.append("No distillation takes as many steps as stage 1 and stage 2 of the others together.")
    if demo.captions == "modality":
        notes.append("The students' captions of labelled pictures name the modality only.")
    return notes


def _kind(name: str) -> str:
    if name.startswith("teacher:"):
        return "teacher"
    return {BEST: "reference", FLOOR: "control"}.get(name) or KINDS.get(name, "student")


def _seeds(count: int) -> str:
    return "one training seed" if count == 1 else f"mean of {count} training seeds"


def _compile_once(workdir: epath.Path) -> None:
    """Keeps compiled programs: all seeds and both settings share them, and so does a run that continues."""
    jax.config.update("jax_compilation_cache_dir", os.fspath(workdir / ".compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
