"""Where pairs come from. A source is a module with two functions, found by name or by dotted path.

    records(inputs: Sequence[str], **options) -> Iterator[SourceRecord | Skipped]
    classes(inputs: Sequence[str], **options) -> dict[str, list[str] | dict[str, str]]      # optional: labelled sets'

Class lists are as `mmkd_jax.data.labels` takes them. `inputs` are the paths that the user gave (empty for a source that
makes its pairs itself), `options` are keyword arguments with defaults. Both must give the same, in the same order,
every time. A record that cannot be used is not dropped: the source yields `Skipped`, which ingest counts and reports.
Only the fields below reach the disk; metadata of a patient (age, sex, history) goes no further than the source unless
the user names it.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmkd_jax import registry
from mmkd_jax.data import splits
from mmkd_jax.data.labels import Classes
from mmkd_jax.errors import InputError, near

_NAMES = ("webdataset", "jsonl", "csv", "folders", "named", "parquet", "medmnist", "tfds", "sample", "mmkd_release")
TABLE = {name: f"mmkd_jax.data.sources.{name}" for name in _NAMES}


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """One picture with its texts, as the source has it.

    Attributes:
      key: the source's own key, unique within `source`; with `source` it makes the pair's id.
      image: the encoded picture (JPEG or PNG bytes).
      captions: the texts; a picture with a class or findings may go without.
      source: short name of the set (`busi`); splits become the row indices `<source>.<split>`.
      split: `train`, `val`, `test`, ...
      modality: `ct`, `mri`, `xray`, ...
      label: class name or another word for it, "" where there is none; `label_id`: its index in the set's class list,
        or -1 if the label says it all.
      findings: where several classes may be there at once, see `Classes.several`; None where one is.
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
    findings: Sequence[str] | Mapping[str, int] | None = None
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
class About:
    """What is known of a set beside what its files say.

    Attributes:
      name: short name, for all records; "" leaves the source's.
      modality, license, article: of the records that do not say.
      classes: the class list, instead of the source's.
      prompts: wording of its classes, a record of `mmkd_jax.evals.prompts.from_record`.
      split: fractions by split, where ours is wanted instead of the source's, see `mmkd_jax.data.splits`.
    """

    name: str = ""
    modality: str = ""
    license: str = ""
    article: str = ""
    classes: Classes | None = None
    prompts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    split: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def told_of(self, record: SourceRecord) -> SourceRecord:
        """The record with what it does not say itself."""
        known = {n: getattr(self, n) for n in ("license", "article") if not getattr(record, n)}
        if record.modality in ("", "unknown") and self.modality:
            known["modality"] = self.modality
        if self.name:
            known["source"] = self.name
        return dataclasses.replace(record, **known)


@dataclasses.dataclass(frozen=True)
class Source:
    """A source with its inputs and options, ready to be read. Make it with `open_source`."""

    name: str
    module: Any
    inputs: tuple[str, ...]
    options: dict[str, Any]
    about: About = About()

    def records(self) -> Iterator[SourceRecord | Skipped]:
        """The records, from the start."""
        for record in self.module.records(self.inputs, **self.options):
            yield self.about.told_of(record) if isinstance(record, SourceRecord) else record

    def classes(self) -> dict[str, Classes]:
        """Class lists by set, {} if the source has none."""
        if self.about.classes is not None and self.about.name:
            return {self.about.name: self.about.classes}
        make = getattr(self.module, "classes", None)
        found = make(self.inputs, **self.options) if make else {}
        if self.about.name and len(found) == 1:
            found = {self.about.name: next(iter(found.values()))}
        return {name: Classes.of(given, f"classes of {name}") for name, given in found.items()}


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

    Read are `caption`/`captions` (text or list), `set`, `split`, `modality`, `label`, `label_id`, `findings` (list, or
    object with a number each), `group`, `license`, and what to cite: the first of `article`, `doi`, `url`, `source`.
    Everything else stays behind unless `extra` names it.

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
    known = {n: str(fields[n]) for n in ("split", "modality", "label", "group", "license") if fields.get(n) is not None}
    if "split" in known:
        known["split"] = splits.plain(known["split"])
    return SourceRecord(
        key=key,
        image=image,
        captions=tuple(captions),
        source=str(fields.get("set") or source),
        label_id=label_id,
        findings=fields.get("findings"),
        article=str(next((fields[n] for n in ("article", "doi", "url", "source") if fields.get(n)), "")),
        extra={name: fields[name] for name in extra if name in fields},
        **known,
    )
