"""Data sets that TensorFlow Datasets prepared, read from their own files: neither TensorFlow nor a download is needed.

Layout (github.com/tensorflow/datasets): a folder NAME/[CONFIG/]VERSION with `dataset_info.json`, `features.json`,
`FEATURE.labels.txt`, and shards `NAME-SPLIT.tfrecord-00000-of-00004` or `.array_record-...` of `tf.train.Example`.
tfds' own random access (`tfds.data_source`) is not used: it takes array_record only and decodes each picture, whose
bytes are wanted here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.data import example, splits, tfrecord
from mmkd_jax.data.sources import Skipped, SourceRecord
from mmkd_jax.data.sources.tables import Columns, below
from mmkd_jax.errors import InputError, near


def records(
    inputs: Sequence[str],
    *,
    name: str = "",
    image: str = "image",
    columns: Mapping[str, str] | None = None,
    findings: Sequence[str] = (),
    separator: str = "|",
    caption_fields: Sequence[str] = ("caption", "captions"),
    extra: Sequence[str] = (),
) -> Iterator[SourceRecord | Skipped]:
    """Pairs split by split, in the order of the shards.

    Args:
      inputs: prepared folders (the version's), or ones above that hold a single one.
      name: of the set; by default the data set's.
      image: feature with the picture.
      columns, findings, separator, caption_fields, extra: see `tables.Columns`; nested features are `outer/inner`.

    Raises:
      InputError: nothing prepared there, shards missing or damaged, or no such feature.
    """
    meaning = Columns(columns or {}, findings, separator, caption_fields, extra)
    for folder in _folders(inputs):
        info, named = io.read_json(folder / "dataset_info.json"), _named(folder)
        for split in info["splits"]:
            for number, data in enumerate(_examples(folder, info, split)):
                key = f"{split['name']}-{number:06d}"
                try:
                    row = example.decode(data)
                except ValueError as error:
                    raise InputError(f"{folder}: {key} is damaged ({error}); prepare it again") from error
                if number == 0:
                    meaning.check(row, folder)
                    if image not in row:
                        raise InputError(f"{folder} has no feature {image!r} for the pictures; {near(image, row)}")
                held = row.pop(image)
                row = {"split": splits.plain(split["name"])} | _values(row, named, folder)
                shown = held[0] if len(held) == 1 and held[0] else Skipped(key, f"it has {len(held)} pictures")
                yield meaning.record(row, key, shown, name or info["name"])


def classes(
    inputs: Sequence[str], *, name: str = "", columns: Mapping[str, str] | None = None, **_: Any
) -> dict[str, list[str]]:
    """Class names of the feature that holds the label or the findings."""
    columns, found = columns or {}, {}
    label = columns.get("findings", columns.get("label", "label"))
    for folder in _folders(inputs):
        if label in (named := _named(folder)):
            found[name or io.read_json(folder / "dataset_info.json")["name"]] = named[label]
    return found


def _folders(inputs: Sequence[str]) -> list:
    if not inputs:
        raise InputError("tfds needs --input: folders that TensorFlow Datasets prepared (NAME/VERSION)")
    folders = []
    for path in map(io.as_path, inputs):
        found = [f for f in below(path) if f.name == "dataset_info.json"] if path.is_dir() else []
        if len(found) != 1:
            raise InputError(f"{path} holds {len(found)} prepared data sets; give the folder of one (NAME/VERSION)")
        info = io.read_json(found[0])
        if not isinstance(info, dict) or not info.get("splits") or "name" not in info:
            raise InputError(f"{found[0]} names no splits; prepare the data set again")
        folders.append(found[0].parent)
    return folders


def _named(folder) -> dict[str, list[str]]:
    """Class names by feature, from the files of labels."""
    end = ".labels.txt"
    files = sorted(folder.glob(f"*{end}"), key=str)
    return {f.name.removesuffix(end).replace("-", "/"): f.read_text().splitlines() for f in files}


def _examples(folder, info: Mapping[str, Any], split: Mapping[str, Any]) -> Iterator[bytes]:
    """Serialised examples of one split.

    Raises:
      InputError: another number of shards or of examples than stated, or a format that cannot be read.
    """
    kind = info.get("fileFormat", "tfrecord")
    readers = {"tfrecord": _tfrecord, "array_record": _array_record}
    if kind not in readers:
        raise InputError(f"{folder} is stored as {kind}; prepare it as array_record or tfrecord")
    lengths = [int(n) for n in split.get("shardLengths", [])]
    files = sorted(folder.glob(f"*-{split['name']}.{kind}-*-of-*[0-9]"), key=str)
    if len(files) != len(lengths):
        raise InputError(f"{folder}: split {split['name']} has {len(files)} of {len(lengths)} shards; copy it again")
    for file, length in zip(files, lengths):
        count = 0
        for data in readers[kind](file):
            count += 1
            yield data
        if count != length:
            raise InputError(f"{file} holds {count} examples, dataset_info.json says {length}; copy it again")


def _tfrecord(file) -> Iterator[bytes]:
    reader = tfrecord.RecordReader(file)
    yield from (reader.read(number) for number in range(len(reader)))
    reader.close()


def _array_record(file) -> Iterator[bytes]:
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(str(file))
        for number in range(reader.num_records()):
            yield reader.read([number])[0]
        reader.close()
    except (ValueError, RuntimeError, IndexError) as error:
        raise InputError(f"{file} is not a whole array_record file ({error}); copy it again") from error


def _values(row: Mapping[str, Sequence], named: Mapping[str, list[str]], folder) -> dict[str, Any]:
    """Values by feature: text, a number, or a list; numbers of classes as their names."""
    values = {}
    for feature, held in row.items():
        items = [one.decode(errors="replace") if isinstance(one, bytes) else one for one in held]
        if names := named.get(feature):
            if wrong := next((n for n in items if not -1 <= n < len(names)), None):
                raise InputError(f"{folder}: {wrong} is not the number of one of the {len(names)} classes of {feature}")
            items = [names[number] for number in items if number >= 0]
        values[feature] = items[0] if len(items) == 1 else items or None
    return values
