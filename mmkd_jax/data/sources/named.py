"""Pictures whose names say their class (`CHNCXR_0001_0.png`), at any depth below folders."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.data import splits
from mmkd_jax.data.sources import Skipped, SourceRecord
from mmkd_jax.data.sources.folders import pictures
from mmkd_jax.data.sources.tables import picture
from mmkd_jax.errors import InputError


def records(
    inputs: Sequence[str], *, label: str = "", name: str = "", group: str = "", split: str = "", skip: str = ""
) -> Iterator[SourceRecord | Skipped]:
    """Pictures in the order of their paths, which are their keys.

    Args:
      inputs: folders.
      label: regular expression that finds the class in the key: its first group, or all that matched.
      name: of the set; by default the first folder's.
      group: the same for what must not be divided (a patient).
      split: the same for the split; without it all are in one.
      skip: pictures whose key this finds something in are left out.

    Raises:
      InputError: no folder, no expression for the class, or one that finds nothing in a key.
    """
    if not inputs or not label:
        raise InputError("the source 'named' needs folders of pictures and label, an expression that finds the class")
    for root in map(io.as_path, inputs):
        if not root.is_dir():
            raise InputError(f"{root} is not a folder; give one that holds the pictures")
        for key, path in pictures(root, root, skip):
            data = picture(path)
            if isinstance(data, Skipped):
                yield Skipped(key, data.reason)
                continue
            yield SourceRecord(
                key=key, image=data, captions=(), source=name or io.as_path(inputs[0]).name,
                split=splits.plain(found(split, key, "split") or "all"), label=found(label, key, "label"),
                group=found(group, key, "group"),
            )  # fmt: skip


def classes(
    inputs: Sequence[str], *, label: str = "", name: str = "", skip: str = "", **_: Any
) -> dict[str, list[str]]:
    """Classes as the names say them, sorted."""
    keys = [key for root in map(io.as_path, inputs) for key, _ in pictures(root, root, skip)]
    return {name or io.as_path(inputs[0]).name: sorted({found(label, key, "label") for key in keys})}


def found(pattern: str, key: str, what: str) -> str:
    """What an expression finds in a key: its first group, or all that matched; "" without an expression.

    Raises:
      InputError: it finds nothing, or is none.
    """
    try:
        match = re.search(pattern, key) if pattern else None
    except re.error as error:
        raise InputError(f"{what} {pattern!r} is not a regular expression ({error})") from error
    if pattern and match is None:
        raise InputError(f"{key}: the expression for {what}, {pattern!r}, finds nothing in it")
    return "" if match is None else match[1] if match.re.groups else match[0]
