"""A survival study as a config describes it (configs/survival.py): patients, models, result rows, predictions."""

import csv
import dataclasses
import io as memory
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax import io
from mmkd_jax.data.bags import Bags
from mmkd_jax.errors import InputError, near
from mmkd_jax.evals import bootstrap, results, survival, survival_folds, survival_heads, survival_table
from mmkd_jax.evals.survival import Scored
from mmkd_jax.evals.survival_table import Patients
from mmkd_jax.report.survival import page

__all__ = ["evaluate", "page"]

TASK = "survival"


@dataclasses.dataclass(frozen=True, eq=False)
class Cohort:
    """Patients with everything that the study's models need, and their covariates by name, float64 `[n, k]`."""

    name: str
    patients: Patients
    blocks: dict[str, np.ndarray]
    bags: Bags | None
    folds: list[survival_folds.Fold]
    left_out: int


def evaluate(
    config: ConfigDict, out: epath.Path, *, encoders: Iterable[Any], resamples: int, seed: int
) -> dict[str, Any]:
    """Evaluates every cohort; writes rows to OUT/results.json and predictions.

    Args:
      config: of configs/survival.py.
      out: folder of results.
      encoders: none: features of slides are made beforehand.
      resamples: of the intervals.
      seed: of the resamples and of training.

    Returns:
      What the page shows: `cohorts`, see `record`, and how they were evaluated.

    Raises:
      InputError: a table, a column, a slide is missing, or a cohort cannot be evaluated; the message names it.
    """
    if any(True for _ in encoders):
        raise InputError(
            "a survival study takes features that are stored (config.slides), and no checkpoint or teacher"
        )
    cohorts = [read(config, name) for name in config.cohorts or ("",)]  # all that is wrong shows before the work
    told = []
    for cohort in cohorts:
        found: dict[str, Scored] = {}
        for name in _models(config):
            try:
                found[name] = _scored(config, cohort, name, out, resamples, seed)
            except InputError as error:
                raise InputError(f"{cohort.name}, {name}: {error}") from error
            _predictions(out, cohort, name, found[name])
        results.update(out / "results.json", _rows(config, cohort, found, seed))
        told.append(record(cohort, found))
    return {"name": config.name, "unit": config.unit, "config": configs.to_dict(config), "cohorts": told,
             "resamples": resamples, "seed": seed}  # fmt: skip


def read(config: ConfigDict, cohort: str) -> Cohort:
    """The patients of a cohort ("": all).

    Raises:
      InputError: what is asked for is not there, or does not fit.
    """
    if not config.root:
        raise InputError("no folder of tables is given; use --config.root=DIR")
    root, where = io.as_path(config.root), {config.cohort: cohort} if cohort else None
    names = {block for model in (*config.cox, *config.mil) for block in model.split("+")}
    columns = [name for name in (config.fold or config.site, config.slide_column if config.slides else "") if name]
    levels = {
        name: tuple(filter(None, given.split(","))) for name, _, given in (c.partition("=") for c in config.clinical)
    }
    patients = survival_table.read(
        root / config.table, id=config.id, time=config.time, event=config.event, covariates=levels, columns=columns,
        where=where,
    )  # fmt: skip
    blocks = {"clinical": patients.covariates}
    for entry in config.tables:
        name, equals, file = entry.partition("=")
        if not equals:
            raise InputError(f"config.tables has {entry!r}, which is not NAME=FILE")
        if name in names:
            blocks[name] = numbers(root / file, config.id, patients.ids)
    known = {*blocks, *(["slides"] if config.slides else [])}
    if unknown := sorted(names - known):
        raise InputError(f"no covariates are called {unknown[0]!r}; {near(unknown[0], known)}")
    label = f"{config.name}.{cohort.removeprefix('TCGA-')}" if cohort else config.name
    fold = _folds(config, patients, label)
    kept = _inside(fold)
    for name in names:
        there = (
            patients.columns[config.slide_column] != "" if name == "slides" else np.isfinite(blocks[name]).any(axis=1)
        )
        kept = kept & there
    if not kept.any():
        raise InputError(f"{label}: no patient has a fold and {', '.join(sorted(names))}")
    rows = np.flatnonzero(kept)
    try:
        folds = list(survival_folds.nested(fold[rows], patients.outcomes[rows], patients.ids[rows]))
    except InputError as error:
        raise InputError(f"{label}: {error}") from error
    left_out, patients = len(patients) - len(rows), _subset(patients, rows)
    blocks, bags = {name: block[rows] for name, block in blocks.items()}, None
    if "slides" in names:
        bags = _bags(config, patients)
        blocks["slides"] = np.stack([bags.mean(row) for row in range(len(bags))])
    return Cohort(label, patients, blocks, bags, folds, left_out)


