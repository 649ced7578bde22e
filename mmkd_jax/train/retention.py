"""Which checkpoints of a run stay."""

import dataclasses
import math
from collections.abc import Mapping

from mmkd_jax.errors import InputError, near

Scalars = Mapping[str, float]
EVALUATED = "eval/"  # names of numbers that only some steps have: see `evaluation`


@dataclasses.dataclass(frozen=True)
class Retention:
    """The newest checkpoint stays, of the regular ones the newest few, and the best by a scalar if one is named.

    Attributes:
      every: steps between regular checkpoints; any other (by time, at preemption, the last) is temporary: it goes when
        there is a newer one.
      keep: number of regular ones that stay.
      best: `min:NAME` or `max:NAME` of a scalar that is reported, or "".
    """

    every: int = 1
    keep: int = 2
    best: str = ""

    def __post_init__(self):
        mode, _, name = self.best.partition(":")
        if self.every < 1 or self.keep < 1:
            raise InputError(f"save_every {self.every} and keep {self.keep} must be at least 1")
        if self.best and (mode not in ("min", "max") or not name):
            raise InputError(f"best {self.best!r} must be min:NAME or max:NAME of a reported scalar")

    def check(self, scalars: Scalars) -> None:
        """Refuses the name of a scalar that is not reported; whether evaluations give theirs, they say themselves."""
        name = self.best.partition(":")[2]
        if name and name not in scalars and not name.startswith(EVALUATED):
            raise InputError(f"best {self.best!r}: no scalar {name!r} is reported; {near(name, scalars)}")

    def best_of(self, saved: Mapping[int, Scalars]) -> int | None:
        """The step whose scalar is best, the newest of equals; None if none has it."""
        mode, _, name = self.best.partition(":")
        values = {step: float(scalars[name]) for step, scalars in saved.items() if name in scalars}
        sign = -1 if mode == "min" else 1
        return max(
            (step for step, value in values.items() if math.isfinite(value)),
            key=lambda step: (sign * values[step], step),
            default=None,
        )

    def stay(self, saved: Mapping[int, Scalars]) -> set[int]:
        """Of the steps `saved`, each with its scalars, those whose checkpoints stay."""
        regular = sorted(step for step in saved if step % self.every == 0)
        stay = {max(saved, default=None), self.best_of(saved), *regular[-self.keep :]}
        return stay - {None}
