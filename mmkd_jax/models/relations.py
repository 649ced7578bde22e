"""How published arrays and parameters of ours relate: the vocabulary that layouts are written in."""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

Read = Callable[[list[np.ndarray], tuple[int, ...]], np.ndarray]
Write = Callable[[np.ndarray, int], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Relation:
    """How published arrays and one of ours relate: `read(theirs, our shape)`, `write(ours, number of keys)`."""

    read: Read
    write: Write


SAME = Relation(lambda theirs, shape: theirs[0].reshape(shape), lambda ours, _: [ours])
# [out, in] of torch's Linear; our kernels are [inputs..., outputs...].
LINEAR = Relation(lambda theirs, shape: theirs[0].T.reshape(shape), lambda ours, _: [ours.T])
# Leading axes of size one, as timm's class token and positions have.
TOKEN = Relation(SAME.read, lambda ours, _: [ours[None, None]])
TABLE = Relation(SAME.read, lambda ours, _: [ours[None]])
# [out, in, p, p] of torch's Conv2d to [1, p, p, in, out].
CONV = Relation(
    lambda theirs, shape: theirs[0].transpose(2, 3, 1, 0).reshape(shape),
    lambda ours, _: [ours[0].transpose(3, 2, 0, 1)],
)
# Rows in the order queries, keys, values, and heads within each: [3 D, D] in one array, or three of [D, D].
QKV = Relation(
    lambda theirs, shape: np.concatenate(theirs).T.reshape(shape),
    lambda ours, n: np.split(ours.reshape(ours.shape[0], -1).T, n),
)
QKV_BIAS = Relation(
    lambda theirs, shape: np.concatenate(theirs).reshape(shape), lambda ours, n: np.split(ours.reshape(-1), n)
)
OUT = Relation(LINEAR.read, lambda ours, _: [ours.reshape(-1, ours.shape[-1]).T])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: its path (`/` between names), the published keys (`{i}` counts layers), and the relation.

    `indices` are the values of `{i}` along a stacked parameter's first axis; None means each of the tower's layers.
    """

    path: str
    keys: tuple[str, ...]
    relation: Relation
    indices: tuple[int, ...] | None = None


def entry(path: str, relation: Relation, *keys: str) -> Entry:
    """Shorthand for `Entry`."""
    return Entry(path, keys, relation)


def stacked(entries: Iterable[Entry], indices: Iterable[int]) -> list[Entry]:
    """The same entries, `{i}` taking the values `indices`."""
    return [dataclasses.replace(item, indices=tuple(indices)) for item in entries]


def norm(path: str, key: str) -> list[Entry]:
    """A LayerNorm."""
    return [entry(f"{path}/scale", SAME, f"{key}.weight"), entry(f"{path}/bias", SAME, f"{key}.bias")]


def linear(path: str, key: str, relation: Relation = LINEAR) -> list[Entry]:
    """A Linear with bias."""
    return [entry(f"{path}/kernel", relation, f"{key}.weight"), entry(f"{path}/bias", SAME, f"{key}.bias")]


def qkv(path: str, weights: tuple[str, ...], biases: tuple[str, ...]) -> list[Entry]:
    """Queries, keys and values: fused (one key each) or apart (three keys each)."""
    return [entry(f"{path}/kernel", QKV, *weights), entry(f"{path}/bias", QKV_BIAS, *biases)]
