"""Evaluations that a config describes, since they need more than an encoder and a set of pairs."""

import os
from collections.abc import Iterable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mmkd_jax import io, registry
from mmkd_jax.errors import InputError
from mmkd_jax.evals import results

# A study is a module with `evaluate(config, out, encoders=, resamples=, seed=) -> record` and `page(record) -> str`.
FOLDER = "studies"  # of the records that pages are made of, below a folder of results
STUDIES = {"survival": "mmkd_jax.evals.survival_study", "diagnosis": "mmkd_jax.evals.diagnosis_study"}


def run(
    config: ConfigDict, out: str | os.PathLike, encoders: Iterable[Any], *, resamples: int, seed: int
) -> epath.Path:
    """Evaluates the study that `config.task` names, and writes its page OUT/NAME.html; returns the page's path.

    What the page shows is kept in OUT/studies/NAME.json.

    Raises:
      InputError: the config names no study, or what it describes cannot be evaluated.
    """
    if not config.get("task"):
        raise InputError("the config says no task; use configs/survival.py or configs/diagnosis.py")
    study = registry.resolve(config.task, STUDIES, "study")
    with io.workdir(out) as folder:
        record = study.evaluate(config, folder, encoders=encoders, resamples=resamples, seed=seed)
        record = {**record, "task": config.task, "name": config.name}
        io.write_json(folder / FOLDER / f"{results.file_name(config.name)}.json", record)
        return _write(study, record, folder)


def rebuild(out: str | os.PathLike) -> list[epath.Path]:
    """Writes the page of every study in a folder of results again, from OUT/studies; returns their paths.

    Raises:
      InputError: what lies there is no study's record.
    """
    folder, pages = io.as_path(out), []
    kept = folder / FOLDER
    for path in sorted(path for path in kept.iterdir() if path.suffix == ".json") if kept.is_dir() else ():
        record = io.read_json(path)
        if not isinstance(record, dict) or not {"task", "name"} <= set(record):
            raise InputError(f"{path} is no record of a study; evaluate it again")
        study = registry.resolve(record["task"], STUDIES, "study")
        try:
            pages.append(_write(study, record, folder))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} lacks what its page shows ({error!r}); evaluate the study again") from error
    return pages


def _write(study: Any, record: dict[str, Any], folder: epath.Path) -> epath.Path:
    page = folder / f"{record['name']}.html"
    io.write_text(page, study.page(record))
    return page
