"""What went where: the table of parameters and their placements that a run prints and keeps."""

import math
import sys
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding

from mmkd_jax import io
from mmkd_jax.train.optim import path_of


def describe(params: Any, placement: Any, mesh: Mesh) -> str:
    """A line for each parameter: name, shape, the mesh axes that divide its dimensions, its shape on one device.

    Args:
      params: arrays or shapes.
      placement: a `NamedSharding` for each.
      mesh: theirs.

    Returns:
      Text that depends on nothing but names, shapes, rules and the mesh's shape; axes of size 1 divide nothing and are
      left out.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    rows, total, local = [("parameter", "shape", "divided over", "on one device")], 0, 0
    for (path, leaf), place in zip(leaves, jax.tree.leaves(placement), strict=True):
        part = place.shard_shape(leaf.shape)
        rows.append((path_of(path), _shape(leaf.shape), _axes(place, len(leaf.shape)), _shape(part)))
        total, local = total + math.prod(leaf.shape), local + math.prod(part)
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return "\n".join([f"mesh: {axes}", *lines, f"{total} numbers, {local} on one device ({local / total:.2%})"]) + "\n"


def report(params: Any, mesh: Mesh, workdir: epath.Path) -> None:
    """Saves the table of `params` (placed arrays) as `sharding.txt`; prints it where weights are divided at all."""
    if jax.process_index() != 0:
        return
    table = describe(params, jax.tree.map(lambda x: x.sharding, params), mesh)
    io.write_text(workdir / "sharding.txt", table)
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        print(table, end="", file=sys.stderr, flush=True)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _axes(place: NamedSharding, dimensions: int) -> str:
    spec = (*place.spec, *(None,) * (dimensions - len(place.spec)))
    names = [axis if axis is not None and place.mesh.shape[axis] > 1 else "-" for axis in spec]
    return " ".join(names) if set(names) - {"-"} else "whole"
