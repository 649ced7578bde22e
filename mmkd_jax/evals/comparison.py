"""One model against others over sets: paired differences, which sets decide, ranks; nothing is left out silently.

Each set counts alike. A model without outputs on a set is shown as absent there, and averages, ranks and the
signed-rank test are over the sets that all models have; the record says which those are.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from mmkd_jax import io
from mmkd_jax.errors import InputError, near
from mmkd_jax.evals import bootstrap, outcomes, results, significance
from mmkd_jax.evals.bootstrap import Estimate

SCHEMA = 1
LEVEL = 0.05
_TOLD = ("profile", "prompt_hash", "split_hash", "train_hash", "feature_layer")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One model of one result folder, and how it is called."""

    folder: str
    model: str
    label: str


def contestants(entries: Sequence[str]) -> list[Contestant]:
    """What `FOLDER` (with one model) or `FOLDER:MODEL` name, in the order given, with different labels.

    Raises:
      InputError: fewer than two, no such folder or model, several models and none named, or one given twice.
    """
    if len(entries) < 2:
        raise InputError("a comparison needs at least two result folders (or FOLDER:MODEL)")
    found = [_named(entry) for entry in entries]
    for entry, one in zip(entries, found):
        if found.count(one) > 1:
            raise InputError(f"{entry} is given twice; name different models")
    names = [model for _, model in found]
    longer = [f"{io.as_path(folder).name}:{model}" for folder, model in found]
    labels = []
    for place, (name, long) in enumerate(zip(names, longer)):
        labels.append(name if names.count(name) == 1 else long if longer.count(long) == 1 else entries[place])
    return [Contestant(folder, model, label) for (folder, model), label in zip(found, labels)]


def _named(entry: str) -> tuple[str, str]:
    """Folder and model; both may contain colons (`gs://runs/a:teacher:clip`)."""
    cuts = [len(entry)] + [i for i, letter in enumerate(entry) if letter == ":" and not entry[i:].startswith("://")]
    for cut in cuts:
        folder, model = entry[:cut], entry[cut + 1 :]
        known = outcomes.models(folder) if folder else []
        if not known:
            continue
        if model and model not in known:
            raise InputError(f"{folder} holds no outputs of {model!r}; {near(model, known)}")
        if not model and len(known) > 1:
            raise InputError(f"{folder} holds several models; name one as {folder}:MODEL ({', '.join(known)})")
        return os.fspath(io.as_path(folder)), model or known[0]
    raise InputError(f"{entry} is no folder with predictions/; give one that mmkd eval wrote, or FOLDER:MODEL")


def compare(
    models: Sequence[Contestant],
    *,
    task: str = "zeroshot",
    metric: str = "balanced_accuracy",
    sets: Sequence[str] | None = None,
    resamples: int = 10000,
    seed: int = 0,
) -> dict:
    """The first model against each other one.

    Args:
      models: of `contestants`.
      task: whose outputs.
      metric: see `outcomes.resample`.
      sets: names; all that any model has by default.
      resamples: of the paired bootstrap; enough that a single set can be told apart after Holm's correction.
      seed: of the resamples; that of `mmkd eval` gives its intervals again.

    Returns:
      a JSON-like record: `models`; `sets`, a row each with values and differences (`None` where absent); `summary` over
      the sets that all have (`None` without any); `left_out`, the others; `notes`.

    Raises:
      InputError: a named set is absent, outputs are of different cases, or too few resamples.
    """
    names = _sets(models, task, sets)
    if significance.smallest_p(resamples) * len(names) > LEVEL:
        enough = int(2 * len(names) / LEVEL)
        raise InputError(
            f"{resamples} resamples cannot decide any of {len(names)} sets; use at least --bootstrap {enough}"
        )
    loaded = {name: _load(models, name, task) for name in names}
    estimates = {}
    for name, outputs in loaded.items():
        given = outcomes.joined(name, [one for one in outputs if one is not None])
        ordered, resampled = iter(given), iter(outcomes.resample(name, given, metric, resamples, seed))
        estimates[name] = [None if one is None else next(resampled) for one in outputs]
        loaded[name] = [None if one is None else next(ordered) for one in outputs]
    rows = [_row(models, name, metric, loaded[name], estimates[name]) for name in names]
    _correct(rows, len(models))
    complete = [name for name in names if None not in estimates[name]]
    about = {"schema": SCHEMA, "task": task, "metric": metric, "resamples": resamples, "seed": seed, "level": LEVEL}
    return {
        **about,
        "models": [dataclasses.asdict(one) for one in models],
        "sets": rows,
        "summary": _summary(models, [estimates[name] for name in complete], complete, seed) if complete else None,
        "left_out": [{"dataset": row["dataset"], "absent": row["absent"]} for row in rows if row["absent"]],
        "notes": _notes(models, names, task),
    }


def _sets(models: Sequence[Contestant], task: str, wanted: Sequence[str] | None) -> list[str]:
    known = {one.label: outcomes.datasets(one.folder, one.model, task) for one in models}
    every = sorted({name for of_model in known.values() for name in of_model})
    if not every:
        raise InputError(f"none of these models has outputs of task {task!r}; evaluate it first, or name another task")
    for name in wanted or ():
        if name not in every:
            raise InputError(f"no model has outputs on {name!r} ({task}); {near(name, every)}")
        missing = [label for label, of_model in known.items() if name not in of_model]
        if missing:
            raise InputError(f"{', '.join(missing)} has no outputs on {name!r} ({task}); evaluate it there first")
    return list(dict.fromkeys(wanted)) if wanted else every


