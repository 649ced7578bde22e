"""Looks at a described set of patients or slides as it lies: how many of what, and everything wrong with it."""

import dataclasses
from collections import Counter, defaultdict

import numpy as np

from mmkd_jax import io
from mmkd_jax.data.sources import Skipped
from mmkd_jax.evals import patient_sets, slide_sets
from mmkd_jax.evals.set_check import MAX_BAD, SHOWN
from mmkd_jax.evals.sets import SetRecord


@dataclasses.dataclass
class Found:
    """Lines of counts and examples; `problems`: other lines; `fatal`: lines that say why it cannot be evaluated."""

    lines: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    fatal: list[str] = dataclasses.field(default_factory=list)


def check(record: SetRecord, root: str) -> Found:
    """Reads the tables of the set, and whether what they name is there.

    Raises:
      InputError: a table is missing or says what it must not.
    """
    return _patients(record, root) if record.task == "survival" else _slides(record, root)


def _patients(record: SetRecord, root: str) -> Found:
    cohort, found = patient_sets.read(record, root), Found()
    patients = cohort.patients
    event, time = patients.outcomes.event, patients.outcomes.time
    found.lines.append(f"patients {len(patients)}, events {int(event.sum())}, times {time.min():g} to {time.max():g}")
    for name, column in zip(patients.names, patients.covariates.T):
        known = int(np.isfinite(column).sum())
        found.lines.append(f"covariate {name}: known of {known}")
        if not known:
            found.problems.append(f"covariate {name} is known of no patient")
    for name, column in patients.columns.items():
        found.lines.append(f"{name}s {len(np.unique(column))}")
    _few(found, list(cohort.left_out), "rows without time or event")
    _sized(record, found, {"all": len(patients)}, "patients")
    if not event.any():
        found.fatal.append("no patient has an event")
    folder, paths = io.as_path(root), [path for of in cohort.bags for path in of]
    absent = [path for path in paths if not (folder / path).exists()]
    if paths and len(absent) == len(paths):
        found.problems.append(f"none of the {len(paths)} feature files is there: only the table can be evaluated")
    elif absent:
        _few(found, [f"{path} is not there" for path in absent], "feature files that are missing")
    return found


def _slides(record: SetRecord, root: str) -> Found:
    found, slides, absent = Found(), [], []
    for one in slide_sets.read(record, root):
        (absent if isinstance(one, Skipped) else slides).append(one)
    _few(found, [one.reason for one in absent], "slides that are missing")
    if len(absent) > MAX_BAD * (len(slides) + len(absent)):
        total = len(slides) + len(absent)
        found.fatal.append(f"{len(absent)} of {total} slides are not there, more than {MAX_BAD:.0%}")
    counts = Counter((one.split, one.label) for one in slides)
    splits = sorted({one.split for one in slides}, key=lambda s: ({"train": 0, "val": 1, "test": 2}.get(s, 3), s))
    names = record.classes.names
    width = max(map(len, names))
    found.lines.append(" " * width + "".join(f"{split:>9}" for split in splits))
    for number, name in enumerate(names):
        found.lines.append(f"{name:{width}}" + "".join(f"{counts[split, number]:9}" for split in splits))
    of_split = Counter(one.split for one in slides)
    found.lines.append(f"{'slides':{width}}" + "".join(f"{of_split[split]:9}" for split in splits))
    for split in ("train", "test"):
        lacking = [name for number, name in enumerate(names) if not counts[split, number]]
        if slides and len(lacking) > len(names) - 2:
            found.fatal.append(f"split {split} has fewer than two classes")
        elif slides:
            found.problems += [f"class {name!r} is absent in split {split}" for name in lacking]
    _sized(record, found, {**of_split, "all": len(slides)}, "slides")
    where = defaultdict(set)
    for one in slides:
        where[one.patient].add(one.split)
    shared = [f"patient {p!r} is in the splits {', '.join(sorted(of))}" for p, of in where.items() if len(of) > 1]
    _few(found, shared, "patients in several splits")
    return found


def _few(found: Found, lines: list[str], what: str) -> None:
    found.problems += lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"... {len(lines)} {what} in all"]


def _sized(record: SetRecord, found: Found, counts: dict[str, int], what: str) -> None:
    for split, wanted in record.about.get("size", {}).items():
        if counts.get(split, 0) != wanted:
            found.problems.append(f"there are {counts.get(split, 0)} {what} in {split}, the record says {wanted}")
