"""Survival from bags of features: gated attention with discrete-time hazards, trained by the project's loop.

Bins of time come from the training fold's events; of the checkpoints of a run the one with the highest C-index on the
fold that chooses is taken.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from etils import epath

from mmkd_jax.data.bags import Bags
from mmkd_jax.evals import survival_folds, survival_hazards, survival_metrics
from mmkd_jax.evals.survival import Prediction
from mmkd_jax.evals.survival_curves import Outcomes
from mmkd_jax.evals.survival_folds import Fold
from mmkd_jax.tasks import mil
from mmkd_jax.train import heads


@dataclasses.dataclass(frozen=True)
class Settings:
    """How heads are trained: `bins` of time, `steps` in batches of `batch` at rate `lr`, `checkpoints` to choose from.

    `hidden`, `attention`, `dropout` as in `tasks.mil.MilSpec`; `decay` of the weights; `alpha` of the likelihood.
    """

    bins: int = 4
    steps: int = 200
    batch: int = 16
    lr: float = 1e-3
    checkpoints: int = 4
    hidden: int = 64
    attention: int = 32
    dropout: float = 0.25
    decay: float = 1e-2
    alpha: float = 0.0


def predictor(
    bags: Bags, outcomes: Outcomes, settings: Settings, workdir: epath.Path, seed: int = 0
) -> Callable[[Fold], Prediction]:
    """What `survival.scored` asks of a model.

    Args:
      bags: a patient each.
      outcomes: of the patients.
      settings: of training.
      workdir: runs lie below, a folder a fold; what is done there is not done again.
      seed: of training.
    """

    def predict(fold: Fold) -> Prediction:
        edges = survival_folds.bins(outcomes[fold.train], settings.bins)
        targets = {"bin": survival_folds.bin_of(outcomes.time, edges).astype(np.int32), "event": outcomes.event}
        spec = mil.MilSpec("hazards", bags.width, settings.bins, settings.hidden, settings.attention,
                           settings.dropout, settings.alpha)  # fmt: skip
        every = -(-settings.steps // settings.checkpoints)
        config = heads.config(
            f"fold {fold.name}", batch=settings.batch, steps=settings.steps, lr=settings.lr, seed=seed,
            decay=settings.decay, save_every=every, keep=settings.checkpoints + 1,
        )  # fmt: skip
        params, step = None, 0
        best = -1.0
        trained = mil.train(bags, fold.train, targets, spec, config, workdir / fold.name)
        for number, one in enumerate(trained):
            risk = survival_hazards.risk(mil.predict(one, bags, fold.val)[0])
            score = survival_metrics.concordance(outcomes[fold.val], np.asarray(risk, np.float64))
            if score > best:
                best, params, step = score, one, min((number + 1) * every, settings.steps)
        seen = np.concatenate([fold.train, fold.val])
        logits = mil.predict(params, bags, fold.test)[0]
        middle = np.median(np.asarray(survival_hazards.risk(mil.predict(params, bags, seen)[0])))
        risk = np.asarray(survival_hazards.risk(logits), np.float64)
        ends = np.concatenate([[0.0], edges, [outcomes.time[seen].max()]])
        return Prediction(risk, float(middle), lambda times: curve(logits, ends, times), step)

    return predict


def curve(logits: np.ndarray, ends: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Probability of no event by each of `times` `[k]`, straight between the ends of bins: float64 `[n, k]`.

    Args:
      logits: `[n, bins]`.
      ends: of the bins, and before them 0: float64 `[bins + 1]`.
      times: up to the last end, or as at it.
    """
    past = np.asarray(survival_hazards.survival(logits), np.float64)
    past = np.concatenate([np.ones((len(past), 1)), past], axis=1)
    return np.stack([np.interp(times, ends, row) for row in past])
