"""Which mesh axis divides which dimension of an array inside a step.

Placements of parameters alone do not settle what the compiler does: left to itself it may divide activations by the
columns of divided weights and repeat the whole batch on every device. So towers say it: samples over `data` and `fsdp`,
heads and hidden units over `tensor`, and a layer's weights gathered over `fsdp` just before they are used.

Towers do not know a mesh. `under` names one while a function is traced; without it `divide` is the identity.
"""

import math
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def under(mesh: Mesh, function: Callable) -> Callable:
    """`function` with `divide` in force for `mesh` wherever it is traced."""

    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def platform() -> str:
    """What the function that is traced will run on: `cpu`, `gpu` or `tpu`, which need not be there to compile for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def divide(x: jax.Array, axes: Mapping[int, str | tuple[str, ...]]) -> jax.Array:
    """`x` with the dimensions in `axes` divided over those mesh axes, and whole in every other dimension.

    A dimension that its axes do not divide evenly stays whole. Values never change.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    entries: list[str | tuple[str, ...] | None] = [None] * x.ndim
    for dimension, names in axes.items():
        names = (names,) if isinstance(names, str) else names
        if x.shape[dimension] % math.prod(mesh.shape[name] for name in names) == 0:
            entries[dimension] = names
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def samples(x: jax.Array, tensor: int | None = None) -> jax.Array:
    """Activations: the first dimension over the batch axes, dimension `tensor`, if any, over `tensor`."""
    return divide(x, {0: BATCH_AXES} | ({} if tensor is None else {tensor: "tensor"}))


def rows(x: jax.Array) -> jax.Array:
    """Numbers that become weights: the first dimension over `fsdp`, or over `tensor` on a mesh without `fsdp`."""
    return divide(x, {0: "fsdp" if dict(jax.sharding.get_abstract_mesh().shape).get("fsdp", 1) > 1 else "tensor"})


def columns(x: jax.Array) -> jax.Array:
    """Rows of a table that is divided by columns: samples over `data`, the last dimension over `fsdp`."""
    return divide(x, {0: "data", x.ndim - 1: "fsdp"})


def weights(x: jax.Array, tensor: int | None = None) -> jax.Array:
    """A layer's weights as they are used: gathered over `fsdp`, dimension `tensor`, if any, over `tensor`."""
    return divide(x, {} if tensor is None else {tensor: "tensor"})
