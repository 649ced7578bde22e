"""Folders of pictures, one a class: ROOT/CLASS/... or ROOT/SPLIT/CLASS/..., at any depth below the class."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.data import splits
from mmkd_jax.data.sources import Skipped, SourceRecord
from mmkd_jax.data.sources.tables import below, picture
from mmkd_jax.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def records(
    inputs: Sequence[str], *, name: str = "", group: str = "", skip: str = "", named: Mapping[str, str] | None = None
) -> Iterator[SourceRecord | Skipped]:
    """Pictures by split, class and path; their keys are paths from the root.

    Folders called train, val and test (or training, validation, ...) are splits, if all beside them are; a folder
    given by such a name is one, and then the folder above it is the root. Files that are no pictures by their name
    are not looked at, nor hidden ones.

    Args:
      inputs: root folders.
      name: of the set; by default the root's.
      group: regular expression that finds in the key what must not be divided (a patient): its first group, or all
        that matched.
      named: splits by name of their folders, beside the usual names.
      skip: regular expression; pictures whose key has it somewhere are left out (masks that lie beside, say).

    Raises:
      InputError: no folder, no class folders, or a key in which `group` finds nothing.
    """
    for root, split, folder in _parts(inputs, named or {}):
        for of_class in _folders(folder):
            for key, path in pictures(of_class, root, skip):
                data = picture(path)
                if isinstance(data, Skipped):
                    yield Skipped(key, data.reason)
                    continue
                yield SourceRecord(
                    key=key, image=data, captions=(), source=name or root.name, split=split, label=of_class.name,
                    group=_group(group, key),
                )  # fmt: skip


def classes(
    inputs: Sequence[str], *, name: str = "", named: Mapping[str, str] | None = None, **_: Any
) -> dict[str, list[str]]:
    """Names of the class folders of all splits, sorted."""
    found: dict[str, set[str]] = {}
    for root, _split, folder in _parts(inputs, named or {}):
        found.setdefault(name or root.name, set()).update(of_class.name for of_class in _folders(folder))
    return {here: sorted(names) for here, names in found.items()}


def pictures(folder, root, skip: str = "") -> Iterator[tuple[str, Any]]:
    """Key (the path below `root`) and path of every picture in a folder whose key `skip` does not find."""
    for path in below(folder):
        key = path.relative_to(root).as_posix()
        if path.suffix.lower() in SUFFIXES and not (skip and _found(skip, key)):
            yield key, path


def _parts(inputs: Sequence[str], by_name: Mapping[str, str]) -> list[tuple]:
    """(root, split, folder with class folders) of everything given; the split is "" where none is stated."""
    if not inputs:
        raise InputError("folders needs --input: a folder with one folder a class, or with splits of such")
    parts = []
    for path in map(io.as_path, inputs):
        if not path.is_dir():
            raise InputError(f"{path} is not a folder; give one that holds a folder of pictures for each class")
        inner = _folders(path)
        named = [folder for folder in inner if _split(folder, by_name)]
        if not inner:
            raise InputError(f"{path} holds no folders; give one that holds a folder of pictures for each class")
        if _split(path, by_name):
            parts.append((path.parent, _split(path, by_name), path))
        elif len(named) == len(inner):
            parts += [(path, _split(folder, by_name), folder) for folder in inner]
        elif named:
            other = next(folder for folder in inner if not _split(folder, by_name))
            raise InputError(f"{path} holds the split {named[0].name!r} beside {other.name!r}; give the split folders")
        else:
            parts.append((path, "all", path))
    return parts


def _folders(path) -> list:
    hidden = (".", "__MACOSX")
    return sorted((f for f in path.iterdir() if f.is_dir() and not f.name.startswith(hidden)), key=str)


def _split(path, by_name: Mapping[str, str]) -> str:
    return by_name.get(path.name) or splits.NAMES.get(path.name.lower(), "")


def _found(pattern: str, key: str) -> re.Match | None:
    try:
        return re.search(pattern, key)
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regular expression ({error})") from error


def _group(pattern: str, key: str) -> str:
    if not pattern:
        return ""
    if not (match := _found(pattern, key)):
        raise InputError(f"{key}: the pattern of groups {pattern!r} finds nothing in it")
    return match[1] if match.re.groups else match[0]
