"""From sources to a set of pairs: every picture is decoded once, stripped of metadata, and every loss is counted."""

import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mmkd_jax import preprocess
from mmkd_jax.data import media, splits
from mmkd_jax.data.labels import Classes
from mmkd_jax.data.pairs import Pair, PairsSet, PairsWriter, pair_id
from mmkd_jax.data.sources import Skipped, Source, SourceRecord
from mmkd_jax.errors import InputError


def ingest(
    sources: Source | Sequence[Source],
    out: str | os.PathLike,
    *,
    name: str | None = None,
    shards: int | None = None,
    max_side: int | None = None,
    captions: Callable[[SourceRecord], Sequence[str]] | None = None,
    exclude: Callable[[SourceRecord], bool] | None = None,
    split: Mapping[str, float] | None = None,
    max_bad: float = 0.05,
) -> PairsSet:
    """Writes the records of all sources as one set.

    Row indices: `<source>.<split>` for each source and split, and `train`, `val`, `test` ... for all together.
    Records that cannot be used (damaged picture, neither caption nor class nor question, key seen before) are named on
    standard error and in `skipped.jsonl` of the set. What a source's set is asked in lies in `prompts.json`.

    Args:
      sources: from `sources.open_source`.
      out: folder of the new set.
      name: of the data set; by default the folder's.
      shards: number of shards; by default one for every 256 MiB.
      max_side: re-encode pictures with a longer side of at most this, px; by default the bytes of JPEG and PNG files
        are kept, and other formats become PNG without loss.
      captions: gives a record's captions instead of its own.
      exclude: records to leave out (held-out images, say); they do not count as bad.
      split: fractions by split, made by group instead of those that the sources state (see `splits.by_group`).
      max_bad: largest fraction of unusable records of a source.

    Raises:
      InputError: wrong input, a label outside its classes, or too much damage; nothing is left behind.
    """
    sources = [sources] if isinstance(sources, Source) else list(sources)
    split = splits.check(split) if split else None
    rows: dict[str, list[int]] = defaultdict(list)
    skipped: list[dict[str, str]] = []
    classes, excluded = {}, 0
    with PairsWriter(out, name, shards=shards) as writer:
        for source in sources:
            here = source.classes()
            classes.update(here)
            start = len(writer)
            make = _Maker(writer, here, captions, max_side)
            bad, left_out = _add_records(source, make, rows, exclude, split or source.about.split)
            excluded += left_out
            _judge(source, bad, len(writer) - start, max_bad)
            skipped += [{"source": source.name, "key": b.key, "reason": b.reason} for b in bad]
        made = {
            "by": "mmkd ingest",
            "sources": [_told(source, split) for source in sources],
            "max_side": max_side,
            "captions": "as the source has them" if captions is None else getattr(captions, "__name__", "given"),
            "excluded": excluded,
            "skipped": dict(sorted(Counter(s["reason"] for s in skipped).items())),
        }
        names = {source: list(known.names) for source, known in classes.items()}
        return writer.finish(rows, names, made, files=_skip_list(skipped) | _prompts(sources))


@dataclasses.dataclass(frozen=True)
class _Maker:
    """How records become pairs of `writer`."""

    writer: PairsWriter
    classes: Mapping[str, Classes]
    captions: Callable[[SourceRecord], Sequence[str]] | None
    max_side: int | None


def _add_records(source: Source, make: _Maker, rows, exclude, split) -> tuple[list[Skipped], int]:
    """Writes one source's pairs and notes their rows by index; gives the unusable, and how many were excluded."""
    bad, excluded, added = [], 0, []
    for record in _watched(source):
        if isinstance(record, SourceRecord) and exclude is not None and exclude(record):
            excluded += 1
            continue
        if isinstance(record, SourceRecord):
            record, targets = settled(record, make.classes.get(record.source))
            pair = _pair(record, make, targets)
        else:
            pair = record
        if isinstance(pair, Skipped):
            bad.append(pair)
            continue
        shown = [pair.label_id] if pair.label_id >= 0 else [n for n, target in enumerate(targets) if target == 1]
        added.append((pair.source, record.split, make.writer.add(pair, targets), pair.group or pair.id, shown))
    if split:
        *_, groups, shown = zip(*added) if added else [()] * 5
        made = splits.by_group(added[0][0] if added else "", groups, shown, split)
        added = [(name, own, *rest) for (name, _, *rest), own in zip(added, made)]
    for name, of, row, *_ in added:
        for index in _indices(name, of):
            rows[index].append(row)
    return bad, excluded


def settled(record: SourceRecord, classes: Classes | None) -> tuple[SourceRecord, tuple[int, ...]]:
    """The record with name and number of its class, and a number for each class where several may be there.

    Raises:
      InputError: it is outside the class list; the message names set and key.
    """
    try:
        if record.findings is not None:
            if classes is None:
                raise InputError("it has findings, but its set has no class list")
            targets = classes.several(record.findings)
            return dataclasses.replace(record, label="", label_id=-1), targets
        if classes is None:
            return record, ()
        label, label_id = classes.single(record.label, record.label_id)
        return dataclasses.replace(record, label=label, label_id=label_id), ()
    except InputError as error:
        raise InputError(f"{record.source}, {record.key}: {error}") from error


