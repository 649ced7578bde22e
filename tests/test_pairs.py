"""Sets of pairs on disk: what is written is read, by us and by tensorflow_datasets; nothing broken opens."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import data_fixtures as toy
import numpy as np
import pytest

from mmkd_jax import io
from mmkd_jax.data import tfrecord
from mmkd_jax.data.pairs import PairsSet, PairsWriter, pair_id
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.errors import InputError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return toy.make_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture
def copy(pairs, tmp_path):
    shutil.copytree(pairs.path, tmp_path / "copy")
    return tmp_path / "copy"


def content(folder):
    files = sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_read_gives_what_was_written(pairs):
    assert len(pairs) == 40
    for row in (0, 13, 14, 39, 5):
        assert pairs.read(row) == toy.pair(row)
    assert [p.id for p in pairs.read_many([7, 7, 1])] == [toy.pair(r).id for r in (7, 7, 1)]
    assert pairs.ids(np.array([3, 0])) == [toy.pair(3).id, toy.pair(0).id]
    for row in (-1, 40):
        with pytest.raises(InputError, match=f"row {row} is not"):
            pairs.read(row)
    pairs.verify()


def test_table_is_that_of_the_records(pairs):
    table, records = pairs.table, pairs.read_many(range(40))
    assert table["id"].tolist() == [p.id for p in records]
    assert [pairs.modalities[m] for m in table["modality"]] == [p.modality for p in records]
    assert [pairs.sources[s] for s in table["source"]] == [p.source for p in records]
    assert table["label_id"].tolist() == [p.label_id for p in records]
    assert table["captions"].tolist() == [len(p.captions) for p in records]
    keys = [(p.source, p.group) for p in records]
    same = np.array([[a == b for b in keys] for a in keys])
    np.testing.assert_array_equal(table["group"][:, None] == table["group"], same)
    assert pairs.modalities == ["ct", "mri", "xray"]
    assert pairs.classes == {"toy": ["cat", "dog"]}
    with pytest.raises(ValueError, match="read-only"):
        table["label_id"][0] = 3


def test_rows_without_a_group_are_told_apart_from_groups(tmp_path):
    with PairsWriter(tmp_path / "s") as writer:
        for row, group in enumerate(["", "a", "", "b"]):
            pair = toy.pair(1)
            writer.add(type(pair)(**{**vars(pair), "id": pair_id("x", str(row)), "group": group}))
        assert writer.finish().table["group"].tolist() == [-1, 0, -1, 1]


def test_bytes_and_hash_do_not_depend_on_when_or_where(pairs, tmp_path):
    again = toy.make_pairs(tmp_path / "pairs")
    assert content(again.path) == content(pairs.path)


def test_hash_is_of_content_not_of_shards(pairs, tmp_path):
    for shards in (1, 7, 40, 99):
        other = toy.make_pairs(tmp_path / str(shards), shards=shards)
        assert (other.hash, other.manifest["captions_hash"]) == (pairs.hash, pairs.manifest["captions_hash"])
        assert len(other.manifest["shards"]) == min(shards, 40)
        assert [p.id for p in other.read_many(range(40))] == pairs.ids(np.arange(40))
    assert toy.make_pairs(tmp_path / "less", n=39).hash != pairs.hash


def test_captions_have_their_own_hash(tmp_path):
    sets = []
    for name, captions in (("a", 1), ("b", 2)):
        with PairsWriter(tmp_path / name) as writer:
            writer.add(toy.pair(0, captions))
            sets.append(writer.finish())
    assert sets[0].hash == sets[1].hash
    assert sets[0].manifest["captions_hash"] != sets[1].manifest["captions_hash"]


def test_row_indices(pairs, tmp_path):
    assert pairs.row_names() == ["test", "train"]
    assert pairs.rows("test").rows.tolist() == list(range(30, 40))
    assert pairs.manifest["indices"]["train"]["hash"] == pairs.rows("train").hash
    with pytest.raises(InputError, match="did you mean 'train'"):
        pairs.rows("trian")
    with pytest.raises(InputError, match="is for the set"):
        pairs.checked(RowIndex(np.arange(3), "other", "x"))
    with pytest.raises(InputError, match="reaches row 40"):
        pairs.checked(RowIndex(np.array([40]), pairs.hash, "x"))
    with pytest.raises(InputError, match="reaches row 99"):
        toy.make_pairs(tmp_path / "p", rows={"x": [99]})
    assert not (tmp_path / "p").exists()


def test_tensorflow_datasets_knows_the_set(pairs):
    """Metadata and codec, without TensorFlow: an independent reader of the same records."""
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(str(pairs.path)).info
    assert info.splits["train"].num_examples == 40
    assert list(info.splits["train"].shard_lengths) == [s["rows"] for s in pairs.manifest["shards"]]
    for written, entry in zip(info.splits["train"].filepaths, pairs.manifest["shards"]):
        assert os.fspath(written) == os.fspath(pairs.path / entry["file"])
    reader = tfrecord.RecordReader(pairs.path / pairs.manifest["shards"][0]["file"])
    for row in range(5):
        skip = {"image": tfds.decode.SkipDecoding()}
        got, pair = info.features.deserialize_example_np(reader.read(row), decoders=skip), toy.pair(row)
        assert got["image"] == pair.image
        assert [c.decode() for c in got["captions"]] == pair.captions
        assert json.loads(got["extra"]) == pair.extra
        for name in ("id", "modality", "label", "group", "source", "license", "article"):
            assert got[name].decode() == getattr(pair, name)
        assert got["label_id"] == pair.label_id
        np.testing.assert_array_equal(got["media"]["spacing"], [0.5, 0.5])
        assert (got["media"]["width"], got["media"]["height"]) == (20, 16)


def test_tensorflow_opens_the_set(pairs):
    pytest.importorskip("tensorflow", reason="the reference reader is TensorFlow's; it is not installed")
    import tensorflow_datasets as tfds
    from PIL import Image

    builder = tfds.builder_from_directory(str(pairs.path))
    records = list(builder.as_dataset(split="train", shuffle_files=False).as_numpy_iterator())
    assert [r["id"].decode() for r in records] == pairs.ids(np.arange(40))
    with Image.open(__import__("io").BytesIO(pairs.read(5).image)) as image:
        np.testing.assert_array_equal(records[5]["image"], np.asarray(image))


def test_nothing_imports_tensorflow(pairs):
    code = (
        "import sys; from mmkd_jax.data.pairs import PairsSet; from mmkd_jax.data import batches, features, ingest; "
        "PairsSet.open(sys.argv[1]).verify(); "
        "from mmkd_jax.data.pair_codec import write_tfds_metadata; from etils import epath; "
        "write_tfds_metadata(epath.Path(sys.argv[2]), 'x', [{'rows': 1, 'bytes': 2}], 'd'); "
        "sys.exit(', '.join({'tensorflow', 'torch'} & set(sys.modules)) or 0)"
    )
    scratch = pairs.path.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code, str(pairs.path), str(scratch)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_opens_only_what_is_finished(pairs, copy, tmp_path):
    with pytest.raises(InputError, match="no finished set of pairs"):
        PairsSet.open(tmp_path)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        PairsSet.open(copy)
    for change, message in (
        ({"kind": "features"}, "not a set of pairs"),
        ({"schema": 9}, "has schema 9"),
        ({"rows": 41}, "table.npz does not have"),
    ):
        io.write_json(copy / "manifest.json", {**pairs.manifest, **change})
        with pytest.raises(InputError, match=message):
            PairsSet.open(copy)


def test_missing_and_cut_shards(pairs, copy):
    file = copy / pairs.manifest["shards"][1]["file"]
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(InputError, match=re.escape(f"{file} has {len(data) - 1} bytes")):
        PairsSet.open(copy)
    file.unlink()
    with pytest.raises(InputError, match=re.escape(f"{file} is missing")):
        PairsSet.open(copy)


def test_damage_is_named_where_it_is_read(pairs, copy):
    file = copy / pairs.manifest["shards"][1]["file"]
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    opened = PairsSet.open(copy)
    opened.read(0)
    with pytest.raises(InputError, match=re.escape(f"{file}: record 0 fails its checksum")):
        opened.read(pairs.manifest["shards"][0]["rows"])
    with pytest.raises(InputError, match="record 0 fails its checksum"):
        opened.verify()


def test_verify_sees_what_checksums_do_not(pairs, copy):
    first, second = (copy / s["file"] for s in pairs.manifest["shards"][:2])
    records = [tfrecord.RecordReader(first).read(i) for i in range(13)]
    tfrecord.write(first, records[::-1])
    swapped = PairsSet.open(copy)
    with pytest.raises(InputError, match="another pair than the table says"):
        swapped.read(0)
    with pytest.raises(InputError, match="SHA-256"):
        swapped.verify()
    tfrecord.write(first, records)
    PairsSet.open(copy).verify()
    (copy / "table.npz").write_bytes((copy / "table.npz").read_bytes() + b" ")
    with pytest.raises(InputError, match=r"table\.npz"):
        PairsSet.open(copy).verify()
    assert second.exists()


def test_replaced_row_index_is_noticed(pairs, copy):
    RowIndex(np.arange(5), pairs.hash, "train").save(copy / "rows" / "train.npz")
    with pytest.raises(InputError, match="'train' of"):
        PairsSet.open(copy).verify()


def test_writer_refuses(tmp_path):
    with PairsWriter(tmp_path / "s") as writer:
        writer.add(toy.pair(0))
        with pytest.raises(InputError, match="comes twice"):
            writer.add(toy.pair(0))
        wrong = toy.pair(1)
        wrong.id = "x"
        with pytest.raises(InputError, match="32 hex digits"):
            writer.add(wrong)
    with PairsWriter(tmp_path / "s") as writer, pytest.raises(InputError, match="no pairs"):
        writer.finish()
    with pytest.raises(InputError, match="at least one shard"):
        PairsWriter(tmp_path / "s", shards=0)
    toy.make_pairs(tmp_path / "taken", n=2)
    with pytest.raises(InputError, match="exists already"):
        PairsWriter(tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    for name in ("write_json", "write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(f"mmkd_jax.data.pair_writer.io.{name}", fail)
            with pytest.raises(KeyboardInterrupt):
                toy.make_pairs(tmp_path / "s", n=3)
        assert list(tmp_path.iterdir()) == []
    with PairsWriter(tmp_path / "s") as writer:
        writer.add(toy.pair(0))  # and never finished
    assert list(tmp_path.iterdir()) == []


def test_on_an_object_store_the_manifest_is_the_commit(pairs, tmp_path, monkeypatch):
    """Where nothing can be renamed, files lie under their final names and the manifest makes them a set."""
    real = io.write_json

    def interrupted(path, value):
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        real(path, value)

    def writer(name):
        made = PairsWriter(tmp_path / name / "pairs", "toy", shards=3)
        monkeypatch.setattr(made, "_local", False)
        for row in range(40):
            made.add(toy.pair(row))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(io, "write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer("cut").finish()
    assert len(list((tmp_path / "cut" / "pairs").glob("*.tfrecord-*"))) == 6
    with pytest.raises(InputError, match="no finished set"):
        PairsSet.open(tmp_path / "cut" / "pairs")
    written = writer("whole").finish({"train": range(30), "test": range(30, 40)}, {"toy": ["cat", "dog"]})
    assert content(written.path) == content(pairs.path)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("mmkd_jax.data.pairs._OPEN_SHARDS", 2)
    pairs = toy.make_pairs(tmp_path / "p", n=12, shards=12)
    before = len(os.listdir("/proc/self/fd"))
    for row in (*range(12), *range(12)):
        assert pairs.read(row).id == toy.pair(row).id
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_names_are_made_fit_for_tensorflow_datasets(tmp_path):
    for folder, name in (("My Set-1", "my_set_1"), ("9lives", "set_9lives"), ("---", "pairs")):
        with PairsWriter(tmp_path / folder) as writer:
            assert writer.name == name
