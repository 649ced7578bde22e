"""From a config file with `sweep()` to commands: what is made once for several runs, and the runs.

A sweep's file is a config file (`get_config`) with more functions beside:

  sweep(config): yields overrides, one dict a run (see `grids`); `config` is the file's, with the command line's fields.
    Runs whose overrides have a field `label` go by it (and their seed) and not by all of their fields.
  shared(config): optional; `{field: words}`: the field of a run's config is the folder that `mmkd WORDS` makes. Runs
    whose words are the same share it. The folder itself (`--workdir` of train, `--out` of others) is not among them.
  evaluate(config): optional; the words of `mmkd eval` but for `--checkpoint` and `--out`: how each run is scored, none
    for not at all.
"""

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.train.folder import FREE

SCHEMA = 1
LONGEST = 100  # characters of a run's name


@dataclasses.dataclass(frozen=True)
class Task:
    """Commands that are run one after the other on one device group.

    Attributes:
      name: its folder below the sweep's.
      commands: words of `mmkd` each.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Run(Task):
    """A run of the sweep.

    Attributes:
      overrides: the fields that make it.
      scores: the folder of its results below the sweep's, named after how it is scored; "" for not at all.
    """

    overrides: Mapping[str, Any]
    scores: str = ""

    @property
    def setting(self) -> dict[str, Any]:
        """What it shares with the other seeds: its overrides but for the seed."""
        return {field: value for field, value in self.overrides.items() if field != "seed"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep.

    Attributes:
      workdir: its folder.
      config: the file's config as JSON values, before `sweep()`.
      shared: what comes first.
      runs: then these.
    """

    workdir: epath.Path
    config: dict[str, Any]
    shared: tuple[Task, ...]
    runs: tuple[Run, ...]


def load(address: str, overrides: Sequence[str], workdir: str | os.PathLike) -> Plan:
    """The plan of the sweep in the config file at `address`; writes nothing.

    Raises:
      InputError: the file has no `sweep()`, an override names an unknown field or has a wrong type, two runs are the
        same, or a command is none.
    """
    workdir, path = io.as_path(workdir), configs.split_address(address)[0]
    base, module = configs.load(address, overrides), configs.module(path)
    if not callable(getattr(module, "sweep", None)):
        raise InputError(f"config {path} has no function sweep(config); see configs/sweeps for some that have")
    swept = list(_call(path, module.sweep, base, Iterable))
    if not swept:
        raise InputError(f"config {path}: sweep() yields no run")
    if wrong := [one for one in swept if not isinstance(one, Mapping)]:
        raise InputError(f"config {path}: sweep() yields {wrong[0]!r}, not a dict of fields and their values")
    shared: dict[str, Task] = {}
    runs = []
    for name, one in zip(_names(swept), swept):
        words = [*overrides, *(f"--config.{field}={value}" for field, value in one.items()), f"--config.name={name}"]
        try:
            config = configs.load(address, words)
        except InputError as error:
            raise InputError(f"run {name} of the sweep: {error}") from error
        needed = _call(path, module.shared, config, Mapping) if hasattr(module, "shared") else {}
        for field, command in needed.items():
            task = _shared(field, command, workdir)
            shared[task.name] = task
            words.append(f"--config.{field}={os.fspath(workdir / task.name)}")
        configs.load(address, words)  # that the fields which shared() names are there
        folder = os.fspath(workdir / "runs" / name)
        commands = [("train", "--config", address, "--workdir", folder, *words)]
        scored = _call(path, module.evaluate, config, Sequence) if hasattr(module, "evaluate") else ()
        scores = f"runs/{name}/eval-{io.hash_of(list(map(str, scored)))[:8]}" if scored else ""
        if scored:
            out = os.fspath(workdir / scores)
            commands.append(("eval", "--checkpoint", f"student={folder}", "--out", out, *map(str, scored)))
        runs.append(Run(f"runs/{name}", tuple(commands), dict(one), scores))
    return Plan(workdir, configs.to_dict(base), tuple(shared.values()), tuple(runs))


def claim(plan: Plan) -> None:
    """Writes DIR/sweep.json, and refuses the folder of a sweep of another config; more or other runs are welcome.

    Raises:
      InputError: the folder holds another sweep, or cannot be written to.
    """
    io.make_workdir(plan.workdir)
    path, config = plan.workdir / "sweep.json", io.json_form(plan.config)
    if path.exists():
        before, after = _flat(io.read_json(path)["config"]), _flat(config)
        for field in sorted(before.keys() | after.keys()):
            if before.get(field) != after.get(field) and not re.search(FREE, f"config.{field}"):
                change = f"config.{field} ({before.get(field)!r}, now {after.get(field)!r})"
                raise InputError(f"{plan.workdir} holds a sweep with another {change}; use another --workdir")
    runs = {run.name: run.overrides for run in plan.runs}
    io.write_json(path, {"schema": SCHEMA, "config": config, "runs": runs})


def _call(path: str, function: Callable, config: ConfigDict, kind: type) -> Any:
    """`function(config)`, or `function()` where it takes nothing; what it gives must be a `kind`."""
    try:
        found = function(config) if inspect.signature(function).parameters else function()
        found = list(found) if kind is Iterable else found  # a generator fails only here
    except InputError as error:
        raise InputError(f"config {path}: {error}") from error
    except Exception as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"config {path}: {function.__name__}() fails: {message}") from error
    if not isinstance(found, kind) or isinstance(found, str):
        raise InputError(f"config {path}: {function.__name__}() gives {found!r}, not a {kind.__name__.lower()}")
    return found


def _shared(field: str, command: Sequence[str], workdir: epath.Path) -> Task:
    words = tuple(map(str, command))
    name = f"shared/{field}-{io.hash_of(words)[:8]}"
    if words[:2] == ("features", "route"):
        return Task(name, ((*words, "--out", os.fspath(workdir / name)),))
    if not words or words[0] not in ("train", "emit"):
        raise InputError(
            f"shared() makes {field!r} by `mmkd train ...`, `mmkd emit ...` or `mmkd features route ...`, "
            f"not {' '.join(words)!r}"
        )
    out = "--workdir" if words[0] == "train" else "--out"
    return Task(name, ((words[0], out, os.fspath(workdir / name), *words[1:]),))


def _names(swept: Sequence[Mapping[str, Any]]) -> list[str]:
    """A folder's name for each run, from what it overrides; fields go by their last part where that tells them apart.

    Raises:
      InputError: two runs are the same, or override the name.
    """
    fields = {field for one in swept for field in one}
    last = [field.rpartition(".")[2] for field in fields]
    if "name" in fields:
        raise InputError("a sweep gives its runs their names: sweep() cannot override 'name'")
    names = []
    for one in swept:
        parts = [str(one["label"])] if "label" in one else []
        for field, value in one.items():
            if "label" in one and field != "seed":
                continue
            short = field.rpartition(".")[2]
            text = "+".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            parts.append(f"{short if last.count(short) == 1 else field}_{text}")
        raw = ",".join(parts) or "base"
        clean = re.sub(r"[^A-Za-z0-9.,_+-]", "-", raw)
        if clean != raw or len(clean) > LONGEST:
            clean = f"{clean[: LONGEST - 9]}-{io.hash_of(one)[:8]}"
        if clean in names:
            raise InputError(f"two runs of the sweep are the same: {clean}")
        names.append(clean)
    return names


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The fields of nested dicts by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, child in value.items() for k, v in _flat(child, f"{name}.{key}" if name else key).items()}
