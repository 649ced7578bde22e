"""Layouts of labelled sets: every one gives the same set, and damage of every kind is one clear line."""

import csv
import io
import json
import pickle
import sys

import data_fixtures as toy
import numpy as np
import pytest
import set_layouts
from PIL import Image

from mmkd_jax.cli import main
from mmkd_jax.data import splits
from mmkd_jax.data.ingest import ingest
from mmkd_jax.data.labels import Classes
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.sources import Skipped, open_source
from mmkd_jax.errors import InputError
from mmkd_jax.evals import sets


def needs(layout):
    if layout == "parquet":
        pytest.importorskip("pyarrow", reason="needs the extra parquet")


def opened(root):
    return sets.open_set(sets.find("toy", str(root)), str(root))


def cases(records):
    """What is known of each picture, by its pixels."""
    return {set_layouts.pixels(r["image"]).tobytes(): (r["label"], r["split"], r["patient"]) for r in records}


@pytest.mark.parametrize("layout", set_layouts.LAYOUTS)
def test_every_layout_gives_the_same_set(layout, tmp_path):
    needs(layout)
    truth = cases(set_layouts.rows())
    assert len(truth) == set_layouts.N  # the pictures tell the cases apart
    pairs = ingest(opened(set_layouts.describe(tmp_path / "set", layout)), tmp_path / "pairs")
    assert pairs.classes == {"toy": list(set_layouts.CLASSES)}
    assert pairs.modalities == ["ultrasound"]
    found, groups = {}, {}
    for split in ("train", "val", "test"):
        for row in pairs.rows(f"toy.{split}").rows.tolist():
            pair = pairs.read(row)
            pixels = set_layouts.pixels(pair.image).tobytes()
            assert pair.label == set_layouts.CLASSES[pair.label_id]
            found[pixels] = (pair.label, split, truth[pixels][2])
            groups.setdefault(truth[pixels][2], set()).add(pair.group)
    assert found == truth
    if layout != "medmnist":  # which knows no patients
        assert all(len(of) == 1 for of in groups.values())
        assert len({group for of in groups.values() for group in of}) == set_layouts.N // 2
    pairs.verify()


def test_class_names_are_taken_from_the_files_without_a_list(tmp_path):
    for layout in ("folders", "csv", "jsonl", "parquet", "tfds"):
        needs(layout)
        root = set_layouts.describe(tmp_path / layout, layout)
        record = json.loads((root / "set.json").read_text())
        del record["classes"]
        (root / "set.json").write_text(json.dumps(record))
        assert opened(root).classes()["toy"].names == set_layouts.CLASSES, layout


