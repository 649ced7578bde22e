"""MMKD-CLIP's published features: feature shards in both spaces, and the authors' choice of teachers as a selection."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from mmkd_jax import io
from mmkd_jax.data.features import FeatureWriter
from mmkd_jax.data.pairs import PairsSet, pair_id
from mmkd_jax.data.selection import Selection
from mmkd_jax.data.sources import Skipped
from mmkd_jax.data.sources.mmkd_release import SOURCE, Line, folders, inside, lines
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError
from mmkd_jax.models import pickles

# space: its file, and the lengths of its vectors
SPACES = {"native": ("clips_output.pt", "unit"), "projected": ("clips_project_output.pt", "none")}
TOWERS = {"image": "img", "text": "txt"}
THREADS = 16  # samples that are read at a time: small files, mostly waiting
UNIT = 1e-3  # how far a native feature's length may be from 1
SCALE = 100.0  # the teachers' own scales were not published; this is CLIP's bound (arXiv 2103.00020, section 2.5)

Vectors = dict[tuple[str, str, str], np.ndarray]  # by space, teacher and tower


def import_features(
    inputs: Sequence[str], pairs: PairsSet, out: str | os.PathLike, licences: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Writes `out/native/TEACHER`, `out/projected/TEACHER`, `out/selection.npz` and `out/problems.jsonl`.

    A sample's features that are missing, hostile, of another width than the teacher's others, not finite or not of unit
    length (native) are absent and named in `problems.jsonl`; all else is kept as it was published, in float32. Pickles
    are read without executing them. Each feature is of the whole picture: the view policy is `center`.

    Args:
      inputs: the folders that `pairs` was made from.
      pairs: the set.
      out: folder of the feature sets; started again, it goes on where it stopped.
      licences: by teacher; `unknown` where it is silent.

    Returns:
      Counts: `samples`, features by space and teacher, and `problems` by reason.

    Raises:
      InputError: no line of the folders is a pair of the set, or `out` holds something else.
    """
    samples = _samples(inputs, pairs)
    if not samples:
        raise InputError(f"no sample of {', '.join(map(str, inputs))} is a pair of {pairs.path}; ingest them first")
    out = io.make_workdir(out)
    names = sorted({name for _, line in samples.values() for name in line.teachers})
    widths = _widths(samples, names)
    licences = licences or {}
    writers = {
        (space, name): _writer(out, pairs, space, name, width, licences.get(name, "unknown"))
        for (space, name), width in widths.items()
    }
    kept, problems = np.zeros((len(pairs), len(names)), bool), []
    shards = next(iter(writers.values()))
    for shard in range(len(shards)):
        found, of_shard = _read_shard(samples, shards.rows(shard), widths)
        problems += of_shard
        _write_shard(writers, shard, found)
        for row, vectors in found.items():
            both = [all((space, name, tower) in vectors for space in SPACES for tower in TOWERS) for name in names]
            kept[row] = [name in samples[row][1].teachers and there for name, there in zip(names, both, strict=True)]
    for writer in writers.values():
        writer.finish()
    Selection(kept, tuple(names), pairs.hash, {"by": "the authors of MMKD-CLIP"}).save(out / "selection.npz")
    io.write_text(out / "problems.jsonl", "".join(json.dumps(problem) + "\n" for problem in problems))
    return {
        "samples": len(samples),
        "features": {f"{space}/{name}": _present(out / space / name) for space, name in writers},
        "kept": dict(zip(names, kept.sum(axis=0).tolist(), strict=True)),
        "problems": dict(Counter(problem["reason"] for problem in problems)),
    }


def _writer(out: epath.Path, pairs: PairsSet, space: str, name: str, width: int, license: str) -> FeatureWriter:
    return FeatureWriter(
        out / space / name,
        pairs,
        teacher=name,
        width=width,
        views=1,
        policy=ViewPolicy("center"),
        license=license,
        weights_hash="published features",
        preprocess_hash="published features",
        logit_scale=SCALE,
        space=space,
        norm=SPACES[space][1],
        dtype="float32",
    )


def _samples(inputs: Sequence[str], pairs: PairsSet) -> dict[int, tuple[epath.Path, Line]]:
    """Folder and line of every row that has one."""
    row_of = {name: row for row, name in enumerate(pairs.ids(np.arange(len(pairs))))}
    found = {}
    for folder in folders(inputs):
        for line in lines(folder):
            row = None if isinstance(line, Skipped) else row_of.get(pair_id(SOURCE, line.key))
            if row is not None:
                found[row] = folder, line
    return found


