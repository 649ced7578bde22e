"""Reductions over all pairs of a global batch that is divided over a mesh, without a matrix of all pairs.

Three forms of the same numbers:

- `plain` is the formula itself; XLA gathers what it needs.
- `rows` gathers the columns on every device, which takes its own rows against all of them: memory `[local, global]`.
- `ring` never gathers: blocks of columns travel from device to device, with what was found about them so far, and meet
  each device's rows tile by tile: memory `[local, TILE]` beside the features. The way back does the same once more and
  computes every tile again.

`rows` and `ring` run under `shard_map` over the axes of the mesh that divide the batch, and have a gradient of their
own; without such a mesh (see `mmkd_jax.models.constraints`) they are the same on one device.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmkd_jax.errors import InputError
from mmkd_jax.losses.reductions import Reduction, Stats, Tile
from mmkd_jax.models.constraints import BATCH_AXES

FORMS = ("plain", "rows", "ring")
TILE = 512  # columns at a time


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def statistics(reduction: Reduction, form: str, live: Tile, fixed: Tile) -> tuple[Stats, Stats]:
    """Statistics of all rows and all columns of the global batch.

    Args:
      reduction: see `reductions`.
      form: `rows` or `ring`.
      live: rows and columns of the whole batch, `[n, ...]` each, and scalars.
      fixed: the same, not differentiated.

    Raises:
      InputError: the batch cannot be divided over the mesh.
    """
    forward = _ring_forward if form == "ring" else _rows_forward
    return _over_mesh(functools.partial(forward, reduction), (ROWS, ROWS), live, fixed)


def _statistics_fwd(reduction, form, live, fixed):
    stats = statistics(reduction, form, live, fixed)
    return stats, (live, fixed, stats)


def _statistics_bwd(reduction, form, kept, bars):
    live, fixed, stats = kept
    backward = _ring_backward if form == "ring" else _rows_backward
    found = _over_mesh(functools.partial(backward, reduction), Tile(ROWS, ROWS, WHOLE), live, fixed, stats, bars)
    return found, None


statistics.defvjp(_statistics_fwd, _statistics_bwd)

ROWS, WHOLE = "divided", "whole"


def _over_mesh(body, outputs, live: Tile, fixed: Tile, *stats):
    """`body(axes, live, fixed, *stats)` on each device's part; `axes` are those of the mesh that divide the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = math.prod(dict(mesh.shape).get(axis, 1) for axis in BATCH_AXES)
    if ways == 1:
        return body((), live, fixed, *stats)
    n = len(jax.tree.leaves(live.rows)[0])
    if n % ways:
        raise InputError(f"a global batch of {n} cannot be divided over {ways} devices; make it a multiple")
    specs = {ROWS: PartitionSpec(BATCH_AXES), WHOLE: PartitionSpec()}
    tile = Tile(specs[ROWS], specs[ROWS], specs[WHOLE])
    mapped = jax.shard_map(
        functools.partial(body, BATCH_AXES),
        mesh=mesh,
        in_specs=(tile, tile, *(specs[ROWS] for _ in stats)),
        out_specs=jax.tree.map(specs.get, outputs),
        check_vma=False,
    )
    return mapped(live, fixed, *stats)


# --- every device's rows against all columns at once ---------------------------------------------------------------


def _rows_forward(reduction, axes, live: Tile, fixed: Tile):
    columns, fixed_columns = _gather(axes, (live.columns, fixed.columns))
    rows, of_columns = reduction.partial(live._replace(columns=columns), fixed._replace(columns=fixed_columns))
    if not axes or of_columns is None:
        return rows, of_columns
    ways = jax.lax.axis_size(axes)
    parts = jax.tree.map(lambda x: x.reshape(ways, -1), of_columns)  # each device's columns, as my rows see them
    mine = jax.tree.map(lambda x: jax.lax.all_to_all(x, axes, 0, 0), parts)  # my columns, as all rows see them
    start = reduction.empty(jax.tree.leaves(mine)[0].shape[1])[1]
    return rows, jax.lax.scan(lambda a, b: (reduction.merge(a, b), None), start, mine)[0]


