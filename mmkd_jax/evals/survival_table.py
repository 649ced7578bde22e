"""Tables of patients with survival times: reading columns of a CSV file, and covariates as numbers.

Nothing is learned here but from the training rows: means for what is missing, and scales.
"""

import csv
import dataclasses
import io as std_io
import os
from collections.abc import Mapping, Sequence

import numpy as np

from mmkd_jax import io
from mmkd_jax.errors import InputError, near
from mmkd_jax.evals.survival_curves import Outcomes


@dataclasses.dataclass(frozen=True, eq=False)
class Patients:
    """n patients of a table.

    Attributes:
      ids: str `[n]`, each once.
      outcomes: of each.
      covariates: float64 `[n, k]`, NaN where missing.
      names: of the covariates.
      columns: the other columns asked for, str `[n]` by name: folds, sites.
    """

    ids: np.ndarray
    outcomes: Outcomes
    covariates: np.ndarray
    names: tuple[str, ...]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)


def read(
    path: str | os.PathLike,
    *,
    id: str,
    time: str,
    event: str,
    covariates: Mapping[str, Sequence[str]],
    columns: Sequence[str] = (),
    where: Mapping[str, str] | None = None,
) -> Patients:
    """Reads patients.

    Args:
      path: CSV file with a row of headings, a patient a row.
      id, time, event: names of columns; events are 1 or 0.
      covariates: columns, each with its levels in order (numbered from 0; any other value is missing), or none for a
        column of numbers.
      columns: further columns to hand on.
      where: values that columns must have for a row to count.

    Raises:
      InputError: a column is missing, no row is left, a patient comes twice, or a value is not what it must be.
    """
    rows = list(csv.DictReader(std_io.StringIO(io.as_path(path).read_text()))) if io.as_path(path).exists() else None
    if rows is None:
        raise InputError(f"{path} does not exist; name the table of patients")
    known = list(rows[0]) if rows else []
    for name in (id, time, event, *covariates, *columns, *(where or {})):
        if name not in known:
            raise InputError(f"{path} has no column {name!r}; {near(name, known)}")
    rows = [row for row in rows if all(row[name] == value for name, value in (where or {}).items())]
    if not rows:
        raise InputError(f"{path} has no row where {where}")
    ids = np.array([row[id] for row in rows])
    if len(np.unique(ids)) < len(ids):
        names, counts = np.unique(ids, return_counts=True)
        raise InputError(f"{path}: patient {str(names[counts > 1][0])!r} has several rows; keep one")
    outcomes = Outcomes(_numbers(rows, event, path), _numbers(rows, time, path))
    found = [_levels(rows, name, given) if given else _numbers(rows, name, path) for name, given in covariates.items()]
    numbers = np.stack(found, axis=1) if found else np.zeros((len(rows), 0))
    return Patients(ids, outcomes, numbers, tuple(covariates), {n: np.array([r[n] for r in rows]) for n in columns})


def standardise(covariates: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Covariates `[n, k]` less the mean of the rows `train`, over their deviation; what is missing gets the mean.

    A covariate that is constant or never known in the training rows becomes 0.
    """
    known = np.isfinite(covariates[train])
    count = np.maximum(known.sum(axis=0), 1)
    filled = np.where(known, covariates[train], 0.0)
    mean = filled.sum(axis=0) / count
    spread = np.sqrt((np.where(known, filled - mean, 0) ** 2).sum(axis=0) / count)
    scaled = (covariates - mean) / np.where(spread > 1e-12, spread, np.inf)
    return np.where(np.isfinite(scaled), scaled, 0.0)


def _numbers(rows: list[dict], name: str, path) -> np.ndarray:
    found = np.empty(len(rows))
    for k, row in enumerate(rows):
        try:
            found[k] = float(row[name]) if row[name] else np.nan
        except ValueError:
            raise InputError(
                f"{path}: column {name!r} has {row[name]!r}, which is no number; give its levels in order"
            ) from None
    return found


def _levels(rows: list[dict], name: str, levels: Sequence[str]) -> np.ndarray:
    number = {level: float(k) for k, level in enumerate(levels)}
    found = np.array([number.get(row[name], np.nan) for row in rows])
    if not np.isfinite(found).any():
        raise InputError(f"column {name!r} has none of its levels {', '.join(levels)}; it has {rows[0][name]!r}")
    return found
