"""One image-text pair, in memory and as a `tf.train.Example`, and what tensorflow_datasets needs to read it."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from mmkd_jax import io
from mmkd_jax.data import example

VERSION = "1.0.0"  # of the record's schema, as tensorflow_datasets counts


def pair_id(source: str, key: str) -> str:
    """Id of a pair: 32 hex digits of SHA-256 over the source's name and the source's own key."""
    return hashlib.sha256(f"{source}\0{key}".encode()).hexdigest()[:32]


@dataclasses.dataclass
class Pair:
    """A picture with its texts.

    Attributes:
      id: 32 hex digits, see `pair_id`.
      image: encoded picture.
      captions: its texts.
      modality: `ct`, `mri`, `xray`, ...
      label: class name or ""; label_id: its index in the classes of `source`, or -1.
      group: what must not be divided between splits; only compared.
      source: short name of the set that it comes from.
      license: of this picture; article: what to cite.
      extra: further JSON-like fields.
      media: `kind` (`image`), `codec` (`jpeg`, `png`), `width`, `height` in px, `spacing` (mm, [] if not known).
    """

    id: str
    image: bytes
    captions: list[str]
    modality: str = "unknown"
    label: str = ""
    label_id: int = -1
    group: str = ""
    source: str = ""
    license: str = ""
    article: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    media: dict[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "image", "codec": "jpeg"})


_TEXTS = ("id", "modality", "label", "group", "source", "license", "article")


def to_record(pair: Pair) -> bytes:
    """Serialises a pair; the bytes depend on its content alone."""
    media = pair.media
    return example.encode(
        {
            **{name: getattr(pair, name) for name in _TEXTS},
            "image": pair.image,
            "captions": list(pair.captions),
            "label_id": int(pair.label_id),
            "extra": json.dumps(pair.extra, sort_keys=True, ensure_ascii=False),
            "media/kind": media.get("kind", "image"),
            "media/codec": media.get("codec", ""),
            "media/width": int(media.get("width", 0)),
            "media/height": int(media.get("height", 0)),
            "media/spacing": np.asarray(media.get("spacing", ()), np.float32),
        }
    )


def from_record(data: bytes) -> Pair:
    """The pair of a record.

    Raises:
      ValueError, KeyError: the bytes are another message.
    """
    f = example.decode(data)
    return Pair(
        **{name: f[name][0].decode() for name in _TEXTS},
        image=f["image"][0],
        captions=[c.decode() for c in f["captions"]],
        label_id=f["label_id"][0],
        extra=json.loads(f["extra"][0]),
        media={
            "kind": f["media/kind"][0].decode(),
            "codec": f["media/codec"][0].decode(),
            "width": f["media/width"][0],
            "height": f["media/height"][0],
            "spacing": list(f["media/spacing"]),
        },
    )


def shard_name(name: str, shard: int, shards: int) -> str:
    """File name of a shard as tensorflow_datasets expects it."""
    return f"{name}-train.tfrecord-{shard:05d}-of-{shards:05d}"


def write_tfds_metadata(path, name: str, shards: list[dict[str, Any]], description: str) -> None:
    """Writes `features.json` and `dataset_info.json`, so that `tfds.builder_from_directory(path)` opens the set.

    All rows are tensorflow_datasets' split `train`; which of them are for training is said by row indices.

    Args:
      path: the set's folder.
      name: of the data set.
      shards: records with `rows` and `bytes`, in order.
      description: of the data set.
    """
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    features = tfds.features.FeaturesDict(
        {
            **dict.fromkeys((*_TEXTS, "extra"), text),
            "image": tfds.features.Image(shape=(None, None, None)),
            "captions": tfds.features.Sequence(text),
            "label_id": np.int64,
            "media": {
                "kind": text,
                "codec": text,
                "width": np.int64,
                "height": np.int64,
                "spacing": tfds.features.Sequence(np.float32),
            },
        }
    )
    from google.protobuf import json_format

    io.write_text(path / "features.json", json_format.MessageToJson(features.to_proto(), sort_keys=True) + "\n")
    info = {
        "name": name,
        "version": VERSION,
        "description": description,
        "fileFormat": "tfrecord",
        "splits": [
            {
                "name": "train",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(s["bytes"] for s in shards)),
                "shardLengths": [str(s["rows"]) for s in shards],
            }
        ],
    }
    io.write_json(path / "dataset_info.json", info)
