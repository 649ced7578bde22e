"""Where arrays live: a mesh from the config, and rules from parameter names to placements."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmkd_jax.errors import InputError, near
from mmkd_jax.models.constraints import AXES, BATCH_AXES, under
from mmkd_jax.train.optim import path_of


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `tensor`; a size of -1 takes what the others leave.

    `sizes["slices"]` (1 unless given) is the number of slices that are joined by a slower network; `data` runs across
    them, `fsdp` and `tensor` stay within one.

    Raises:
      InputError: the sizes do not use every device exactly once, or do not fit the slices.
    """
    devices = list(devices if devices is not None else jax.devices())
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    fixed = math.prod(size for size in shape if size != -1)
    wrong = any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1
    if wrong or len(devices) % fixed or (shape.count(-1) == 0 and fixed != len(devices)):
        raise InputError(f"mesh {dict(zip(AXES, shape))} does not fit {len(devices)} devices; give one axis -1")
    shape = [len(devices) // fixed if size == -1 else size for size in shape]
    # Mesh and not jax.make_mesh: the latter makes explicit axes, which ask every gather for its output sharding.
    return Mesh(device_order(shape, int(sizes.get("slices", 1)), devices), AXES)


def device_order(shape: Sequence[int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """`devices` as an array of `shape`, neighbours on the fast network close together, slice after slice along `data`.

    Raises:
      InputError: the devices form another number of slices, of other sizes, or the torus cannot be cut like that.
    """
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if slices != found and (slices != 1 or devices[0].platform == "tpu"):
        raise InputError(f"mesh.slices is {slices}, the devices form {found}; use --config.mesh.slices={found}")
    if shape[0] % slices:
        raise InputError(f"the data axis of {shape[0]} cannot be divided over {slices} slices; make it a multiple")
    inner, outer = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"no mesh of {tuple(shape)} in {slices} slices of these devices: {reason}") from error


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples over `data` and `fsdp`; every other dimension whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shardings(tree: Any, rules: Sequence[tuple[str, Sequence[str | None]]], mesh: Mesh, unsharded: float = 1.0) -> Any:
    """A `NamedSharding` for each leaf of `tree` (arrays or shapes): the first rule whose pattern is found wins.

    A rule is (regex, placement); the placement names a mesh axis or None for each leading dimension. Optimiser state
    follows the rule of its parameter, since its path ends in the parameter's. `unsharded` is the share of all numbers
    that may stay whole on a mesh with `fsdp`.

    Raises:
      InputError: a parameter matches no rule, a rule is malformed, a dimension cannot be divided, or more than
        `unsharded` stays whole.
    """

    def place(path, leaf):
        name = path_of(path)
        if leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        for pattern, placement in rules:
            if re.search(pattern, name):
                _check_placement(name, leaf.shape, placement, mesh)
                return NamedSharding(mesh, PartitionSpec(*placement))
        raise InputError(f"no sharding rule matches parameter {name}; add a rule, for example ('.*', ())")

    placement = jax.tree_util.tree_map_with_path(place, tree)
    _check_share(tree, placement, mesh, unsharded)
    return placement


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """The global batch as sharded arrays, from this process's slice of it (NumPy, first dimension = samples)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def check_divides(batch: int, mesh: Mesh) -> int:
    """The number of parts that `mesh` cuts a global batch into; refuses one that it cannot cut evenly."""
    ways = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if batch % ways:
        raise InputError(f"batch {batch} is not a multiple of the {ways} data-parallel devices of the mesh")
    return ways


def check_batch(batch: int, mesh: Mesh) -> None:
    """Refuses a global batch that the mesh cannot split evenly, and a mesh that gives processes common samples."""
    ways = check_divides(batch, mesh)
    mine = {str(index) for index in batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()}
    if len(mine) * jax.process_count() != ways:
        raise InputError(
            f"the tensor axis of {mesh.shape['tensor']} devices crosses processes, which read different samples; "
            "make it a divisor of the devices of one process"
        )


def program(step: Callable, mesh: Mesh, placement: Any) -> Callable:
    """A step compiled for `mesh`; it takes over the memory of its state, whose placement is `placement`."""
    return jax.jit(under(mesh, step), donate_argnums=0, out_shardings=(placement, None))


def _check_placement(name: str, shape: tuple[int, ...], placement: Sequence[str | None], mesh: Mesh) -> None:
    axes = [axis for axis in placement if axis is not None]
    for axis in axes:
        if axis not in mesh.shape:
            raise InputError(f"the sharding rule of {name} names the mesh axis {axis!r}; {near(axis, mesh.shape)}")
    if len(set(axes)) < len(axes):
        raise InputError(f"the sharding rule of {name} gives one mesh axis to two dimensions: {tuple(placement)}")
    if len(placement) > len(shape):
        raise InputError(f"the sharding rule of {name} places {len(placement)} dimensions, it has {len(shape)}")
    for size, axis in zip(shape, placement):
        if axis is not None and size % mesh.shape[axis]:
            raise InputError(f"{name} of shape {shape} cannot be divided over {axis} of {mesh.shape[axis]} devices")


def _check_share(tree: Any, placement: Any, mesh: Mesh, unsharded: float) -> None:
    if mesh.shape["fsdp"] == 1:
        return
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    whole = [
        (math.prod(leaf.shape), path_of(path))
        for (path, leaf), place in zip(leaves, jax.tree.leaves(placement), strict=True)
        if "fsdp" not in place.spec
    ]
    share = sum(size for size, _ in whole) / max(1, sum(math.prod(leaf.shape) for _, leaf in leaves))
    if share > unsharded:
        raise InputError(
            f"the sharding rules leave {share:.1%} whole on an fsdp mesh, {max(whole)[1]} most of all; "
            f"add a rule for it, or allow it with --config.unsharded={math.ceil(share * 1000) / 1000}"
        )
