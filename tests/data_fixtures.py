"""Tiny synthetic sets for the tests of the input: made anew in a folder, the same every time."""

import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image

from mmkd_jax.batch import TextBatch
from mmkd_jax.data.features import FeatureSet, FeatureWriter
from mmkd_jax.data.pairs import Pair, PairsSet, PairsWriter, pair_id
from mmkd_jax.data.views import ViewPolicy

MODALITIES = ("xray", "ct", "mri")
POLICY = ViewPolicy(scale=(0.5, 1.0), seed=3)


def picture(seed: int, width: int = 20, height: int = 16, codec: str = "png", mode: str = "RGB", **save) -> bytes:
    """An encoded picture of smooth random colour."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    buffer = io.BytesIO()
    coarse.convert(mode).save(buffer, codec, **save)
    return buffer.getvalue()


def pair(row: int, captions: int | None = None) -> Pair:
    """Pair number `row`: one to three captions, three modalities, two sources, groups of two."""
    count = 1 + row % 3 if captions is None else captions
    return Pair(
        id=pair_id("toy", str(row)),
        image=picture(row),
        captions=[f"row {row}, é, caption {c}" for c in range(count)],
        modality=MODALITIES[row % 3],
        label=("cat", "dog")[row % 2],
        label_id=row % 2,
        group=f"g{row // 2}",
        source=("toy", "other")[row % 5 == 0],
        license="CC0",
        article="doi:1",
        extra={"row": row},
        media={"kind": "image", "codec": "png", "width": 20, "height": 16, "spacing": [0.5, 0.5]},
    )


def make_pairs(path: pathlib.Path, n: int = 40, shards: int = 3, **finish) -> PairsSet:
    """A set of `n` pairs; its first three quarters are `train`."""
    finish = {"rows": {"train": list(range(3 * n // 4)), "test": list(range(3 * n // 4, n))}, **finish}
    with PairsWriter(path, "toy", shards=shards) as writer:
        for row in range(n):
            writer.add(pair(row))
        return writer.finish(classes={"toy": ["cat", "dog"]}, **finish)


def vectors(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Unit vectors float32 `[n, *shape]` around a common direction."""
    x = np.random.default_rng(seed).normal(size=(n, *shape)) + 0.5
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def absent(n: int) -> np.ndarray:
    """Which rows have no features."""
    return np.arange(n) % 7 == 3


def feature_values(pairs: PairsSet, width: int, views: int, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Image features `[rows, views, width]` and text features `[captions, width]` of each row."""
    n = len(pairs)
    texts = vectors(int(pairs.table["captions"].sum()), width, seed=seed + 1)
    return vectors(n, views, width, seed=seed), np.split(texts, np.cumsum(pairs.table["captions"])[:-1])


def feature_writer(path: pathlib.Path, pairs: PairsSet, **changes) -> FeatureWriter:
    """A writer of features 6 wide, two views, blocks of 8 rows, three shards."""
    arguments = {"teacher": "t", "width": 6, "views": 2, "policy": POLICY, "block": 8, "shards": 3}
    made_of = {"license": "CC0", "weights_hash": "w", "preprocess_hash": "p", "backend": "torch 9.9"}
    return FeatureWriter(path, pairs, **{**arguments, **made_of, **changes})


def write_shard(writer: FeatureWriter, shard: int, seed: int = 0) -> None:
    """One shard of the usual values."""
    image, text = feature_values(writer.pairs, writer.width, writer.views, seed)
    rows = writer.rows(shard)
    here = slice(rows.start, rows.stop)
    writer.write_shard(shard, ~absent(len(writer.pairs))[here], image[here], text[here])


def make_features(path: pathlib.Path, pairs: PairsSet, seed: int = 0, **changes) -> FeatureSet:
    """A finished feature set."""
    writer = feature_writer(path, pairs, **changes)
    for shard in writer.pending():
        write_shard(writer, shard, seed)
    writer.finish()
    return FeatureSet.open(path, pairs)


def make_tar(path: pathlib.Path, members: list[tuple[str, bytes]]) -> pathlib.Path:
    """A tar with these members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def webdataset(folder: pathlib.Path, n: int = 12, **fields) -> pathlib.Path:
    """A WebDataset folder with `n` labelled pictures, classes.json beside; returns the folder."""
    members = []
    for row in range(n):
        meta = {
            "caption": f"a picture of {row}",
            "modality": MODALITIES[row % 3],
            "label": ("cat", "dog")[row % 2],
            "label_id": row % 2,
            "split": "test" if row % 4 == 3 else "train",
            "group": f"patient {row // 2}",
            "set": folder.name,
            "age": "89",
            "case_history": "secret",
            "source": "somewhere",
            "license": "CC0",
            **fields,
        }
        members += [(f"k{row:03d}.jpg", picture(row, codec="jpeg")), (f"k{row:03d}.json", json.dumps(meta).encode())]
    make_tar(folder / f"{folder.name}.tar", members)
    (folder / "classes.json").write_text(json.dumps(["cat", "dog"]))
    return folder


class CharTokenizer:
    """One token a character, context 24, vocabulary 128; counts what it is asked for."""

    context, vocab_size = 24, 128

    def __init__(self):
        self.calls = 0

    def __call__(self, texts) -> TextBatch:
        self.calls += len(texts)
        ids = np.zeros((len(texts), self.context), np.int32)
        for row, text in enumerate(texts):
            codes = [min(ord(c), 127) for c in text[-self.context :]]
            ids[row, : len(codes)] = codes
        mask = (ids > 0).astype(np.int32)
        return TextBatch(ids, mask, np.broadcast_to(np.arange(self.context, dtype=np.int32), ids.shape).copy(), mask)
