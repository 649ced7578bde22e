"""A tiny set in the layout of each record of the registry, with made-up pictures, questions, patients and slides."""

import csv
import functools
import json
import pathlib
import re

import data_fixtures as toy
import numpy as np
import set_layouts

from mmkd_jax.data import example, tfrecord
from mmkd_jax.evals.sets import SetRecord

# How published sets name their pictures, where their record relies on it.
NAMES = {
    "kermany_oct": "CNV-{0}-1.jpeg", "breakhis": "SOB_B_A-14-{0}AB-40-001.png", "limuc": "UC_patient_{0}_1.bmp",
    "kvasir_capsule": "{0:016d}_1.jpg", "bladder": "case_{0}_pt_001_frame_0009.png",
    "unimed_pcam": "{0}_{word}.png", "fives": "Original/{0}_{word}.png", "acrima": "Im{0}_{word}.jpg",
    "shenzhen_tb": "CHNCXR_{0}_{word}.png",
}  # fmt: skip
# Files that come with a set and that its record leaves out.
SKIPPED = {
    "unimed_lc25000_lung": "colon_aca/1.jpeg", "unimed_lc25000_colon": "lung_n/1.jpeg", "unimed_nck_crc": "BACK/1.tif",
    "kvasir_capsule": "Polyp/1.jpg", "br35h": "pred/1.jpg", "busi_full": "benign/benign (1)_mask.png",
    "lag": "non_glaucoma/attention_map/1.jpg",
}  # fmt: skip
SLIDES = {
    "camelyon16": "training/{word}/{word}_{0}.tif", "bracs_wsi": "BRACS_WSI/{split}/{word}/Type_X/BRACS_{0}.svs"
}  # fmt: skip
TABLES = {
    "data": ["data/train-0.parquet", "data/test-0.parquet"],
    "QA_information/Open-access": ["QA_information/Open-access/a.json"],
}  # folders of tables
picture = functools.cache(functools.partial(toy.picture, width=6, height=6))


def write(one: SetRecord, root: pathlib.Path) -> None:
    """The set of a record: at least three pictures (patients, slides) of each class and split."""
    globals()[f"_{one.layout['source']}"](one, root)


def words(one: SetRecord) -> list[str]:
    """What the files say for the classes, without words for none of them."""
    known = one.classes.words or {name: name for name in one.classes.names}
    return [word for word, name in known.items() if name]


def put(path: pathlib.Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))


