"""From sources to a set of pairs: every picture is decoded once, stripped of metadata, and every loss is counted."""

import hashlib
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmkd_jax import preprocess
from mmkd_jax.data import media
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
    max_bad: float = 0.05,
) -> PairsSet:
    """Writes the records of all sources as one set.

    Row indices: `<source>.<split>` for each source and split, and `train`, `val`, `test` ... for all together.
    Records that cannot be used (damaged picture, no caption, key seen before) are named on standard error and in
    `skipped.jsonl` of the set.

    Args:
      sources: from `sources.open_source`.
      out: folder of the new set.
      name: of the data set; by default the folder's.
      shards: number of shards; by default one for every 256 MiB.
      max_side: re-encode pictures with a longer side of at most this, px; by default their bytes are kept.
      captions: gives a record's captions instead of its own.
      exclude: records to leave out (held-out images, say); they do not count as bad.
      max_bad: largest fraction of unusable records of a source.

    Raises:
      InputError: wrong input, or too much of it is damaged; nothing is left behind.
    """
    sources = [sources] if isinstance(sources, Source) else list(sources)
    rows: dict[str, list[int]] = defaultdict(list)
    skipped: list[dict[str, str]] = []
    classes, excluded = {}, 0
    with PairsWriter(out, name, shards=shards) as writer:
        for source in sources:
            classes.update(source.classes())
            start = len(writer)
            bad, left_out = _add_records(source, writer, rows, captions, exclude, max_side)
            excluded += left_out
            _judge(source, bad, len(writer) - start, max_bad)
            skipped += [{"source": source.name, "key": b.key, "reason": b.reason} for b in bad]
        made = {
            "by": "mmkd ingest",
            "sources": [_told(source) for source in sources],
            "max_side": max_side,
            "captions": "as the source has them" if captions is None else getattr(captions, "__name__", "given"),
            "excluded": excluded,
            "skipped": dict(sorted(Counter(s["reason"] for s in skipped).items())),
        }
        _check_labels(writer, classes)
        return writer.finish(rows, classes, made, files=_skip_list(skipped))


def _add_records(source: Source, writer: PairsWriter, rows, captions, exclude, max_side) -> tuple[list[Skipped], int]:
    """Writes one source's pairs and notes their rows by index; gives the unusable, and how many were excluded."""
    bad, excluded = [], 0
    for record in _watched(source):
        if isinstance(record, SourceRecord) and exclude is not None and exclude(record):
            excluded += 1
            continue
        pair = _pair(record, captions, max_side, writer)
        if isinstance(pair, Skipped):
            bad.append(pair)
            continue
        row = writer.add(pair)
        for index in _indices(pair.source, record.split):
            rows[index].append(row)
    return bad, excluded


def _pair(record, captions, max_side, writer: PairsWriter) -> Pair | Skipped:
    """The pair of a record, or why there is none."""
    if isinstance(record, Skipped):
        return record
    texts = [t for t in (record.captions if captions is None else captions(record)) if t.strip()]
    if not texts:
        return Skipped(record.key, "no caption")
    id = pair_id(record.source, record.key)
    if id in writer:
        return Skipped(record.key, "its key comes twice")
    try:
        if max_side is None:
            data, codec = media.strip(record.image)
        else:
            data, codec = media.shrink(preprocess.decode(record.image), max_side)
        width, height = preprocess.decode(data).size  # of what is stored, so that all that is stored can be read
    except InputError as error:
        return Skipped(record.key, re.sub(r" <[^>]*>", "", str(error)))  # without addresses of objects
    group = hashlib.sha256(f"{record.source}\0{record.group}".encode()).hexdigest()[:16] if record.group else ""
    return Pair(
        id=id,
        image=data,
        captions=texts,
        modality=record.modality,
        label=record.label,
        label_id=record.label_id,
        group=group,
        source=record.source,
        license=record.license,
        article=record.article,
        extra=record.extra,
        media={"kind": "image", "codec": codec, "width": width, "height": height},
    )


def _indices(source: str, split: str) -> tuple[str, str]:
    """Names of the row indices of a split, fit to be file names."""
    source, split = (re.sub(r"[^\w-]+", "_", name) or "unnamed" for name in (source, split))
    return f"{source}.{split}", split


def _told(source: Source) -> dict[str, Any]:
    """What the manifest says of a source: its name, its inputs, and its module's `MADE` note if there is one."""
    told = {"source": source.name, "inputs": _names(source)}
    note = getattr(source.module, "MADE", "")
    return {**told, "note": note} if note else told


def _skip_list(skipped: list[dict[str, str]]) -> dict[str, bytes] | None:
    """The file `skipped.jsonl` if anything was."""
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in skipped)
    return {"skipped.jsonl": lines.encode()} if lines else None


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


def _check_labels(writer: PairsWriter, classes: dict[str, list[str]]) -> None:
    for source, label in writer.labels():
        if source in classes and label >= len(classes[source]):
            raise InputError(f"source {source!r} has label_id {label}, but only {len(classes[source])} class names")


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
