"""WebDataset tars: files of one key side by side, `KEY.jpg|jpeg|png` with `KEY.json` or `KEY.txt`.

Layout: https://github.com/webdataset/webdataset (the key ends at the first dot of the file name). Members are read
from the stream, one after the other; nothing is unpacked to disk.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence

from mmkd_jax import io
from mmkd_jax.data.sources import Skipped, SourceRecord, from_fields
from mmkd_jax.errors import InputError

IMAGES = ("jpg", "jpeg", "png")
MAX_MEMBER = 256 << 20  # bytes; nothing larger is a picture to train on


def records(
    inputs: Sequence[str],
    *,
    name: str = "",
    caption_fields: Sequence[str] = ("caption", "captions"),
    extra: Sequence[str] = ("caption_source",),
) -> Iterator[SourceRecord | Skipped]:
    """Pairs of tar files, in the order of the inputs and of each tar.

    A `manifest.jsonl` beside a tar gives the metadata of pictures that have none in the tar, and the keys that must
    be there.

    Args:
      inputs: tar files, or folders that hold some.
      name: of the set, where the metadata has no field `set`; by default the folder's or the tar's.
      caption_fields: metadata fields with texts.
      extra: metadata fields to keep.

    Raises:
      InputError: no tar is found, or one is damaged.
    """
    for tar, set_name in _tars(inputs):
        beside = _beside(tar)
        seen = set()
        for key, parts in _groups(tar):
            seen.add(key)
            if isinstance(parts, Skipped):
                yield parts
                continue
            yield _record(key, parts, beside.get(key), name or set_name, caption_fields, extra)
        for key in beside:
            if key not in seen and len(list(tar.parent.glob("*.tar"))) == 1:
                yield Skipped(key, "is in manifest.jsonl but not in the tar")


def classes(inputs: Sequence[str], *, name: str = "", **_) -> dict[str, list[str]]:
    """Class names by set, from the `classes.json` beside each tar."""
    found = {}
    for tar, set_name in _tars(inputs):
        file = tar.parent / "classes.json"
        if file.exists():
            names = io.read_json(file)
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise InputError(f"{file} is not a list of class names")
            found[name or next((r["set"] for r in _beside(tar).values() if r.get("set")), set_name)] = names
    return found


def _tars(inputs: Sequence[str]) -> list[tuple]:
    """Tar files with the name of their set."""
    if not inputs:
        raise InputError("webdataset needs --input: tar files or folders that hold some")
    tars = []
    for given in inputs:
        path = io.as_path(given)
        if not path.exists():
            raise InputError(f"{path} does not exist; give a tar file or a folder with tar files")
        found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path} holds no .tar file; give a tar file or a folder with tar files")
        tars += [(tar, path.name if path.is_dir() else tar.name.split(".")[0]) for tar in found]
    return tars


def _beside(tar) -> dict[str, dict]:
    """Metadata by key from `manifest.jsonl` in the tar's folder."""
    file = tar.parent / "manifest.jsonl"
    if not file.exists():
        return {}
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        return {row["key"]: row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not one JSON object with a key a line ({error})") from error


def _groups(path) -> Iterator[tuple[str, dict[str, bytes] | Skipped]]:
    """Neighbouring members of one key: extension to content."""
    _check_end(path)
    current, parts = None, {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}" if folder.strip("./") else stem
                if not member.isfile() or not stem:
                    continue
                if key != current:
                    if parts:
                        yield current, parts
                    current, parts = key, {}
                if member.size > MAX_MEMBER:
                    yield key, Skipped(key, f"{base} has {member.size} bytes, more than {MAX_MEMBER}")
                    current, parts = None, {}
                else:
                    parts[extension.lower()] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{path} is not a whole tar file ({error}); copy it again") from error
    if parts:
        yield current, parts


def _check_end(path) -> None:
    """Refuses a tar without its end: Python takes one that is cut at a header for a shorter tar."""
    if path.suffix == ".tar":
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 512))
            if size < 1024 or size % 512 or file.read(512).strip(b"\0"):
                raise InputError(f"{path} is not a whole tar file (its end is missing); copy it again")


def _record(key, parts, beside, source, caption_fields, extra) -> SourceRecord | Skipped:
    images = [parts[e] for e in IMAGES if e in parts]
    if not images:
        return Skipped(key, "has no picture (.jpg, .jpeg or .png) beside it in the tar")
    fields = dict(beside or {})
    try:
        if "json" in parts:
            fields = json.loads(parts["json"])
            if not isinstance(fields, dict):
                return Skipped(key, "its .json is not an object")
        elif "txt" in parts:
            fields["caption"] = parts["txt"].decode()
    except ValueError:
        return Skipped(key, "its .json or .txt cannot be read")
    stated = fields.get("jpg_sha256")
    if stated and "jpg" in parts and hashlib.sha256(parts["jpg"]).hexdigest() != stated:
        return Skipped(key, "its picture does not have the SHA-256 that its metadata states")
    return from_fields(fields, key=key, image=images[0], source=source, caption_fields=caption_fields, extra=extra)