def _rows_backward(reduction, axes, live: Tile, fixed: Tile, stats, bars):
    columns, fixed_columns, of_columns, column_bars = _gather(axes, (live.columns, fixed.columns, stats[1], bars[1]))
    pull = functools.partial(
        reduction.pull,
        fixed=fixed._replace(columns=fixed_columns),
        stats=(stats[0], of_columns),
        bars=(bars[0], column_bars),
    )
    found = jax.grad(pull)(live._replace(columns=columns))
    scatter = lambda x: jax.lax.psum_scatter(x, axes, tiled=True) if axes else x  # noqa: E731
    return Tile(found.rows, jax.tree.map(scatter, found.columns), _sum(axes, found.shared))


# --- tiles that travel ---------------------------------------------------------------------------------------------


def _ring_forward(reduction, axes, live: Tile, fixed: Tile):
    n = len(jax.tree.leaves(live.rows)[0])

    def visit(_, carry):
        of_rows, block, of_columns = carry

        def meet(of_rows, tile):
            columns, fixed_columns = tile
            found = reduction.partial(live._replace(columns=columns), fixed._replace(columns=fixed_columns))
            return reduction.merge(of_rows, found[0]), found[1]

        of_rows, found = jax.lax.scan(meet, of_rows, _split(block, n))
        of_columns = reduction.merge(of_columns, _join(found))
        return of_rows, *_pass_on(axes, (block, of_columns))

    of_rows, of_columns = reduction.empty(n)
    start = (of_rows, (live.columns, fixed.columns), of_columns)
    of_rows, _, of_columns = jax.lax.fori_loop(0, _ways(axes), visit, start)
    return of_rows, of_columns


def _ring_backward(reduction, axes, live: Tile, fixed: Tile, stats, bars):
    n = len(jax.tree.leaves(live.rows)[0])

    def visit(_, carry):
        mine, block, theirs = carry

        def meet(mine, tile):
            columns, fixed_columns, of_columns, column_bars = tile
            pull = functools.partial(
                reduction.pull,
                fixed=fixed._replace(columns=fixed_columns),
                stats=(stats[0], of_columns),
                bars=(bars[0], column_bars),
            )
            found = jax.grad(pull)(live._replace(columns=columns))
            return _add(mine, (found.rows, found.shared)), found.columns

        mine, found = jax.lax.scan(meet, mine, _split(block, n))
        return mine, *_pass_on(axes, (block, _add(theirs, _join(found))))

    zeros = jax.tree.map(jnp.zeros_like, live)
    block = (live.columns, fixed.columns, stats[1], bars[1])
    start = ((zeros.rows, zeros.shared), block, zeros.columns)
    (rows, shared), _, columns = jax.lax.fori_loop(0, _ways(axes), visit, start)
    return Tile(rows, columns, _sum(axes, shared))


def _ways(axes) -> int:
    return jax.lax.axis_size(axes) if axes else 1


def _pass_on(axes, block: Any) -> Any:
    """To the next device of the ring; after as many times as there are devices everything is at home again."""
    if not axes:
        return block
    ways = _ways(axes)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, [(i, (i + 1) % ways) for i in range(ways)]), block)


def _split(block: Any, n: int) -> Any:
    """`[n, ...]` as `[n / c, c, ...]`, where c is the largest divisor of n up to `TILE`."""
    width = next(c for c in range(min(n, TILE), 0, -1) if n % c == 0)
    return jax.tree.map(lambda x: x.reshape(n // width, width, *x.shape[1:]), block)


def _join(tiles: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tiles)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _gather(axes, tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), tree) if axes else tree


def _sum(axes, tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), tree) if axes else tree
