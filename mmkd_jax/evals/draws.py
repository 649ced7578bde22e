"""Multinomial counts of a bootstrap, drawn once for all tasks and models that are judged on the same cases.

Drawing costs more than all metrics of a classification together, and a set's seed is the same for every task and model
of a process: the counts of the sets used last are kept, a byte each as a rule.
"""

import collections

import numpy as np

MOST = 1 << 27  # bytes that are kept

_kept: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()


def counts(strata: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each unit is drawn from those of its stratum, unsigned `[resamples, units]`; not to be written to.

    Args:
      strata: int `[units]`, whole from 0.
      resamples: number of resamples.
      seed: equal arguments give equal counts.
    """
    key = (strata.tobytes(), resamples, seed)
    found = _kept.pop(key, None)
    if found is None:
        found = _drawn(strata, resamples, seed)
    if found.nbytes <= MOST:
        _kept[key] = found  # the last one used
        while sum(one.nbytes for one in _kept.values()) > MOST:
            _kept.popitem(last=False)
    return found


def _drawn(strata: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    rng, found = np.random.default_rng(seed), np.zeros((resamples, len(strata)), np.int32)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        found[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    found = found.astype(np.min_scalar_type(int(found.max())))
    found.flags.writeable = False
    return found
