"""What a checkpoint says of itself, and its parameters: loaded, evaluated, exported, started from.

Where the state has a running mean of the parameters (`ema`), that is what they are; only the run itself goes on with
the parameters.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from mmkd_jax.errors import InputError
from mmkd_jax.train.checksums import differing, path_of
from mmkd_jax.train.commits import find, reading

SCHEMA = 2
MEAN = "ema"  # field of a state


def load_meta(path: str | os.PathLike) -> dict[str, Any]:
    """The `meta` item of the checkpoint at `path` (see `find`).

    Raises:
      InputError: there is none, it is damaged, or it is of another schema.
    """
    folder = find(path)
    with reading(folder), ocp.Checkpointer(ocp.CompositeCheckpointHandler("meta")) as checkpointer:
        meta = checkpointer.restore(folder, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if meta.get("schema") != SCHEMA:
        raise InputError(f"checkpoint {folder} has schema {meta.get('schema')}, this version reads {SCHEMA}")
    return meta


def stored(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each parameter in the checkpoint at `path`, by name; nothing is read but their record."""
    tree = _saved(path)
    leaves = jax.tree_util.tree_flatten_with_path(tree[MEAN if MEAN in tree else "params"])[0]
    return {path_of(path): (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in leaves}


def averaged(path: str | os.PathLike) -> bool:
    """Whether the checkpoint at `path` has a running mean of the parameters, which counts in their place."""
    return MEAN in _saved(path)


def sums(meta: Mapping[str, Any]) -> dict[str, int]:
    """The checksums, in a checkpoint's `meta`, of the parameters that are loaded from it."""
    found = meta.get("checksums", {})
    root = MEAN if any(name.startswith(f"{MEAN}/") for name in found) else "params"
    return {name: value for name, value in found.items() if name.startswith(f"{root}/")}


def load_params(path: str | os.PathLike, like: Any, *, fresh: Sequence[str] = ()) -> Any:
    """Parameters of the checkpoint at `path`, those that `like` names; its leaves give shape, dtype and placement.

    Args:
      path: see `find`.
      like: nested dict of `jax.ShapeDtypeStruct`; the mesh may be any, whatever the checkpoint was saved from.
      fresh: patterns; a parameter that is missing there is left out of the result where one is found in its name.

    Raises:
      InputError: another parameter is missing there, one has another shape, or the checkpoint is damaged.
    """
    folder = find(path)
    there = stored(folder)
    wanted = {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]}
    missing = sorted(name for name in set(wanted) - set(there) if not any(re.search(rule, name) for rule in fresh))
    if missing:
        raise InputError(f"checkpoint {folder} has no parameter {missing[0]} (and {len(missing) - 1} more)")
    for name in sorted(set(wanted) & set(there)):
        shape = there[name][0]
        if shape != wanted[name].shape:
            raise InputError(
                f"parameter {name} is {shape} in checkpoint {folder}, the model wants {wanted[name].shape}"
            )
    root = MEAN if averaged(folder) else "params"
    tree = {root: unflatten_dict({name: leaf for name, leaf in wanted.items() if name in there}, sep="/")}
    args = ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
    )
    meta = load_meta(folder)
    with reading(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(folder / "state", args=args)
        verify(restored, meta)
    return restored[root]


def verify(restored: Any, meta: Mapping[str, Any]) -> None:
    """Refuses arrays that are not those that were saved.

    Raises:
      ValueError: a checksum differs.
    """
    if wrong := differing(restored, meta["checksums"]):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more} came back with other bits than were saved")


def _saved(path: str | os.PathLike) -> dict[str, Any]:
    """What the state of the checkpoint at `path` holds, as records of arrays in nested dicts."""
    folder = find(path)
    with reading(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.metadata(folder / "state").item_metadata.tree
