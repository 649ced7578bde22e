"""One tiny labelled set written in every layout that sources read: the same pictures, labels, splits and patients."""

import csv
import io
import json
import pathlib

import data_fixtures as toy
import numpy as np
from PIL import Image

from mmkd_jax.data import example, tfrecord

CLASSES = ("benign mass", "malignant mass", "normal")
SPLITS = ("train", "train", "val", "test")
N = 24


def rows(n: int = N) -> list[dict]:
    """Number, picture, label, split and patient of each case; a patient has two pictures of one split."""
    cases = []
    for number in range(n):
        patient = number // 2
        cases.append(
            {
                "number": number,
                "image": toy.picture(number, 12, 10),
                "label": CLASSES[number % 3],
                "label_id": number % 3,
                "split": SPLITS[patient % 4],
                "patient": f"p{patient:02d}",
            }
        )
    return cases


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def folders(root: pathlib.Path) -> dict:
    for case in rows():
        file = root / case["split"] / case["label"] / case["patient"] / f"{case['number']:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(case["image"])
    (root / "train" / "normal" / "Thumbs.db").write_bytes(b"no picture")
    return {"source": "folders", "group": r"(p\d+)/"}


def _files(root: pathlib.Path) -> list[dict]:
    (root / "images").mkdir(parents=True)
    for case in rows():
        (root / "images" / f"{case['number']:02d}.png").write_bytes(case["image"])
    return [{**case, "image": f"images/{case['number']:02d}.png", "id": f"{case['number']:02d}"} for case in rows()]


def csv_file(root: pathlib.Path) -> dict:
    with (root / "labels.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "dx", "fold", "patient", "note, with comma"])
        for case in _files(root):
            writer.writerow([case["id"], case["label"], case["split"].title(), case["patient"], 'a "note", long'])
    columns = {"label": "dx", "split": "fold", "group": "patient"}
    return {"source": "csv", "input": "labels.csv", "image": "images/{id}.png", "columns": columns}


def jsonl(root: pathlib.Path) -> dict:
    fields = ("image", "label", "split", "patient")
    lines = [json.dumps({name: case[name] for name in fields}) for case in _files(root)]
    (root / "labels.jsonl").write_text("\n".join(lines))
    return {"source": "jsonl", "input": "labels.jsonl", "columns": {"group": "patient"}}


def webdataset(root: pathlib.Path) -> dict:
    members = []
    for case in rows():
        meta = {name: case[name] for name in ("label", "label_id", "split")} | {"group": case["patient"]}
        members += [(f"{case['number']:02d}.png", case["image"])]
        members += [(f"{case['number']:02d}.json", json.dumps(meta).encode())]
    toy.make_tar(root / "set.tar", members)
    return {"source": "webdataset", "input": "set.tar"}


def parquet(root: pathlib.Path) -> dict:
    import pyarrow
    import pyarrow.parquet

    names = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": names}})}
    for split, stem in (("train", "train"), ("val", "validation"), ("test", "test")):
        cases = [case for case in rows() if case["split"] == split]
        table = pyarrow.table(
            {
                "image": [{"bytes": case["image"], "path": None} for case in cases],
                "label": [case["label_id"] for case in cases],
                "patient": [case["patient"] for case in cases],
            }
        )
        (root / "data").mkdir(exist_ok=True)
        file = root / "data" / f"{stem}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), file)
    return {"source": "parquet", "columns": {"group": "patient"}}


def medmnist(root: pathlib.Path, file: str = "set.npz") -> dict:
    arrays = {}
    for split in ("train", "val", "test"):
        cases = [case for case in rows() if case["split"] == split]
        arrays[f"{split}_images"] = np.stack([pixels(case["image"]) for case in cases])
        arrays[f"{split}_labels"] = np.array([[case["label_id"]] for case in cases], np.uint8)
    np.savez_compressed(root / file, **arrays)
    return {"source": "medmnist", "input": file}


def tfds(root: pathlib.Path, kind: str = "tfrecord") -> dict:
    folder, info = root / "toy_set" / "1.0.0", []
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        cases = [case for case in rows() if case["split"] == {"validation": "val"}.get(split, split)]
        examples = [
            example.encode({"image": case["image"], "label": case["label_id"], "patient": case["patient"]})
            for case in cases
        ]
        parts = [examples[: len(examples) // 2], examples[len(examples) // 2 :]]
        for number, part in enumerate(parts):
            _shard(folder / f"toy_set-{split}.{kind}-{number:05d}-of-00002", part, kind)
        info.append({"name": split, "shardLengths": [str(len(part)) for part in parts]})
    (folder / "dataset_info.json").write_text(json.dumps({"name": "toy_set", "fileFormat": kind, "splits": info}))
    (folder / "label.labels.txt").write_text("\n".join(CLASSES) + "\n")
    return {"source": "tfds", "columns": {"group": "patient"}}


def array_record(root: pathlib.Path) -> dict:
    return tfds(root, "array_record")


def _shard(path: pathlib.Path, examples: list[bytes], kind: str) -> None:
    if kind == "tfrecord":
        path.write_bytes(b"".join(map(tfrecord.frame, examples)))
        return
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for data in examples:
        writer.write(data)
    writer.close()


LAYOUTS = {
    "folders": folders, "csv": csv_file, "jsonl": jsonl, "webdataset": webdataset, "parquet": parquet,
    "medmnist": medmnist, "tfds": tfds, "array_record": array_record,
}  # fmt: skip


def describe(root: pathlib.Path, layout: str, **fields) -> pathlib.Path:
    """The set in one layout below `root`, with its `set.json`; returns `root`."""
    root.mkdir(parents=True)
    record = {"name": "toy", "layout": LAYOUTS[layout](root), "modality": "ultrasound", "classes": list(CLASSES)}
    (root / "set.json").write_text(json.dumps({**record, **fields}))
    return root
