"""Where pairs come from. A source is a module with two functions, found by name or by dotted path.

    records(inputs: Sequence[str], **options) -> Iterator[SourceRecord | Skipped]
    classes(inputs: Sequence[str], **options) -> dict[str, list[str]]      # optional: class names of labelled sets

`inputs` are the paths that the user gave (empty for a source that makes its pairs itself), `options` are keyword
arguments with defaults. Both must give the same, in the same order, every time. A record that cannot be used is not
dropped: the source yields `Skipped`, which ingest counts and reports. Only the fields below reach the disk; metadata
of a patient (age, sex, history) goes no further than the source unless the user names it.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmkd_jax import registry
from mmkd_jax.errors import InputError, near

TABLE = {name: f"mmkd_jax.data.sources.{name}" for name in ("webdataset", "jsonl", "sample", "mmkd_release")}


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """One picture with its texts, as the source has it.

    Attributes:
      key: the source's own key, unique within `source`; with `source` it makes the pair's id.
      image: the encoded picture (JPEG or PNG bytes).
      captions: the texts; none at all only where the set is used without text.
      source: short name of the set (`busi`); splits become the row indices `<source>.<split>`.
      split: `train`, `val`, `test`, ...
      modality: `ct`, `mri`, `xray`, ...
      label: class name, "" where there is none; `label_id`: its index in the set's class list, or -1.
      group: what must not be divided between splits (patient, case); only compared, and stored as a hash.
      license: of this picture; article: what to cite; extra: further JSON-like fields that the user asked for.
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    source: str
    split: str = "train"
    modality: str = "unknown"
    label: str = ""
    label_id: int = -1
    group: str = ""
    license: str = ""
    article: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that the source had to leave out: its key and why."""

    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A source with its inputs and options, ready to be read. Make it with `open_source`."""

    name: str
    module: Any
    inputs: tuple[str, ...]
    options: dict[str, Any]

    def records(self) -> Iterator[SourceRecord | Skipped]:
        """The records, from the start."""
        return self.module.records(self.inputs, **self.options)

    def classes(self) -> dict[str, list[str]]:
        """Class names by set, {} if the source has none."""
        make = getattr(self.module, "classes", None)
        return make(self.inputs, **self.options) if make else {}


def open_source(name: str, inputs: Sequence[str] = (), /, **options: Any) -> Source:
    """The source of that name or dotted path.

    Raises:
      InputError: there is none, or it does not take one of the options.
    """
    module = registry.resolve(name, TABLE, "source")
    if not callable(getattr(module, "records", None)):
        raise InputError(f"source {name!r} has no function records(inputs, **options)")
    known = list(inspect.signature(module.records).parameters)[1:]
    for option in options:
        if option not in known:
            raise InputError(f"source {name!r} has no option {option!r}; {near(option, known)}")
    return Source(name, module, tuple(str(i) for i in inputs), options)


def from_fields(
    fields: Mapping[str, Any],
    *,
    key: str,
    image: bytes,
    source: str,
    caption_fields: Sequence[str] = ("caption", "captions"),
    extra: Sequence[str] = ("caption_source",),
) -> SourceRecord | Skipped:
    """A record from JSON-like metadata with the usual names.

    Read are `caption`/`captions` (text or list), `set`, `split`, `modality`, `label`, `label_id`, `group`, `license`,
    and what to cite: the first of `article`, `doi`, `url`, `source`. Everything else stays behind unless `extra`
    names it.

    Args:
      fields: the metadata.
      key: the record's key.
      image: encoded picture.
      source: name of the set where the metadata has no `set`.
      caption_fields: fields that hold texts, in order.
      extra: fields to keep as they are.
    """
    captions: list[str] = []
    for name in caption_fields:
        value = fields.get(name) or []
        captions += [value] if isinstance(value, str) else value
    try:
        label_id = int(fields.get("label_id", -1))
        captions = [text.strip() for text in captions if text.strip()]
    except (TypeError, ValueError, AttributeError):
        return Skipped(key, "its label_id is not a number or its captions are not text")
    return SourceRecord(
        key=key,
        image=image,
        captions=tuple(captions),
        source=str(fields.get("set") or source),
        label_id=label_id,
        article=str(next((fields[n] for n in ("article", "doi", "url", "source") if fields.get(n)), "")),
        extra={name: fields[name] for name in extra if name in fields},
        **{n: str(fields[n]) for n in ("split", "modality", "label", "group", "license") if fields.get(n) is not None},
    )
