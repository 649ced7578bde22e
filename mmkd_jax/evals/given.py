"""Sets given to an evaluation as they lie (`--set NAME=ROOT`): ingested once, and kept by what they are made of."""

import os
from collections.abc import Mapping, Sequence

from mmkd_jax import io
from mmkd_jax.data.ingest import ingest
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.sources import Source
from mmkd_jax.data.sources.tables import below
from mmkd_jax.errors import InputError
from mmkd_jax.evals import base, sets


def pairs_of(roots: Mapping[str, str], folder: str | os.PathLike) -> PairsSet:
    """All given sets as one set of pairs in `folder`, made unless it is there.

    It is found again by a hash of the sets' records and of the names, sizes and times of all files below their inputs.
    Pictures are not read for that: who changes one and puts its time back is not found out.

    Args:
      roots: folder by name of the set, as `sets.find` and `sets.open_set` take them.
      folder: that keeps what was made.

    Raises:
      InputError: a set is unknown, not there, or damaged, or has nothing to evaluate on.
    """
    sources = {name: sets.open_set(sets.find(name, root), root) for name, root in roots.items()}
    made_of = [[_described(source), _listing(source)] for source in sources.values()]
    path = io.as_path(folder) / f"{'-'.join(sources)[:80]}-{io.hash_of(made_of)[:16]}"
    if not (path / "manifest.json").exists():
        ingest(list(sources.values()), path, name="given")
    pairs = PairsSet.open(path)
    tested = {one.name for one in base.sets_of(pairs)}
    for name, source in sources.items():
        if source.about.name not in tested:
            there = [row.rpartition(".")[2] for row in pairs.row_names() if row.startswith(f"{source.about.name}.")]
            raise InputError(
                f"set {name} has no split test to evaluate on, only {', '.join(there)}; "
                'give its set.json a "split", for example {"test": 0.2}, or {"test": 1} for all of it'
            )
    return pairs


def roots(entries: Sequence[str]) -> dict[str, str]:
    """Folder by name of the set from entries NAME=ROOT.

    Raises:
      InputError: an entry is malformed, or a name comes twice.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, root = entry.partition("=")
        if not equals or not name or not root:
            raise InputError(f"--set {entry!r} must be NAME=ROOT")
        if name in found:
            raise InputError(f"--set {name} is given twice ({found[name]}, {root})")
        found[name] = root
    return found


def _described(source: Source) -> list:
    about = source.about
    classes = about.classes and [about.classes.names, dict(about.classes.words)]
    told = [about.name, about.modality, about.license, about.article, classes, about.prompts, about.split]
    return [source.name, source.options, told]


def _listing(source: Source) -> list:
    """Path, size and time of every file that the source may read, so that any change of them is seen."""
    files = []
    for given in source.inputs:
        path = io.as_path(given)
        root = path if path.is_dir() else path.parent
        for file in below(root):
            stat = file.stat()
            files.append([str(file.relative_to(root)), stat.length, int(stat.mtime)])
    return files