def _pair(record: SourceRecord, make: _Maker, targets: tuple[int, ...]) -> Pair | Skipped:
    """The pair of a record, or why there is none."""
    texts = [t for t in (record.captions if make.captions is None else make.captions(record)) if t.strip()]
    if not texts and record.label_id < 0 and not targets and not record.extra.get("qa"):
        return Skipped(record.key, "no caption")
    id = pair_id(record.source, record.key)
    if id in make.writer:
        return Skipped(record.key, "its key comes twice")
    try:
        data, codec = _stored(record.image, make.max_side)
        width, height = preprocess.decode(data).size  # of what is stored, so that all that is stored can be read
    except InputError as error:
        return Skipped(record.key, re.sub(r" <[^>]*>", "", str(error)))  # without addresses of objects
    there = [name for name, target in zip(make.classes[record.source].names, targets) if target == 1] if targets else []
    return Pair(
        id=id,
        image=data,
        captions=texts,
        modality=record.modality,
        label=record.label,
        label_id=record.label_id,
        group=group_id(record),
        source=record.source,
        license=record.license,
        article=record.article,
        extra=record.extra | ({"findings": there} if targets else {}),
        media={"kind": "image", "codec": codec, "width": width, "height": height},
    )


def group_id(record: SourceRecord) -> str:
    """Hash of what must not be divided, "" without: the words themselves may tell who a patient is."""
    return hashlib.sha256(f"{record.source}\0{record.group}".encode()).hexdigest()[:16] if record.group else ""


def _stored(image: bytes, max_side: int | None) -> tuple[bytes, str]:
    """The picture as it will lie in the set, and its codec."""
    if max_side is not None:
        return media.shrink(preprocess.decode(image), max_side)
    if image.startswith((b"\xff\xd8\xff", b"\x89PNG")):
        return media.strip(image)
    picture = preprocess.decode(image)
    return media.shrink(picture, max(picture.size), jpeg_above=max(picture.size))


def _indices(source: str, split: str) -> tuple[str, str]:
    """Names of the row indices of a split, fit to be file names."""
    source, split = (re.sub(r"[^\w-]+", "_", name) or "unnamed" for name in (source, split))
    return f"{source}.{split}", split


def _told(source: Source, split: Mapping[str, float] | None) -> dict[str, Any]:
    """What the manifest says of a source: name, inputs, splits that were made, its module's `MADE` note if it has."""
    told = {"source": source.name, "inputs": _names(source)}
    more = {"split": dict(split or source.about.split), "note": getattr(source.module, "MADE", "")}
    return told | {name: value for name, value in more.items() if value}


def _skip_list(skipped: list[dict[str, str]]) -> dict[str, bytes]:
    """The file `skipped.jsonl` if anything was."""
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in skipped)
    return {"skipped.jsonl": lines.encode()} if lines else {}


def _prompts(sources: Sequence[Source]) -> dict[str, bytes]:
    """The file `prompts.json` if any source knows how its classes are asked for."""
    known = {source.about.name: dict(source.about.prompts) for source in sources if source.about.prompts}
    return {"prompts.json": json.dumps(known, indent=2, ensure_ascii=False).encode()} if known else {}


def _names(source: Source) -> list[str]:
    """Last parts of the inputs' paths: what is told of them does not depend on where they lie."""
    return [os.path.basename(path.rstrip("/")) for path in source.inputs]


def _judge(source: Source, bad: list[Skipped], good: int, max_bad: float) -> None:
    """Names the unusable records; refuses a source with too many."""
    where = " ".join([source.name, *_names(source)])
    for item in bad[:20]:
        print(f"skipped {item.key}: {item.reason}", file=sys.stderr)
    if bad:
        print(f"{where}: {len(bad)} of {good + len(bad)} records skipped, all in skipped.jsonl", file=sys.stderr)
    if len(bad) > max_bad * (good + len(bad)):
        reasons = "; ".join(f"{n} x {r}" for r, n in Counter(b.reason for b in bad).most_common(3))
        raise InputError(
            f"{where}: {len(bad)} of {good + len(bad)} records cannot be used ({reasons}), first {bad[0].key!r}; "
            f"at most {max_bad:.0%} may be bad"
        )


def _watched(source: Source) -> Iterator[SourceRecord | Skipped]:
    """The records, with a bar on a terminal and a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(source.records(), desc=f"ingest {source.name}", unit=" records")
        return
    last = time.monotonic()
    for count, record in enumerate(source.records(), 1):
        yield record
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"ingest {source.name}: {count} records", file=sys.stderr)


def summary(pairs: PairsSet) -> dict[str, Any]:
    """What a person wants to know about a set, in a few lines."""
    manifest = pairs.manifest
    return {
        "set": manifest["name"],
        "rows": manifest["rows"],
        "hash": manifest["hash"][:16],
        "shards": len(manifest["shards"]),
        **manifest["counts"],
        "indices": {name: entry["rows"] for name, entry in manifest["indices"].items()},
        "skipped": manifest["made"].get("skipped", {}),
    }
