"""Where pairs come from. A source is a module with two functions, found by name or by dotted path.

    records(inputs: Sequence[str], **options) -> Iterator[SourceRecord | Skipped]
    classes(inputs: Sequence[str], **options) -> dict[str, list[str]]      # optional: class names of labelled sets

`inputs` are the paths that the user gave (empty for a source that makes its pairs itself), `options` are keyword
arguments with defaults. Both must give the same, in the same order, every time. A record that cannot be used is not
dropped: the source yields `Skipped`, which ingest counts and reports. Only the fields below reach the disk; metadata
of a patient (age, sex, history) goes no further than the source unless the user names it.
"""

import dataclasses
from typing import Any

TABLE = {name: f"mmkd_jax.data.sources.{name}" for name in ("webdataset", "jsonl", "sample")}


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
