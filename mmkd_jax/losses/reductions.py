"""What a contrastive loss needs to know of a matrix of logits: numbers a row and a column that tiles add up to.

A reduction looks at one tile of the matrix at a time. `partial` gives the statistics of the tile's rows and columns,
`merge` joins the statistics of two tiles beside (or above) each other, `empty` is the start. `pull` goes back: given
the statistics of the whole matrix and the cotangents of them, it is a scalar whose gradient by the tile's own inputs is
the tile's share of the gradient. So neither way is a matrix larger than a tile alive.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mmkd_jax.losses.base import masked, similarity

Stats = Any  # float32 [n] in a NamedTuple, or None where a side needs none
NOTHING = -1e30  # log of a sum of no terms; finite, so that no difference of two is NaN


class Tile(NamedTuple):
    """Inputs of a tile of n rows and m columns; `fixed` ones are not differentiated.

    Attributes:
      rows: embeddings float32 `[n, d]`.
      columns: embeddings `[m, d]`.
      shared: scalars.
    """

    rows: Any
    columns: Any
    shared: Any


NOTHING_FIXED = Tile((), (), ())


class Reduction(Protocol):
    """See the module."""

    def empty(self, n: int) -> tuple[Stats, Stats]:
        """Statistics of `n` rows and of `n` columns of no tile."""

    def partial(self, live: Tile, fixed: Tile) -> tuple[Stats, Stats]:
        """Statistics of a tile: of its rows, and of its columns."""

    def merge(self, a: Stats, b: Stats) -> Stats:
        """Statistics of both parts."""

    def pull(self, live: Tile, fixed: Tile, stats: tuple[Stats, Stats], bars: tuple[Stats, Stats]) -> jax.Array:
        """A scalar to differentiate by `live`: see the module. `bars` are the cotangents of `stats`."""


class Logs(NamedTuple):
    """Log-sum-exp of each row or column, float32 `[n]`."""

    total: jax.Array


@dataclasses.dataclass(frozen=True)
class LogSumExp(Reduction):
    """`log sum_j exp(scale a_i . b_j)` of rows, and of columns if `columns`.

    Live: a, b and `scale`; where `fixed_columns`, b is not differentiated. Fixed: `keep`, bool of each column (None:
    all), with b before it where that is fixed.
    """

    columns: bool = True
    fixed_columns: bool = False

    def empty(self, n):
        nothing = Logs(jnp.full(n, NOTHING, jnp.float32))
        return nothing, nothing if self.columns else None

    def partial(self, live, fixed):
        logits, keep = self._logits(live, fixed)
        of_columns = Logs(jax.nn.logsumexp(logits, axis=0)) if self.columns else None
        return Logs(jax.nn.logsumexp(masked(logits, keep), axis=1)), of_columns

    def merge(self, a, b):
        return a and Logs(jnp.logaddexp(a.total, b.total))

    def pull(self, live, fixed, stats, bars):
        logits, keep = self._logits(live, fixed)
        value = jnp.sum(bars[0].total[:, None] * jnp.exp(masked(logits, keep) - stats[0].total[:, None]))
        if self.columns:
            value += jnp.sum(bars[1].total * jnp.exp(logits - stats[1].total))
        return value

    def _logits(self, live, fixed):
        columns, keep = fixed.columns if self.fixed_columns else (live.columns, None)
        return live.shared * similarity(live.rows, columns), keep


class Sums(NamedTuple):
    """Sum of each row, float32 `[n]`."""

    total: jax.Array


@dataclasses.dataclass(frozen=True)
class SoftplusSum(Reduction):
    """`sum_j log(1 + exp(scale a_i . b_j + bias))` of rows. Live: a, b and (`scale`, `bias`)."""

    def empty(self, n):
        return Sums(jnp.zeros(n, jnp.float32)), None

    def partial(self, live, fixed):
        return Sums(jnp.sum(self._terms(live), axis=1)), None

    def merge(self, a, b):
        return a and Sums(a.total + b.total)

    def pull(self, live, fixed, stats, bars):
        return jnp.sum(bars[0].total[:, None] * self._terms(live))

    def _terms(self, live):
        scale, bias = live.shared
        return jax.nn.softplus(scale * similarity(live.rows, live.columns) + bias)


class Gaps(NamedTuple):
    """Of each row or column, float32 `[n]`: log-sum-exp of student and teacher, the teacher's mean of their gap."""

    student: jax.Array
    teacher: jax.Array
    gap: jax.Array

    @property
    def divergence(self) -> jax.Array:
        """`KL(p || q)` of each row."""
        return self.gap - self.teacher + self.student


@dataclasses.dataclass(frozen=True)
class Divergence(Reduction):
    """`KL(softmax_j(target_scale u_i . w_j) || softmax_j(scale a_i . b_j))` of rows and of columns, as `Gaps`.

    Live: a, b and `scale`. Fixed: (u, keep) of rows, (w, keep) of columns, and `target_scale`; `keep` is bool.
    """

    def empty(self, n):
        one = Gaps(jnp.full(n, NOTHING, jnp.float32), jnp.full(n, NOTHING, jnp.float32), jnp.zeros(n, jnp.float32))
        return one, one

    def partial(self, live, fixed):
        student, teacher = self._logits(live, fixed)
        return self._rows(student, teacher, fixed.columns[1]), self._rows(student.T, teacher.T, fixed.rows[1])

    def merge(self, a, b):
        teacher = jnp.logaddexp(a.teacher, b.teacher)
        gap = a.gap * jnp.exp(a.teacher - teacher) + b.gap * jnp.exp(b.teacher - teacher)
        return Gaps(jnp.logaddexp(a.student, b.student), teacher, gap)

    def pull(self, live, fixed, stats, bars):
        student, teacher = self._logits(live, fixed)
        rows = self._pull(student, teacher, fixed.columns[1], stats[0], bars[0])
        return rows + self._pull(student.T, teacher.T, fixed.rows[1], stats[1], bars[1])

    def _logits(self, live, fixed):
        teacher = fixed.shared * similarity(fixed.rows[0], fixed.columns[0])
        return live.shared * similarity(live.rows, live.columns), teacher

    def _rows(self, student, teacher, keep):
        of_student = jax.nn.logsumexp(masked(student, keep), axis=1)
        of_teacher = jax.nn.logsumexp(masked(teacher, keep), axis=1)
        p = jnp.exp(masked(teacher, keep) - of_teacher[:, None])
        return Gaps(of_student, of_teacher, jnp.sum(jnp.where(keep[None, :], p * (teacher - student), 0.0), axis=1))

    def _pull(self, student, teacher, keep, stats, bars):
        q = jnp.exp(masked(student, keep) - stats.student[:, None])
        p = jnp.exp(masked(teacher, keep) - stats.teacher[:, None])
        told = jnp.where(keep[None, :], p * student, 0.0)
        return jnp.sum(bars.student[:, None] * q) - jnp.sum(bars.gap[:, None] * told)