def test_plain_folders_on_the_command_line(tmp_path, capsys):
    """No split, no description: splits are made, by patient."""
    for case in set_layouts.rows():
        file = tmp_path / "in" / case["label"] / f"{case['patient']}-{case['number']}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(set_layouts.pixels(case["image"])).save(file)
    line = ["ingest", "folders", "--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main([*line, "--option", r"group=(p\d+)-", "--split", "test=0.25", "val=0.25"]) == 0
    assert json.loads(capsys.readouterr().out)["indices"]["in.test"] >= 4
    pairs = PairsSet.open(tmp_path / "out")
    assert pairs.read(0).media["codec"] == "png"  # a bitmap, stored without loss
    pixels = {set_layouts.pixels(pairs.read(row).image).tobytes() for row in range(len(pairs))}
    assert pixels == set(cases(set_layouts.rows()))
    rows = {split: pairs.rows(f"in.{split}").rows for split in ("train", "val", "test")}
    groups = [set(pairs.table["group"][of].tolist()) for of in rows.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == set_layouts.N // 2
    for wrong in (["test"], ["test=2"], ["test=0.9", "val=0.3"], ["train=0.5"], ["test=x"]):
        assert main([*line[:-1], str(tmp_path / "w"), "--split", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def findings_by_hand():
    """`[N, 3]`: pictures 0, 3, 6 ... show a, even ones b, pictures 1 and 2 show c."""
    targets = np.zeros((set_layouts.N, 3), np.int8)
    targets[::3, 0] = targets[::2, 1] = targets[1:3, 2] = 1
    return targets


def test_findings_in_every_form(tmp_path):
    wanted = findings_by_hand()
    names = np.array(["a", "b", "c"])
    files = set_layouts._files(tmp_path)
    with (tmp_path / "text.csv").open("w") as text, (tmp_path / "columns.csv").open("w") as columns:
        text = csv.writer(text)
        columns = csv.writer(columns)
        text.writerow(["image", "found"])
        columns.writerow(["image", "a", "b", "c"])
        for case, target in zip(files, wanted):
            text.writerow([case["image"], "|".join(names[target == 1]) or "nothing"])
            columns.writerow([case["image"], *(f"{value}.0" for value in target)])
    lines = [{"image": case["image"], "findings": names[t == 1].tolist()} for case, t in zip(files, wanted)]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    images = np.stack([set_layouts.pixels(case["image"]) for case in set_layouts.rows()])
    arrays = {f"{s}_{k}": v for s in ("train", "val", "test") for k, v in (("images", images), ("labels", wanted))}
    np.savez(tmp_path / "file.npz", **{k: v[:0] if k[:5] != "test_" else v.astype(np.uint8) for k, v in arrays.items()})
    classes = {"a": "a", "b": "b", "c": "c", "nothing": ""}
    layouts = [
        {"source": "csv", "input": "text.csv", "columns": {"findings": "found"}},
        {"source": "csv", "input": "columns.csv", "findings": ["a", "b", "c"]},
        {"source": "jsonl", "input": "lines.jsonl"},
        {"source": "medmnist", "input": "file.npz"},
    ]
    for number, layout in enumerate(layouts):
        record = {"name": "toy", "layout": layout, "classes": list("abc") if number % 2 else classes}
        (tmp_path / "set.json").write_text(json.dumps({**record, "task": "multilabel"}))
        pairs = ingest(opened(tmp_path), tmp_path / f"out{number}")
        np.testing.assert_array_equal(pairs.table["findings"], wanted, err_msg=str(layout))
        assert pairs.table["findings"].dtype == np.int8
        assert pairs.table["label_id"].tolist() == [-1] * set_layouts.N
        assert pairs.read(0).extra["findings"] == ["a", "b"]
    assert not np.array_equal(wanted, np.roll(wanted, 1, axis=1))  # a wrong order would be seen


def test_findings_that_are_not_known(tmp_path):
    (tmp_path / "a.png").write_bytes(toy.picture(1))
    (tmp_path / "b.png").write_bytes(toy.picture(2))
    (tmp_path / "t.csv").write_text("image,x,y\na.png,1,\nb.png,-1.0,0\n")
    pairs = ingest(open_source("csv", [tmp_path / "t.csv"], findings=["x", "y"]), tmp_path / "out")
    assert pairs.table["findings"].tolist() == [[1, -1], [-1, 0]]
    (tmp_path / "t.csv").write_text("image,x,y\na.png,0.5,0\n")
    with pytest.raises(InputError, match=r"t, a.png: finding 'x' has the value '0.5', not 1"):
        ingest(open_source("csv", [tmp_path / "t.csv"], findings=["x", "y"]), tmp_path / "out2")


def test_class_lists():
    named = Classes.of({"MEL": "melanoma", "NV": "nevus", "nevi": "nevus", "-": ""})
    assert named.names == ("melanoma", "nevus")
    assert [named.number(word) for word in ("MEL", "nevi", "nevus", "-")] == [0, 1, 1, -1]
    graded = Classes.of(["none", "mild", "severe"])
    assert [graded.number(word) for word in ("2", "2.0", " mild ")] == [2, 2, 1]
    assert graded.single("", 1) == ("mild", 1)
    assert graded.single("", -1) == ("", -1)
    assert graded.several(["severe", "none"]) == (1, 0, 1)
    assert graded.several({"mild": 0}) == (-1, 0, -1)
    assert Classes.of({"0": "off", "1": "on"}).number("1.0") == 1
    for wrong, message in [
        (lambda: graded.number("mid"), "label 'mid' is not one of the 3 classes; did you mean 'mild'"),
        (lambda: graded.number("3"), "label '3' is not one"),
        (lambda: named.number("1"), "label '1' is not one"),  # words are given: a number is none of them
        (lambda: graded.single("mild", 2), "its label is 'mild', but class number 2 is 'severe'"),
        (lambda: graded.single("", 3), "label_id 3, but only 3 class names"),
        (lambda: Classes.of(["a", "a"]), "the class 'a' comes twice"),
        (lambda: Classes.of("ab"), "must be a list of names"),
        (lambda: Classes.of(["a", " "]), "must be a list of names"),
    ]:
        with pytest.raises(InputError, match=message):
            wrong()


def test_splits_by_group():
    rng = np.random.default_rng(0)
    groups = [f"g{n}" for n in rng.integers(0, 60, 400)]
    labels = [[int(group[1:]) % 3] + [3] * (int(group[1:]) < 6) for group in groups]  # 3 is rare, beside another
    fractions = {"test": 0.3, "val": 0.1}
    made = splits.by_group("s", groups, labels, fractions)
    by_group = {group: {s for g, s in zip(groups, made) if g == group} for group in groups}
    assert all(len(of) == 1 for of in by_group.values())
    for label in range(4):
        of = {group: next(iter(by_group[group])) for group, own in zip(groups, labels) if own[-1] == label}
        counts = [list(of.values()).count(split) for split in ("train", "val", "test")]
        assert min(counts) >= 1
        assert abs(counts[2] - 0.3 * len(of)) <= 1
    order = rng.permutation(400)
    again = splits.by_group("s", [groups[i] for i in order], [labels[i] for i in order], fractions)
    assert [made[i] for i in order] == again  # whatever comes first
    assert splits.by_group("other", groups, labels, fractions) != made
    assert set(splits.by_group("s", groups, labels, {"test": 1})) == {"test"}
    assert [splits.plain(n) for n in ("Training", "validation", "dev", "fold1")] == ["train", "val", "val", "fold1"]


def test_a_file_of_medmnist_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    set_layouts.medmnist(tmp_path)
    arrays = dict(np.load(tmp_path / "set.npz"))
    np.savez(tmp_path / "trap.npz", **{**arrays, "val_labels": np.array([[Trap()]] * 6, object)})
    with np.load(tmp_path / "trap.npz", allow_pickle=True) as file:
        assert file["val_labels"].shape == (6, 1)
    assert (tmp_path / "sprung").exists()  # it would spring
    (tmp_path / "sprung").unlink()
    with pytest.raises(InputError, match="an array of objects"):
        list(open_source("medmnist", [tmp_path / "trap.npz"]).records())
    assert not (tmp_path / "sprung").exists()
    pickle.dumps(arrays)  # the trap is the file's, not the arrays'


def spoil_npz(root, **changes):
    arrays = dict(np.load(root / "set.npz"))
    np.savez(root / "set.npz", **{k: v for k, v in {**arrays, **changes}.items() if v is not None})


HEAD = "id,dx,fold,patient\n"
SPOILT = {
    "medmnist": [
        (lambda r: (r / "set.npz").write_bytes((r / "set.npz").read_bytes()[:-30]), "is not a whole npz file"),
        (lambda r: spoil_npz(r, val_images=None), "it has no val_images"),
        (lambda r: spoil_npz(r, test_images=np.zeros((6, 9, 9, 9), np.uint8)), "not pictures of 8 bits"),
        (lambda r: spoil_npz(r, test_images=np.zeros((6, 9, 9))), "not pictures of 8 bits"),
        (lambda r: spoil_npz(r, test_labels=np.zeros((5, 1), np.uint8)), "test_labels holds 5 x"),
        (lambda r: spoil_npz(r, test_labels=np.full((6, 1), 3, np.uint8)), "toy, test-000000: label '3' is not one"),
    ],
    "csv": [
        (lambda r: (r / "labels.csv").unlink(), "holds no labels.csv"),
        (lambda r: (r / "labels.csv").write_text("id,x\n1,2\n"), "has no column 'dx'"),
        (lambda r: (r / "labels.csv").write_text(f"{HEAD}00,normal\n"), "line 2: 2 values under 4 columns"),
        (lambda r: (r / "labels.csv").write_text(f"{HEAD}00,tumour,test,1\n"), "label 'tumour' is not one"),
        (lambda r: (r / "labels.csv").write_bytes(b"id,dx,fold,patient\n\xff,normal,test,1\n"), "not CSV in UTF-8"),
        (lambda r: [f.unlink() for f in (r / "images").iterdir()], "24 of 24 records cannot be used"),
    ],
    "folders": [
        (lambda r: (r / "test" / "normal").rename(r / "test" / "abnormal"), "label 'abnormal' is not one"),
        (lambda r: (r / "more").mkdir(), "holds the split 'test' beside 'more'"),
    ],
    "jsonl": [(lambda r: (r / "labels.jsonl").write_text('{"label": 3}'), "line 1: no field `image`")],
    "parquet": [
        (lambda r: (r / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1"), "not a whole Parquet file"),
    ],
    "tfds": [
        (lambda r: (shard(r, "test", 1)).unlink(), "split test has 1 of 2 shards"),
        (lambda r: shard(r, "test", 1).write_bytes(shard(r, "test", 1).read_bytes()[:-3]), "is cut off"),
        (lambda r: shard(r, "test", 1).write_bytes(b""), "holds 0 examples, dataset_info.json says 3"),
        (lambda r: (r / "toy_set/1.0.0/label.labels.txt").write_text("benign mass"), "is not the number of one"),
        (lambda r: (r / "toy_set" / "1.0.0" / "dataset_info.json").write_text("{}"), "names no splits"),
        (lambda r: (r / "toy_set" / "1.0.0" / "dataset_info.json").unlink(), "holds 0 prepared data sets"),
    ],
    "array_record": [
        (lambda r: shard(r, "test", 1, "array_record").write_bytes(b"no records" * 9), "not a whole array_record file"),
    ],
}  # fmt: skip


def shard(root, split, number, kind="tfrecord"):
    return root / "toy_set" / "1.0.0" / f"toy_set-{split}.{kind}-{number:05d}-of-00002"


@pytest.mark.parametrize(
    ("layout", "spoil", "message"),
    [(layout, *one) for layout, all_of in SPOILT.items() for one in all_of],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_one_clear_line(layout, spoil, message, tmp_path, capsys):
    needs(layout)
    root = set_layouts.describe(tmp_path / "set", layout)
    spoil(root)
    assert main(["ingest", str(root / "set.json"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert not (tmp_path / "out").exists()


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="need the extra 'parquet'"):
        list(open_source("parquet", [tmp_path]).records())


def test_tfds_writes_what_is_read(tmp_path):
    """Metadata as tensorflow_datasets itself writes it."""
    import tensorflow_datasets as tfds

    root = set_layouts.describe(tmp_path / "set", "tfds")
    folder = root / "toy_set" / "1.0.0"
    (folder / "label.labels.txt").unlink()
    image = tfds.features.Image(shape=(None, None, 3))
    label = tfds.features.ClassLabel(names=list(set_layouts.CLASSES))
    tfds.features.FeaturesDict({"image": image, "label": label, "patient": tfds.features.Text()}).save_config(folder)
    assert opened(root).classes()["toy"].names == set_layouts.CLASSES
    assert sum(not isinstance(r, Skipped) for r in opened(root).records()) == set_layouts.N


def test_a_picture_with_a_label_needs_no_caption(tmp_path):
    (tmp_path / "a.png").write_bytes(toy.picture(1))
    (tmp_path / "l.jsonl").write_text('{"image": "a.png", "label": "x"}\n{"image": "a.png", "key": "b"}')
    pairs = ingest(open_source("jsonl", [tmp_path / "l.jsonl"]), tmp_path / "out", max_bad=0.5)
    assert len(pairs) == 1
    assert pairs.manifest["made"]["skipped"] == {"no caption": 1}


def test_other_formats_become_png_without_loss(tmp_path):
    pixels = set_layouts.pixels(toy.picture(3, 400, 300))
    for name, options in (("t.tif", {"compression": "tiff_lzw"}), ("b.bmp", {}), ("w.webp", {"lossless": True})):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, name.split(".")[1].replace("tif", "tiff"), **options)
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_bytes(buffer.getvalue())
    (tmp_path / "y").mkdir()
    pairs = ingest(open_source("folders", [tmp_path]), tmp_path.parent / f"{tmp_path.name}-out")
    for row in range(3):
        np.testing.assert_array_equal(set_layouts.pixels(pairs.read(row).image), pixels)
        assert pairs.read(row).media["codec"] == "png"
