"""Checkpoints: the one place where Orbax is called.

A checkpoint is `RUN/checkpoints/STEP` with two items: `state` (the train state) and `meta` (JSON: config, spec,
tokenizer files, data identity), so that it can be loaded, evaluated and exported with nothing else at hand.
"""

import base64
import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.specs import ModelSpec

SCHEMA = 1
FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run: asynchronous saves, the latest ones kept.

    Args:
      workdir: the run's folder.
      keep: how many of the latest to keep.
    """

    def __init__(self, workdir: epath.Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(io.as_path(workdir) / FOLDER, options=options)

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts to write `state` and `meta`; a save that failed earlier raises here or in `close`."""
        if step == self.latest():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=items)

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """State and meta of `step`; `like` gives shapes, dtypes and placements (they may differ from those saved)."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["meta"]

    def meta(self, step: int) -> dict[str, Any]:
        """The record of `step` without its arrays."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def close(self) -> None:
        """Waits for what is being written, and raises if it failed."""
        self._manager.wait_until_finished()
        self._manager.close()


def describe(
    spec: ModelSpec, tokenizer_files: dict[str, bytes], config: dict[str, Any], identity: dict[str, Any]
) -> dict[str, Any]:
    """The `meta` item: what it takes to use the parameters anywhere."""
    return {
        "schema": SCHEMA,
        "spec": spec.to_dict(),
        "tokenizer": {name: base64.b64encode(data).decode() for name, data in sorted(tokenizer_files.items())},
        "config": config,
        "data": identity,
    }


def tokenizer_files(meta: dict[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files as stored by `describe`."""
    return {name: base64.b64decode(text) for name, text in meta["tokenizer"].items()}


def find(path: str | os.PathLike) -> epath.Path:
    """The folder of one checkpoint, from a run's folder (its latest), a `checkpoints` folder, or the folder itself.

    Raises:
      InputError: there is no committed checkpoint there.
    """
    path = io.as_path(path)
    if (path / "state").exists() and (path / "meta").exists():
        return path
    for folder in (path / FOLDER, path):
        steps = [child for child in folder.iterdir() if child.name.isdigit()] if folder.is_dir() else []
        committed = [child for child in steps if (child / "state").exists() and (child / "meta").exists()]
        if committed:
            return max(committed, key=lambda child: int(child.name))
    raise InputError(f"{path} holds no checkpoint; give a run's folder, or a folder RUN/{FOLDER}/STEP")


def load_meta(path: str | os.PathLike) -> dict[str, Any]:
    """The `meta` item of the checkpoint at `path` (see `find`).

    Raises:
      InputError: there is none, it is damaged, or it is of another schema.
    """
    folder = find(path)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler("meta")) as checkpointer:
            meta = checkpointer.restore(folder, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"checkpoint {folder} is damaged ({error}); take an earlier one") from error
    if meta.get("schema") != SCHEMA:
        raise InputError(f"checkpoint {folder} has schema {meta.get('schema')}, this version reads {SCHEMA}")
    return meta


def load_params(path: str | os.PathLike, like: Any) -> Any:
    """Parameters of the checkpoint at `path`, those that `like` names; its leaves give shape, dtype and placement.

    Raises:
      InputError: a parameter is missing there or has another shape.
    """
    folder = find(path)
    tree = {"params": like}
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        stored = _shapes(checkpointer.metadata(folder / "state").item_metadata.tree["params"])
        wanted = _shapes(like)
        missing = sorted(set(wanted) - set(stored))
        if missing:
            raise InputError(f"checkpoint {folder} has no parameter {missing[0]} (and {len(missing) - 1} more)")
        for name, shape in wanted.items():
            if stored[name] != shape:
                raise InputError(f"parameter {name} is {stored[name]} in checkpoint {folder}, the model wants {shape}")
        args = ocp.args.PyTreeRestore(
            item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        )
        return checkpointer.restore(folder / "state", args=args)["params"]


def stored_names(path: str | os.PathLike) -> set[str]:
    """Top-level groups of parameters in the checkpoint at `path`: image, text, logit_scale, heads ..."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return set(checkpointer.metadata(find(path) / "state").item_metadata.tree["params"])


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    from mmkd_jax.train.optim import path_of

    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_of(path): tuple(leaf.shape) for path, leaf in flat}
