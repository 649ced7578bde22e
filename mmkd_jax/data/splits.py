"""Splits of our own making: by group, stratified by class, the same for the same set on every machine."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from mmkd_jax.errors import InputError

NAMES = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
}  # fmt: skip


def plain(name: str) -> str:
    """A split's usual name: `validation` and `valid` are `val`, `Training` is `train`; others stay as they are."""
    return NAMES.get(name.strip().lower(), name.strip())


def check(fractions: Mapping[str, float], where: str = "split") -> dict[str, float]:
    """The fractions, if they are some.

    Raises:
      InputError: a name that cannot be a split's, or fractions that are none.
    """
    for name, fraction in fractions.items():
        if not re.fullmatch(r"\w+", str(name)) or name == "train":
            raise InputError(f"{where}: {name!r} is not the name of a split beside train, which gets the rest")
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise InputError(f"{where}: the fraction of {name} is {fraction!r}, not a number between 0 and 1")
    if not fractions or sum(fractions.values()) > 1 + 1e-9:
        raise InputError(f"{where}: the fractions must not add up to more than 1, for example test=0.2 val=0.1")
    return dict(fractions)


def by_group(
    source: str, groups: Sequence[str], shown: Sequence[Sequence[int]], fractions: Mapping[str, float]
) -> list[str]:
    """A split for each row; what shares a group shares its split, whatever comes in which order.

    Groups are dealt out class by class, each by the rarest that it shows, in the order of a hash of source and group.
    A class that goes by more groups than there are fractions is in every split.

    Args:
      source: name of the set.
      groups: of each row; a row without one needs a group of its own.
      shown: classes of each row: one, none, or several.
      fractions: of the groups by split; the rest is `train`.
    """
    members: dict[str, set[int]] = defaultdict(set)
    for group, classes in zip(groups, shown, strict=True):
        members[group].update(classes)
    counts = Counter(number for classes in members.values() for number in classes)
    by_class: dict[int, list[str]] = defaultdict(list)
    for group, classes in members.items():
        by_class[min(classes, key=lambda number: (counts[number], number), default=-1)].append(group)
    chosen = {}
    for of_class in by_class.values():
        of_class.sort(key=lambda group: hashlib.sha256(f"{source}\0{group}".encode()).digest())
        start, spare = 0, len(of_class) > len(fractions)
        for name, fraction in fractions.items():
            stop = start + max(round(fraction * len(of_class)), int(spare))
            chosen.update(dict.fromkeys(of_class[start:stop], name))
            start = stop
    return [chosen.get(group, "train") for group in groups]