def numbers(path: epath.Path, id: str, ids: np.ndarray) -> np.ndarray:
    """All columns but the ids' of a CSV table, float64 `[n, columns]` in the order of `ids`; NaN rows where none is.

    Raises:
      InputError: no such table or column, or a value is no number.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; name the table of numbers")
    rows = list(csv.reader(memory.StringIO(path.read_text())))
    if not rows or id not in rows[0]:
        raise InputError(f"{path} has no column {id!r}; {near(id, rows[0] if rows else [])}")
    place = rows[0].index(id)
    try:
        known = {row[place]: [float(v) if v else np.nan for k, v in enumerate(row) if k != place] for row in rows[1:]}
    except ValueError as error:
        raise InputError(f"{path}: {error}; all columns but {id!r} must be numbers") from None
    nothing = [np.nan] * (len(rows[0]) - 1)
    found = [known.get(str(one), nothing) for one in ids]
    if {len(one) for one in found} != {len(nothing)}:
        raise InputError(f"{path} has rows of different lengths; it is damaged")
    return np.array(found)


def record(cohort: Cohort, found: dict[str, Scored]) -> dict[str, Any]:
    """What a page shows of a cohort: counts, and by model numbers, folds, log-rank test and curves; differences."""
    outcomes, inside = cohort.patients.outcomes, np.isfinite(next(iter(found.values())).risk)
    models = {}
    for name, one in found.items():
        models[name] = {
            "metrics": {metric: _told(estimate) for metric, estimate in one.estimates.items()},
            "incomplete": one.incomplete,
            "folds": one.folds,
            "log_rank": {"statistic": one.log_rank[0], "p": one.log_rank[1]},
            "curves": survival.curves(outcomes[inside], one.risk[inside]),
        }
    pairs = [(a, b) for k, a in enumerate(found) for b in list(found)[:k]]
    differences = [{"model": a, "against": b, **_told(survival.difference(found[a], found[b]))} for a, b in pairs]
    return {"name": cohort.name, "n": int(inside.sum()), "events": int(outcomes.event[inside].sum()),
            "left_out": cohort.left_out, "models": models, "differences": differences}  # fmt: skip


def _told(estimate: bootstrap.Estimate) -> dict[str, float]:
    low, high = estimate.interval()
    return {"value": float(estimate.value), "low": low, "high": high}


def _models(config: ConfigDict) -> list[str]:
    found = [f"{kind}: {blocks}" for kind, asked in (("cox", config.cox), ("mil", config.mil)) for blocks in asked]
    if not found:
        raise InputError("nothing to evaluate; name covariates in config.cox or config.mil")
    return found


def _scored(config: ConfigDict, cohort: Cohort, model: str, out: epath.Path, resamples: int, seed: int) -> Scored:
    kind, _, blocks = model.partition(": ")
    shared = {"times": config.times, "resamples": resamples, "seed": bootstrap.seed_of(seed, cohort.name)}
    outcomes = cohort.patients.outcomes
    x = np.concatenate([cohort.blocks[block] for block in blocks.split("+")], axis=1)
    if kind == "cox":
        penalty = {"l1_ratio": config.l1_ratio, "strengths": tuple(config.strengths)}
        return survival.run(x, outcomes, cohort.folds, **penalty, **shared)
    settings = survival_heads.Settings(**configs.to_dict(config.heads))
    folder = out / "runs" / results.file_name(cohort.name) / results.file_name(model)

    def predict(fold: survival_folds.Fold) -> survival.Prediction:
        bags = cohort.bags
        if blocks != "slides":  # a bag of one: what is missing gets the training patients' mean
            scaled = survival_table.standardise(x, np.concatenate([fold.train, fold.val]))
            bags = Bags([[row[None].astype(np.float32)] for row in scaled])
        return survival_heads.predictor(bags, outcomes, settings, folder, seed)(fold)

    return survival.scored(predict, outcomes, cohort.folds, **shared)


def _rows(config: ConfigDict, cohort: Cohort, found: dict[str, Scored], seed: int) -> list[dict]:
    rows, names = [], list(found)
    for name, one in found.items():
        context = {
            "profile": "nested_folds",
            "event": config.event,
            "folds": one.folds,
            "split_hash": io.hash_of([[fold.name, cohort.patients.ids[fold.test].tolist()] for fold in cohort.folds]),
            "log_rank": {"statistic": one.log_rank[0], "p": one.log_rank[1]},
            "bootstrap": {"method": "percentile", "unit": "patient", "strata": "fold"},
        }
        estimates = dict(one.estimates)
        for other in names[: names.index(name)]:
            estimates[f"c_index_less_{other}"] = survival.difference(one, found[other])
        about = {"model": name, "checkpoint": "", "dataset": cohort.name, "task": TASK}
        counted = {"n": sum(fold["n"] for fold in one.folds), "seed": seed}
        for metric, value in estimates.items():
            drawn = {**context["bootstrap"], "resamples": len(value.replicates)}
            drawn["incomplete"] = one.incomplete.get(metric, one.incomplete["c_index"])
            told = {"context": {**context, "bootstrap": drawn}}
            rows.append({**about, "metric": metric, **_told(value), **counted, **told})
    return rows


def _predictions(out: epath.Path, cohort: Cohort, model: str, one: Scored) -> None:
    fold = np.full(len(one.risk), "", dtype="U32")
    for part in cohort.folds:
        fold[part.test] = part.name
    patients = cohort.patients
    arrays = {"ids": patients.ids, "fold": fold, "risk": one.risk, "time": patients.outcomes.time,
              "event": patients.outcomes.event}  # fmt: skip
    results.save_predictions(results.predictions_path(out, model, cohort.name, TASK), arrays)


def _folds(config: ConfigDict, patients: Patients, label: str) -> np.ndarray:
    if config.fold:
        return patients.columns[config.fold]
    if not config.site:
        raise InputError("folds need config.fold, a column of the table, or config.site, whose values stay whole")
    try:
        return survival_folds.site_folds(patients.outcomes, patients.columns[config.site], config.folds)
    except InputError as error:
        raise InputError(f"{label}: {error}") from error


def _inside(fold: np.ndarray) -> np.ndarray:
    return fold >= 0 if np.issubdtype(fold.dtype, np.number) else fold != ""


def _subset(patients: Patients, rows: np.ndarray) -> Patients:
    columns = {name: column[rows] for name, column in patients.columns.items()}
    return Patients(patients.ids[rows], patients.outcomes[rows], patients.covariates[rows], patients.names, columns)


def _bags(config: ConfigDict, patients: Patients) -> Bags:
    """Every patient's slides; a name may end in the ending of the slide's own file."""
    folder = io.as_path(config.slides)
    if not folder.is_dir():
        raise InputError(f"there is no folder of features {folder}; see config.slides")
    named = patients.columns[config.slide_column]
    return Bags([[folder / f"{epath.Path(name).stem}.npy" for name in names.split(";") if name] for names in named])
