"""Folds of patients for survival, and what may be learned from a training fold only: bins of time, scales of columns.

Tissue from one hospital looks alike, so that a model can tell the hospital and with it the outcome: all patients of a
site stay in one fold (Howard et al., Nature Communications 12, 2021).
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mmkd_jax.errors import InputError
from mmkd_jax.evals.survival_curves import Outcomes


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """Row numbers, int64, of a nested split: `train` to fit, `val` to choose, `test` to report; `name` of the test."""

    name: str
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def site_folds(outcomes: Outcomes, sites, count: int = 5, seed: int = 0) -> np.ndarray:
    """Fold of each patient: whole sites, events and patients shared out evenly.

    Sites go one by one, those with most events first and equals in an order drawn by the seed, to the fold that has
    the fewest events, then the fewest patients.

    Args:
      outcomes: of n patients.
      sites: `[n]` labels.
      count: number of folds.
      seed: of the order.

    Returns:
      int64 `[n]`, 0 to `count` - 1.

    Raises:
      InputError: fewer sites than folds, or a fold gets no event.
    """
    names, site = np.unique(np.asarray(sites), return_inverse=True)
    if len(names) < count:
        raise InputError(f"{len(names)} sites cannot be shared out among {count} folds; use fewer folds")
    events, patients = np.bincount(site, outcomes.event), np.bincount(site)
    drawn = np.random.default_rng(seed).permutation(len(names))
    fold, load = np.empty(len(names), np.int64), np.zeros((count, 2))
    for one in drawn[np.lexsort((-patients[drawn], -events[drawn]))]:
        fold[one] = np.lexsort((load[:, 1], load[:, 0]))[0]
        load[fold[one]] += events[one], patients[one]
    if not load[:, 0].all():
        raise InputError(f"{int(events.sum())} events at {int((events > 0).sum())} sites leave a fold without events; "
                         f"use fewer than {count} folds")  # fmt: skip
    return fold[site]


def nested(fold, outcomes: Outcomes, patients) -> Iterator[Fold]:
    """A nested split for each fold: it is tested, the next one (in order, the first after the last) chooses.

    Args:
      fold: `[n]` labels; rows labelled "" (or negative) are left out.
      outcomes: of n rows.
      patients: `[n]` labels; the rows of one must not be divided.

    Raises:
      InputError: a patient in two folds, fewer than three folds, or a fold without events.
    """
    fold, patients = np.asarray(fold), np.asarray(patients)
    used = fold >= 0 if np.issubdtype(fold.dtype, np.number) else fold != ""
    names = np.unique(fold[used])
    if len(names) < 3:
        raise InputError(f"nested folds need three (to fit, to choose, to test), not {len(names)}")
    pairs = np.unique(np.stack([patients[used].astype(str), fold[used].astype(str)]), axis=1)
    twice = pairs[0, 1:][pairs[0, 1:] == pairs[0, :-1]]
    if len(twice):
        raise InputError(f"patient {str(twice[0])!r} is in two folds; all rows of a patient belong in one")
    for name in names:
        if not outcomes.event[used & (fold == name)].any():
            raise InputError(
                f"fold {name} has no event, so that nothing can be chosen or tested on it; divide otherwise"
            )
    for k, name in enumerate(names):
        following = names[(k + 1) % len(names)]
        train = used & (fold != name) & (fold != following)
        yield Fold(str(name), *(np.flatnonzero(part) for part in (train, used & (fold == following), fold == name)))


def bins(train: Outcomes, count: int = 4) -> np.ndarray:
    """Edges of bins of time that share out the training events: quantiles of their times, float64 `[count - 1]`.

    Raises:
      InputError: too few different event times for that many bins.
    """
    edges = np.quantile(train.time[train.event], np.arange(1, count) / count) if train.event.any() else np.zeros(0)
    if len(edges) != count - 1 or (np.diff(edges) <= 0).any():
        raise InputError(f"the training fold's {int(train.event.sum())} events do not fill {count} bins; use fewer")
    return edges


def bin_of(times, edges: np.ndarray) -> np.ndarray:
    """Bin of each time, int64 `[n]`: bins hold their left edge; the first and last have no outer one."""
    return np.searchsorted(edges, times, side="right")
