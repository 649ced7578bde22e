"""What a config file's `sweep()` yields: overrides, as `{"optimizer.lr": 1e-3, "seed": 0}`, one dict a run."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.errors import InputError

Overrides = dict[str, Any]
Space = Callable[[float], Any]  # from a uniform number in [0, 1) to a field's value


def grid(values: Mapping[str, Iterable[Any]]) -> list[Overrides]:
    """Every combination: `grid({"optimizer.lr": (1e-4, 1e-3), "seed": range(3)})` is six runs, the last field fastest.

    Raises:
      InputError: a field has no value.
    """
    columns = {field: list(column) for field, column in values.items()}
    for field, column in columns.items():
        if not column:
            raise InputError(f"the sweep gives {field!r} no value")
    return [dict(zip(columns, row)) for row in itertools.product(*columns.values())]


def product(*parts: Iterable[Overrides]) -> list[Overrides]:
    """Every choice of one entry from each part, merged: `product(leave_one_out(names), grid({"seed": range(3)}))`.

    Raises:
      InputError: two parts set the same field.
    """
    merged = []
    for chosen in itertools.product(*(list(part) for part in parts)):
        run: Overrides = {}
        for overrides in chosen:
            if twice := sorted(set(run) & set(overrides)):
                raise InputError(f"two parts of the sweep set {twice[0]!r}")
            run |= overrides
        merged.append(run)
    return merged


def random(count: int, spaces: Mapping[str, Space], seed: int = 0) -> list[Overrides]:
    """`count` different draws; `spaces` are `uniform`, `log_uniform`, `choice`, or a function of a number in [0, 1).

    A draw depends on the seed, its place and the field's name only: a longer sweep begins with the shorter one, and
    another field more leaves the others as they were.

    Raises:
      InputError: there are not so many different ones.
    """
    drawn: list[Overrides] = []
    for place in range(100 * count):
        run = {field: space(_uniform(seed, place, field)) for field, space in spaces.items()}
        if run not in drawn:
            drawn.append(run)
        if len(drawn) == count:
            return drawn
    raise InputError(f"the sweep draws {count} different runs from what gives only {len(drawn)}")


def uniform(low: float, high: float) -> Space:
    """Numbers from `low` to `high`, to four digits."""
    return lambda u: float(f"{low + (high - low) * u:.4g}")


def log_uniform(low: float, high: float) -> Space:
    """Numbers from `low` to `high`, each factor as likely as another, to four digits.

    Raises:
      InputError: a bound is not positive.
    """
    if not 0 < low < high:
        raise InputError(f"log_uniform({low}, {high}): it takes 0 < low < high")
    return lambda u: float(f"{low * math.exp(u * math.log(high / low)):.4g}")


def choice(*values: Any) -> Space:
    """One of the values, each as likely."""
    return lambda u: values[int(u * len(values))]


def leave_one_out(names: Sequence[str], field: str = "teachers") -> list[Overrides]:
    """All of `names`, then all but each: `{"teachers": ("a", "b", "c")}`, `{"teachers": ("b", "c")}` and so on.

    Raises:
      InputError: fewer than two names, or a name twice.
    """
    names = tuple(names)
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"to leave one out takes two different names or more, not {names}")
    rest = [tuple(name for name in names if name != left_out) for left_out in names]
    return [{field: kept} for kept in (names, *rest)]


def teachers_in(features: str) -> tuple[str, ...]:
    """Names of the teachers that have a finished feature set in the folder `features`, sorted.

    Raises:
      InputError: there is none.
    """
    folder = io.as_path(features)
    found = sorted(path.parent.name for path in folder.glob("*/manifest.json")) if features else []
    if not found:
        raise InputError(f"no feature set in {features!r}; use --config.features=DIR (made by `mmkd emit`)")
    return tuple(found)


def pick(config: Mapping[str, Any], *sections: str) -> list[str]:
    """The fields of some sections of a config as command-line overrides, for a command that must agree with it."""
    return [f"--config.{name}={value}" for section in sections for name, value in _leaves(config, section)]


def _leaves(config: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    value = config
    for part in name.split("."):
        value = value[part]
    if not isinstance(value, Mapping) and not hasattr(value, "keys"):
        yield name, value
        return
    for child in value.keys():  # noqa: SIM118 (a ConfigDict iterates by key through keys() only)
        yield from _leaves(config, f"{name}.{child}")


def _uniform(seed: int, place: int, field: str) -> float:
    """A number in [0, 1) for a draw's field, to 53 bits."""
    digest = hashlib.sha256(f"{seed}/{place}/{field}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
