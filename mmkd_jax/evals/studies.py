"""Evaluations that a config describes, since they need more than an encoder and a set of pairs."""

import os
from collections.abc import Iterable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mmkd_jax import io, registry
from mmkd_jax.errors import InputError

# A study is a module with `evaluate(config, out, encoders=, resamples=, seed=) -> record` and `page(record) -> str`.
STUDIES = {"survival": "mmkd_jax.evals.survival_study", "diagnosis": "mmkd_jax.evals.diagnosis_study"}


def run(
    config: ConfigDict, out: str | os.PathLike, encoders: Iterable[Any], *, resamples: int, seed: int
) -> epath.Path:
    """Evaluates the study that `config.task` names, and writes its page OUT/NAME.html; returns the page's path.

    Raises:
      InputError: the config names no study, or what it describes cannot be evaluated.
    """
    if not config.get("task"):
        raise InputError("the config says no task; use configs/survival.py or configs/diagnosis.py")
    study = registry.resolve(config.task, STUDIES, "study")
    with io.workdir(out) as folder:
        record = study.evaluate(config, folder, encoders=encoders, resamples=resamples, seed=seed)
        page = folder / f"{config.name}.html"
        io.write_text(page, study.page(record))
    return page
