"""Slides put together from a labelled set of tiles, whose diagnosis depends on few of them, which are known.

A slide is a square of tiles. A negative one has tiles of the negative classes only; of a positive one a few are of the
positive class. Tested slides have tiles of the set's test split, the others of its training split: every fourth of
these is for the slides that choose. A slide's tiles are drawn without repetition; slides of one split share tiles.
"""

import csv
import io as memory
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from mmkd_jax import io, preprocess
from mmkd_jax.data.sources import Skipped, SourceRecord, webdataset
from mmkd_jax.errors import InputError, near


def make(
    tiles: str | os.PathLike, out: str | os.PathLike, *, positive: str, negative: Sequence[str], train: int, val: int,
    test: int, side: int, few: int, seed: int,
) -> epath.Path:  # fmt: skip
    """Writes `slides.csv`, `tiles.csv` and `slides/NAME/x_y.jpg` unless they are there; returns the folder.

    Args:
      tiles: WebDataset folder of a labelled set with splits `train` and `test`.
      out: parent of the folder, which is named by what it is made of.
      positive: the class that makes a slide positive.
      negative: the other tiles' classes.
      train, val, test: number of slides, half of them positive.
      side: tiles along a slide's side.
      few: most positive tiles in a positive slide; at least one.
      seed: of the draws.

    Raises:
      InputError: a class is not there, or a split has too few tiles.
    """
    asked = {"positive": positive, "negative": list(negative), "train": train, "val": val, "test": test, "side": side,
             "few": few, "seed": seed}  # fmt: skip
    records = [one for one in webdataset.records([os.fspath(tiles)]) if not isinstance(one, Skipped)]
    known = sorted({one.label for one in records})
    for name in (positive, *negative):
        if name not in known:
            raise InputError(f"{tiles} has no class {name!r}; {near(name, known)}")
    folder = io.as_path(out) / f"slides-{io.hash_of([asked, [io.sha256(one.image) for one in records]])[:12]}"
    if folder.exists():
        return folder
    rng, slides, truth = np.random.default_rng(seed), [], []
    with io.new_folder(folder) as place:
        for split, count in (("train", train), ("val", val), ("test", test)):
            ours = _of(records, split, tiles)
            for number in range(count):
                name, label = f"{split}{number:04d}", ("negative", "positive")[number % 2]
                slides.append([name, name, label, split])
                truth += _write(place / "slides" / name, name, ours, asked, rng, bool(number % 2))
        _table(place / "slides.csv", ["slide", "patient", "label", "split"], slides)
        _table(place / "tiles.csv", ["slide", "x", "y", "positive"], truth)
    return folder


def _of(records: Sequence[SourceRecord], split: str, tiles) -> dict[str, list[SourceRecord]]:
    """Tiles by class that a split's slides are made of."""
    there = [one for one in records if one.split == ("test" if split == "test" else "train")]
    if split != "test":
        there = [one for k, one in enumerate(there) if (k % 4 == 3) == (split == "val")]
    if not there:
        raise InputError(f"{tiles} has no tiles for slides of the split {split!r}")
    found: dict[str, list[SourceRecord]] = {}
    for one in there:
        found.setdefault(one.label, []).append(one)
    return found


def _write(folder: epath.Path, name: str, ours: dict[str, list], asked: dict, rng, positive: bool) -> list[list]:
    """One slide's tiles, and the rows of their truth."""
    side, rest = asked["side"], [one for label in asked["negative"] for one in ours.get(label, [])]
    few = int(rng.integers(1, asked["few"] + 1)) if positive else 0
    target = ours.get(asked["positive"], [])
    if len(rest) < side**2 or len(target) < few:
        raise InputError(f"a slide of {side} x {side} tiles needs as many of the negative classes in each split")
    chosen = [rest[k] for k in rng.choice(len(rest), side**2 - few, replace=False)]
    chosen += [target[k] for k in rng.choice(len(target), few, replace=False)]
    folder.mkdir(parents=True)
    rows, size = [], max(preprocess.decode(chosen[0].image).size)
    for place, k in enumerate(rng.permutation(side**2)):
        x, y = size * (place % side), size * (place // side)
        picture = preprocess.decode(chosen[k].image).convert("RGB").resize((size, size))
        stream = memory.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        (folder / f"{x}_{y}.jpg").write_bytes(stream.getvalue())
        rows.append([name, x, y, int(chosen[k].label == asked["positive"])])
    return rows


def _table(path: epath.Path, columns: list[str], rows: list[list]) -> None:
    text = memory.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    io.write_text(path, text.getvalue())
