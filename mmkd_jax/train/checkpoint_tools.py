"""What can be done with checkpoints outside a run: list, describe, compare, average. No mesh and no data are needed."""

import datetime
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from mmkd_jax import io, licences
from mmkd_jax.errors import InputError
from mmkd_jax.train import checkpoint
from mmkd_jax.train.commits import COMMIT, FOLDER
from mmkd_jax.train.folder import differences
from mmkd_jax.train.retention import Retention


def listed(run: str | os.PathLike) -> list[dict[str, Any]]:
    """One record a checkpoint in a run's folder, in order of steps.

    Fields: `step`, `bytes`, `saved` (UTC, ISO 8601), `scalars` of its step, and `notes`: `latest`, `best`, `temporary`
    (goes when there is a newer one), or `not whole` alone (a save that was interrupted, or is under way).

    Raises:
      InputError: there is no checkpoint, or the newest is damaged.
    """
    newest = checkpoint.find(run)
    folder, config = newest.parent, checkpoint.load_meta(newest)["config"]
    retention = Retention(config.get("save_every", 1), config.get("keep", 1), config.get("best", ""))
    steps = sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit())
    scalars = {step: _scalars(folder / str(step)) for step in steps if (folder / str(step) / COMMIT).exists()}
    best = retention.best_of(scalars)
    records = []
    for step in steps:
        notes = ["latest"] if step == max(scalars) else []
        notes += ["best"] if step == best else []
        notes += ["temporary"] if step % retention.every else []
        whole = step in scalars
        records.append(
            {
                "step": step,
                "bytes": sum(file.stat().length for file in _files(folder / str(step))),
                "saved": _time(folder / str(step)) if whole else "",
                "scalars": scalars.get(step, {}),
                "notes": notes if whole else ["not whole"],
            }
        )
    return records


def described(path: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint says of itself, and its parameters by name with shape and dtype.

    Raises:
      InputError: there is none, or it is damaged.
    """
    folder, meta = checkpoint.find(path), checkpoint.load_meta(path)
    parameters = checkpoint.stored(folder)
    groups: dict[str, int] = {}
    for name, (shape, _) in parameters.items():
        groups[name.split("/")[0]] = groups.get(name.split("/")[0], 0) + math.prod(shape)
    return {
        "checkpoint": os.fspath(folder),
        "scalars": _scalars(folder),
        **{name: value for name, value in meta.items() if name not in ("tokenizer", "checksums")},
        "tokenizer": {name: io.sha256(data) for name, data in checkpoint.tokenizer_files(meta).items()},
        "count": {**groups, "all": sum(groups.values())},
        "parameters": {name: f"{dtype} {list(shape)}" for name, (shape, dtype) in sorted(parameters.items())},
    }


def compared(first: str | os.PathLike, second: str | os.PathLike) -> Iterator[str]:
    """Lines that say how two checkpoints differ: records, names, shapes, and each parameter's relative change; or none.

    The relative change of a parameter is |second - first| / |first| (Frobenius), computed in float64.

    Raises:
      InputError: one is missing or damaged.
    """
    before, after = checkpoint.load_meta(first), checkpoint.load_meta(second)
    for part in ("spec", "config", "data", "tokenizer"):
        for name, old, new in differences(before[part], after[part], part):
            yield f"{name}: differs" if part == "tokenizer" else f"{name}: {old!r}, then {new!r}"
    mine, theirs = parameters(first), parameters(second)
    for name in sorted(set(mine) ^ set(theirs)):
        yield f"{name}: only in the {'first' if name in mine else 'second'}"
    for name in sorted(set(mine) & set(theirs)):
        a, b = np.asarray(mine[name], np.float64), np.asarray(theirs[name], np.float64)
        if a.shape != b.shape:
            yield f"{name}: {a.shape}, then {b.shape}"
        elif not np.array_equal(a, b):
            change, size = np.linalg.norm(b - a), np.linalg.norm(a)
            relative = f"{change / size:.3g}" if size else "inf"
            yield f"{name}: relative change {relative}, largest {np.max(np.abs(b - a)):.3g}"


def averaged(paths: Sequence[str | os.PathLike], out: str | os.PathLike) -> epath.Path:
    """Writes a checkpoint whose parameters are the mean over those at `paths`, summed in float64; returns its folder.

    It is loaded, evaluated, exported and started from (`config.init`) as any other; it holds no optimiser state.

    Raises:
      InputError: fewer than two are given, they are not of one model, or `out` is taken.
    """
    folders = [checkpoint.find(path) for path in paths]
    out = io.as_path(out)
    if len(folders) < 2:
        raise InputError("an average takes two checkpoints or more")
    if len(set(folders)) < len(folders):
        raise InputError("a checkpoint is given twice; each may count once")
    if (out / FOLDER).exists():
        raise InputError(f"{out} holds checkpoints; choose another --out")
    metas = [checkpoint.load_meta(folder) for folder in folders]
    total = {name: np.zeros(shape, np.float64) for name, (shape, _) in checkpoint.stored(folders[0]).items()}
    for folder, meta in zip(folders, metas, strict=True):
        _same_model(folders[0], metas[0], folder, meta)
        for name, value in parameters(folder).items():
            total[name] += value
    mean = {name: jax.numpy.asarray(value / len(folders), np.float32) for name, value in total.items()}
    steps = [int(folder.name) for folder in folders if folder.name.isdigit()]
    step = max(steps, default=0)
    inherited = {what: licence for meta in metas for what, licence in licences.of_checkpoint(meta).items()}
    about = {"average": [os.fspath(folder) for folder in folders], "inherited": inherited}
    saver = checkpoint.Checkpoints(out)
    saver.save(step, {"params": unflatten_dict(mean, sep="/")}, {**metas[-1], **about})
    saver.close()
    return out / FOLDER / str(step)


def parameters(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All parameters of the checkpoint at `path` by name, on the host."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
        for name, (shape, dtype) in checkpoint.stored(path).items()
    }
    flat = jax.tree_util.tree_flatten_with_path(checkpoint.load_params(path, unflatten_dict(like, sep="/")))[0]
    return {checkpoint.path_of(place): np.asarray(leaf) for place, leaf in flat}


def _same_model(first: epath.Path, one: dict[str, Any], second: epath.Path, other: dict[str, Any]) -> None:
    for part in ("spec", "tokenizer"):
        for name, _, _ in differences(one[part], other[part], part):
            raise InputError(f"{first} and {second} are not of one model: they differ in {name}")
    mine, theirs = checkpoint.stored(first), checkpoint.stored(second)
    for name in sorted(set(mine) | set(theirs)):
        if mine.get(name) != theirs.get(name):
            raise InputError(f"{first} and {second} are not of one model: they differ in parameter {name}")


def _scalars(folder: epath.Path) -> dict[str, float]:
    file = folder / "metrics" / "metrics"
    return io.read_json(file) if file.exists() else {}


def _time(folder: epath.Path) -> str:
    made = io.read_json(folder / "_CHECKPOINT_METADATA").get("commit_timestamp_nsecs") or 0
    return datetime.datetime.fromtimestamp(made / 1e9, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for child in folder.iterdir():
        yield from _files(child) if child.is_dir() else (child,)
