"""A run's folder: what it says that it is, and which runs may go on in it."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.train import checkpoint
from mmkd_jax.train.provenance import provenance
from mmkd_jax.train.setup import Job

CONFIG, PROVENANCE = "config.json", "provenance.json"
BEGAN = "began"
# What may differ whenever a run goes on: it changes no result but by rounding, or is a place whose content is hashed in
# the record. (How far a roll-back goes depends on `save_every`; `ema` changes no update, only what is evaluated.)
FREE = (
    r"^config\.((name|ema|watchdog|wandb|log_every|save_every|save_minutes|keep|best|unsharded|remat|accumulate|loss\.form"
    r"|data\.(pairs|threads)|features|routing|selection|maps|tokenizer|init)$|(mesh|sharding|evaluation)(\.|$))"
)
# What may differ where `config.data.other_set` says that a run goes on with other data.
DATA_FIELDS = r"^(data|config\.(data|features|teachers|routing))(\.|$)"


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[epath.Path]:
    """The folder at `path`, made if need be; what is refused before it became a run's leaves nothing behind.

    Raises:
      InputError: it cannot be written to.
    """
    with io.workdir(path) as workdir:
        try:
            yield workdir
        finally:
            if not (workdir / CONFIG).exists():
                io.remove_if_empty(workdir / "checkpoints")


def record(config: ConfigDict, job: Job) -> dict[str, Any]:
    """What a run is: its config, its data, and a hash of the parameters it began with (None where they are gone)."""
    return {"config": configs.to_dict(config), "data": job.identity, BEGAN: _parameters(config.init)}


def _parameters(path: str) -> str | None:
    """Hash of the parameters of the checkpoint at `path`; empty without one."""
    try:
        sums = checkpoint.sums(checkpoint.load_meta(path)) if path else {}
    except InputError:
        return None  # a run that goes on does not need them; one that begins is told why
    return io.hash_of(sums) if path else ""


def refuse_another(workdir: epath.Path, now: dict[str, Any]) -> None:
    """Refuses the folder of a run that was another; `now` is this one's `record`."""
    if not (workdir / CONFIG).exists():
        return
    told = now["config"]["data"]["other_set"]
    for name, before, after in differences(io.read_json(workdir / CONFIG), io.json_form(now)):
        if re.search(FREE, name) or (told and re.search(DATA_FIELDS, name)):
            continue
        if name == BEGAN and None in (before, after):
            continue
        advice = "use another --workdir, or that config"
        if re.search(DATA_FIELDS, name):
            advice += "; --config.data.other_set goes on here with other data"
        raise InputError(f"{workdir} holds a run with another {name} ({before!r}, now {after!r}); {advice}")


def claim(workdir: epath.Path, now: dict[str, Any]) -> None:
    """Writes config and provenance, once all that can be wrong with a run's input has been seen."""
    path = workdir / CONFIG
    before = io.read_json(path) if path.exists() else None
    if before is not None and now[BEGAN] is None:
        now = {**now, BEGAN: before.get(BEGAN)}
    if jax.process_index() != 0 or before == io.json_form(now):
        return
    made = {**provenance(now["data"]), "started": time.time()}
    if before is not None:  # it goes on with other data, or otherwise
        made["before"] = io.read_json(workdir / PROVENANCE)
    io.write_json(workdir / PROVENANCE, made)
    io.write_json(path, now)


def differences(before: Any, after: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two JSON records differ: dotted name and both values (None where one lacks it)."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(set(before) | set(after)):
            yield from differences(before.get(key), after.get(key), f"{where}.{key}" if where else key)
    elif before != after:
        yield where, before, after