def _widths(samples: Mapping[int, tuple[epath.Path, Line]], names: Sequence[str]) -> dict[tuple[str, str], int]:
    """Width of each teacher in each space: that of the first sample which has it."""
    widths: dict[tuple[str, str], int] = {}
    for folder, line in samples.values():
        missing = [(space, name) for space in SPACES for name in line.teachers if (space, name) not in widths]
        if missing:
            vectors, _ = _read(folder, line, None)
            widths |= {key: vectors[(*key, "image")].size for key in missing if (*key, "image") in vectors}
        if len(widths) == len(SPACES) * len(names):
            break
    if not widths:
        raise InputError("no sample holds a feature that can be read; the folder is damaged or not what was published")
    return dict(sorted(widths.items()))


def _read_shard(
    samples: Mapping[int, tuple[epath.Path, Line]], rows: range, widths: Mapping[tuple[str, str], int]
) -> tuple[dict[int, Vectors], list[dict[str, str]]]:
    """The vectors of a shard's rows, and what is wrong with some."""
    here = [row for row in rows if row in samples]
    with ThreadPoolExecutor(THREADS) as pool:
        read = list(pool.map(lambda row: _read(*samples[row], widths), here))
    problems = [{"key": samples[row][1].key, **p} for row, (_, found) in zip(here, read, strict=True) for p in found]
    return {row: vectors for row, (vectors, _) in zip(here, read, strict=True)}, problems


def _read(
    folder: epath.Path, line: Line, widths: Mapping[tuple[str, str], int] | None
) -> tuple[Vectors, list[dict[str, str]]]:
    """A sample's usable vectors, by pairs of picture and text, and what is wrong with the others."""
    vectors: Vectors = {}
    problems = []
    for space, (file, norm) in SPACES.items():
        path = inside(folder, f"{line.folder}/{file}")
        try:
            if path is None or not path.exists():
                raise InputError("is missing")
            stored = pickles.read(path)
        except InputError as error:
            problems.append({"file": file, "reason": "missing" if "is missing" in str(error) else "not readable"})
            continue
        for name in sorted({key.rpartition("_")[0] for key in stored} | set(line.teachers)):
            both = {tower: stored.get(f"{name}_{end}") for tower, end in TOWERS.items()}
            if reason := _wrong(both, norm, None if widths is None else widths.get((space, name), 0)):
                problems.append({"file": file, "teacher": name, "reason": reason})
                continue
            if name not in line.teachers:
                problems.append({"file": file, "teacher": name, "reason": "not among the sample's teachers"})
            vectors |= {(space, name, tower): np.float32(x).reshape(-1) for tower, x in both.items()}
    return vectors, problems


def _wrong(both: Mapping[str, np.ndarray | None], norm: str, width: int | None) -> str:
    """What forbids to use a teacher's features of a sample, "" if nothing does."""
    if all(x is None for x in both.values()):
        return "a teacher of the sample without features"
    if any(x is None for x in both.values()):
        return "picture or text without the other"
    values = [np.float32(x).reshape(-1) for x in both.values()]
    if width == 0:
        return "a teacher that no sample names"
    if values[0].size != values[1].size or (width is not None and values[0].size != width):
        return "another width than the teacher's"
    if not all(np.isfinite(x).all() and x.any() for x in values):
        return "not finite or zero"
    if norm == "unit" and any(abs(np.linalg.norm(x) - 1) > UNIT for x in values):
        return "not of unit length"
    return ""


def _write_shard(writers: Mapping[tuple[str, str], FeatureWriter], shard: int, found: Mapping[int, Vectors]) -> None:
    for (space, name), writer in writers.items():
        if shard not in writer.pending():
            continue
        rows = writer.rows(shard)
        present = np.array([(space, name, "image") in found.get(row, {}) for row in rows], bool)
        image = np.zeros((len(rows), 1, writer.width), np.float32)
        text = [np.zeros((0, writer.width), np.float32)] * len(rows)
        for place in np.flatnonzero(present):
            vectors = found[rows[place]]
            image[place, 0] = vectors[space, name, "image"]
            text[place] = vectors[space, name, "text"][None]
        writer.write_shard(shard, present, image, text)


def _present(path: epath.Path) -> int:
    return io.read_json(path / "manifest.json")["present"]


def told(summary: Mapping[str, Any]) -> Iterator[str]:
    """What a person wants to know of an import, line by line."""
    yield f"features of {summary['samples']} samples"
    for name, count in summary["features"].items():
        yield f"  {name:28} {count:9}"
    for reason, count in summary["problems"].items():
        yield f"  {reason}: {count} (see problems.jsonl)"