def table(path: pathlib.Path, rows: list[dict], separator: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def _medmnist(one: SetRecord, root: pathlib.Path) -> None:
    arrays, number, classes = {}, 0, len(one.classes.names)
    for split in ("train", "val", "test"):
        n = 3 * classes
        arrays[f"{split}_images"] = np.stack([set_layouts.pixels(picture(number + i)) for i in range(n)])
        labels = np.arange(n)[:, None] % classes
        arrays[f"{split}_labels"] = np.eye(classes, dtype=int)[labels[:, 0]] if one.task == "multilabel" else labels
        number += n
    np.savez(root / one.layout["input"].replace("*", "_28"), **arrays)


def _webdataset(one: SetRecord, root: pathlib.Path) -> None:
    members, number = [], 0
    for split in ("train", "val" if one.task == "retrieval" else "test"):
        for label, word in [*enumerate(words(one) if one.classes else "abc")] * 3:
            meta = {"split": split, "group": f"g{number}"}
            if one.task == "classification":
                meta |= {"label": word, "label_id": label}
            elif one.task == "retrieval":
                meta["caption"] = f"caption {number}"
            else:
                meta["qa"] = [{"qid": 0, "question": "Is it?", "answer": "yes", "answer_type": "closed"},
                              {"qid": 1, "question": "What is it?", "answer": word, "answer_type": "open"}]  # fmt: skip
            members += [(f"{number}.png", picture(number)), (f"{number}.json", json.dumps(meta).encode())]
            number += 1
    toy.make_tar(root / "set.tar", members)


def _tfds(one: SetRecord, root: pathlib.Path) -> None:
    folder, info, number = root / "2.0.0", [], 0
    folder.mkdir()
    for split in ("train", "validation", "test"):
        records = []
        for label in [*range(len(one.classes.names))] * 3:
            records.append(tfrecord.frame(example.encode({"image": picture(number), "label": label})))
            number += 1
        (folder / f"{one.name}-{split}.tfrecord-00000-of-00001").write_bytes(b"".join(records))
        info.append({"name": split, "shardLengths": [str(len(records))]})
    told = {"name": one.name, "fileFormat": "tfrecord", "splits": info}
    (folder / "dataset_info.json").write_text(json.dumps(told))
    (folder / "label.labels.txt").write_text("\n".join(words(one)) + "\n")


def _folders(one: SetRecord, root: pathlib.Path) -> None:
    number = 1000
    for split in ("",) if one.split else ("train", "test", *{"val"} & set(one.about.get("size", ()))):
        for word in words(one) * 3:
            number += 1
            put(_folder_of(one.layout, root, split, word) / NAMES.get(one.name, "{0}.png").format(number), number)
    if one.name in SKIPPED:  # must not be looked at
        path = root / one.layout.get("input", "") / SKIPPED[one.name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no picture")


def _folder_of(layout, root: pathlib.Path, split: str, word: str) -> pathlib.Path:
    given = layout.get("input", "")
    if "named" in layout:
        return root / next(f for f, s in layout["named"].items() if s == split) / word
    if isinstance(given, list):
        return root / next(f for f in given if f.split("_")[0] == word.split("_")[0]) / word
    return root / given / split / word


def _named(one: SetRecord, root: pathlib.Path) -> None:
    number = 1000
    for split in ("train", "test") if "split" in one.layout else ("",):
        for word in words(one) * 3:
            number += 1
            put(root / one.layout.get("input", "") / split / NAMES[one.name].format(number, word=word), number)


def _columns(pattern: str) -> list[str]:
    return re.findall(r"{(.*?)}", pattern) if "{" in pattern else [pattern]


def _place(folder: pathlib.Path, pattern: str, row: dict) -> pathlib.Path:
    """Where a row's picture belongs."""
    parts = re.split(r"{(.*?)}", pattern)
    return folder / "".join(part if k % 2 == 0 else _value(row, part) for k, part in enumerate(parts))


def _value(row: dict, column: str) -> str:
    return str(row[column]) if column in row else pathlib.Path(row[column.removesuffix(".stem")]).stem


def _csv(one: SetRecord, root: pathlib.Path) -> None:
    layout, columns = one.layout, one.layout.get("columns", {})
    captions = layout.get("caption_fields", ["caption"] if one.task == "retrieval" else [])
    shown = layout.get("findings", layout.get("one_of", ()))
    asked = [*_columns(layout["image"]), *columns.values(), *shown, *captions]
    header = [f"#{k}" for k in range(max([int(c[1:]) + 1 for c in asked if c.startswith("#")], default=0))]
    header += [column for column in dict.fromkeys(asked) if not column.startswith("#")]
    pattern = layout["image"] if "{" in layout["image"] else "{" + layout["image"] + "}"
    path, rows, number = root / layout["input"], [], 0
    many = 20 if one.split.get("test", 1) < 1 and one.task == "multilabel" else 3  # those splits know no classes
    for split in ("train", "test") if "split" in columns else ("test",):
        for word in (words(one) if one.classes else ["a", "b"]) * many:
            number += 1
            told = {"label": word, "split": split, "findings": word}
            row = dict.fromkeys(header, f"f{number}.png")
            row |= {theirs: told[ours] for ours, theirs in columns.items() if ours in told}
            row |= {finding: float(finding == word) for finding in shown}
            rows.append(row | dict.fromkeys(captions, f"caption {number}"))
            put(_place(path.parent, pattern, row), number)
    numbered = [{f"column {k}" if c.startswith("#") else c: row[c] for k, c in enumerate(header)} for row in rows]
    table(path, numbered)


def _jsonl(one: SetRecord, root: pathlib.Path) -> None:
    for number in range(6):
        put(root / f"{number}.jpg", number)
    lines = [json.dumps({"image": f"{number}.jpg", "caption": f"caption {number}"}) for number in range(6)]
    (root / one.layout["input"]).write_text("\n".join(lines))


def _questions(one: SetRecord, root: pathlib.Path) -> None:
    layout, start = one.layout, 0
    given = layout["input"] if isinstance(layout["input"], list) else [layout["input"]]
    for path in [file for name in given for file in TABLES.get(name, [name])]:
        rows = []
        for number in range(start, start + 6):
            row = _question(layout, number)
            if path.endswith(".parquet"):
                row |= {layout["image"]: {"bytes": picture(number), "path": None}}
            else:
                pattern = layout["image"] if "{" in layout["image"] else "{" + layout["image"] + "}"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                put(_place((root / path).parent, pattern, row), number)
            rows += [row, row | {layout.get("columns", {}).get("question", "question"): "Where is it?"}]
        start += 6
        _write(root / path, rows)


def _question(layout, number: int) -> dict:
    """A row with every column that the layout names."""
    columns = layout.get("columns", {})
    row = dict.fromkeys((*_columns(layout["image"]), columns.get("image_id", "image")), f"f{number}.png")
    told = {"question": "Is it?", "answer": "yes" if number % 2 else "a mass"}
    told |= {"answer_type": "CLOSED" if number % 2 else "OPEN", "split": "test_para" if number % 3 else "freeform"}
    row |= {columns.get(ours, ours): value for ours, value in told.items() if ours in (*columns, "question", "answer")}
    return row | {option: f"choice {option}" for option in layout.get("options", ())} | layout.get("where", {})


def _write(path: pathlib.Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        table(path, rows)


def _patients(one: SetRecord, root: pathlib.Path) -> None:
    layout, rows = one.layout, []
    events = list(layout.get("events", {"1": 1, "0": 0}))
    for number in range(12):
        told = {"patient": f"p{number}", "time": 1.0 + number, "event": events[number % 2], "site": f"s{number % 3}",
                "fold": str(number % 3)}  # fmt: skip
        row = {theirs: told[ours] for ours, theirs in layout["columns"].items()} | layout.get("where", {})
        for name, levels in layout["covariates"].items():
            row[name] = levels[number % len(levels)] if levels else 40 + number
        slides = [column.removesuffix(".stem") for column in re.findall(r"{(.*?)}", layout.get("bag", ""))]
        rows.append(dict.fromkeys(slides, f"x{number}.svs") | row)
        if slides:
            path = _place(root, layout["bag"], rows[-1])
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.zeros((2, 3), np.float32))
    other = dict.fromkeys(layout.get("where", {}), "another")
    table(root / layout["input"], [*rows, *([rows[0] | other] if other else [])])


def _slides(one: SetRecord, root: pathlib.Path) -> None:
    layout, rows, number = one.layout, [], 0
    for split in ("train", "test"):
        for word in words(one) * 3:
            number += 1
            if "files" in layout:
                put(root / SLIDES[one.name].format(number, word=word, split=split), number)
                continue
            told = {"slide": f"patient_{number:03d}_node_0.tif", "label": word, "patient": f"p{number}"}
            row = {theirs: told[ours] for ours, theirs in layout["columns"].items()} | layout.get("where", {})
            put(_place(root, layout["bag"], row), number)
            rows.append(row)
    if rows:
        table(root / layout["input"], rows)