def _load(models: Sequence[Contestant], dataset: str, task: str) -> list[outcomes.Outputs | None]:
    return [
        outcomes.read(one.folder, one.model, dataset, task, one.label)
        if results.predictions_path(one.folder, one.model, dataset, task).exists()
        else None
        for one in models
    ]


def _row(
    models: Sequence[Contestant], name: str, metric: str, outputs: Sequence, estimates: Sequence[Estimate | None]
) -> dict:
    given = next(one for one in outputs if one is not None)
    pairs = [(other, estimates[0], estimates[k], outputs[k]) for k, other in enumerate(models) if k]
    return {
        "dataset": name,
        "n": outcomes.count(given, metric),
        "classes": given.arrays["scores"].shape[1] if given.classified else None,
        "values": {m.label: None if e is None else _with_interval(e) for m, e in zip(models, estimates)},
        "absent": [m.label for m, e in zip(models, estimates) if e is None],
        "differences": [
            None
            if own is None or theirs is None
            else {
                "other": other.label,
                **dataclasses.asdict(significance.paired(own, theirs)),
                **_without_resampling(outputs[0], given_by),
            }
            for other, own, theirs, given_by in pairs
        ],
    }


def _without_resampling(own: outcomes.Outputs, other: outcomes.Outputs) -> dict:
    """McNemar's test of accuracy and DeLong's of a binary AUC, where rows are independent; None otherwise."""
    found = {"mcnemar": None, "delong": None}
    if not own.classified or not own.independent:
        return found
    labels, scores = own.arrays["labels"], [one.arrays["scores"] for one in (own, other)]
    only_own, only_other, p = significance.mcnemar(*(s.argmax(axis=1) == labels for s in scores))
    found["mcnemar"] = {"only_first": only_own, "only_other": only_other, "p": p}
    if scores[0].shape[1] == 2 and np.bincount(labels, minlength=2).min() > 1:
        tested = significance.delong_difference(labels == 1, *(s[:, 1] - s[:, 0] for s in scores))
        found["delong"] = dataclasses.asdict(tested)
    return found


def _correct(rows: list[dict], models: int) -> None:
    """Adds Holm's p-values over the sets of each pair of models, and what they decide."""
    for k in range(models - 1):
        given = [row["differences"][k] for row in rows if row["differences"][k]]
        for one, p in zip(given, significance.holm([one["p"] for one in given])):
            one["p_holm"] = float(p)
            one["decided"] = 0 if p >= LEVEL else 1 if one["value"] > 0 else -1


def _summary(models: Sequence[Contestant], estimates: list[list[Estimate]], names: list[str], seed: int) -> dict:
    by_model = list(zip(*estimates))
    means = [bootstrap.mean_over_sets(of_model) for of_model in by_model]
    wide = [significance.over_sets(of_model, seed) for of_model in by_model]
    ranks = significance.mean_ranks(by_model)
    differences = []
    for k in range(1, len(models)):
        of_sets = np.array([a.value - b.value for a, b in zip(by_model[0], by_model[k])])
        statistic, n, p = significance.wilcoxon(of_sets)
        low, high = bootstrap.difference(wide[0], wide[k]).interval()
        others = [(of_sets.sum() - value) / max(len(of_sets) - 1, 1) for value in of_sets]
        differences.append(
            {
                "other": models[k].label,
                **dataclasses.asdict(significance.paired(means[0], means[k])),
                "over_sets": {"low": low, "high": high},
                "wilcoxon": {"statistic": statistic, "n": n, "p": p},
                "wins": int(np.sum(of_sets > 0)),
                "ties": int(np.sum(of_sets == 0)),
                "losses": int(np.sum(of_sets < 0)),
                "without": [{"dataset": d, "value": float(v)} for d, v in zip(names, others)] if len(names) > 1 else [],
            }
        )
    for one, p in zip(differences, significance.holm([one["wilcoxon"]["p"] for one in differences])):
        one["wilcoxon"]["p_holm"] = float(p)
    shown = [
        {"label": m.label, "mean": _with_interval(mean), "mean_rank": _with_interval(rank)}
        for m, mean, rank in zip(models, means, ranks)
    ]
    return {"datasets": names, "models": shown, "differences": differences}


def _with_interval(estimate: Estimate) -> dict:
    low, high = estimate.interval()
    return {"value": estimate.value, "low": low, "high": high}


def _notes(models: Sequence[Contestant], names: Sequence[str], task: str) -> list[str]:
    """Where the result rows say that models were asked in different ways."""
    told: dict[tuple[str, str], dict[str, str]] = {}
    for one in models:
        path = io.as_path(one.folder) / "results.json"
        for row in results.load(path) if path.exists() else ():
            if (row["model"], row["task"]) == (one.model, task) and row["dataset"] in names:
                for key in _TOLD:
                    if key in row["context"]:
                        told.setdefault((row["dataset"], key), {})[one.label] = str(row["context"][key])
    notes = []
    for (dataset, key), values in sorted(told.items()):
        if len(set(values.values())) > 1:
            words = ", ".join(f"{label}: {value[:12]}" for label, value in values.items())
            notes.append(f"{dataset}: the models' {key.replace('_', ' ')} differs ({words})")
    return notes
