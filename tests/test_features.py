"""Stored features: exact join, exact statistics, resumable writing, and everything wrong is refused by name."""

import json
import re
import shutil

import data_fixtures as toy
import ml_dtypes
import numpy as np
import pytest

from mmkd_jax import io
from mmkd_jax.cli import main
from mmkd_jax.data import tfrecord
from mmkd_jax.data.feature_codec import DTYPES, Block, Moments, unusable
from mmkd_jax.data.features import FeatureSet, read_together
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return toy.make_pairs(tmp_path_factory.mktemp("features") / "pairs")


@pytest.fixture(scope="module")
def whole(pairs, tmp_path_factory):
    return toy.make_features(tmp_path_factory.mktemp("features") / "t", pairs)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of a feature set that may be spoilt."""
    shutil.copytree(whole.path, tmp_path / "copy")
    return tmp_path / "copy"


def bf16(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32)


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def read_all(features, pairs, view=1, caption=0):
    n = len(pairs)
    return features.read(np.arange(n), np.full(n, view), np.full(n, caption))


def read_views(features, pairs):
    return [read_all(features, pairs, view) for view in range(features.views)]


def test_read_gives_what_was_written(pairs, whole):
    image, text = toy.feature_values(pairs, 6, 2)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(pairs), 200)
    views = rng.integers(0, 2, 200)
    captions = rng.integers(0, 3, 200) % pairs.table["captions"][rows]
    got = whole.read(rows, views, captions)
    here = ~toy.absent(len(pairs))[rows]
    np.testing.assert_array_equal(got["present"], here)
    assert got["image"].dtype == got["text"].dtype == np.float32
    np.testing.assert_array_equal(got["image"][here], bf16(image[rows, views][here]))
    expected = np.stack([text[r][c] for r, c in zip(rows, captions)])
    np.testing.assert_array_equal(got["text"][here], bf16(expected[here]))
    assert not got["image"][~here].any()
    assert not got["text"][~here].any()
    assert not np.array_equal(got["image"][here], bf16(image[rows, 1 - views][here]))  # another view is seen


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 5e-4), ("bfloat16", 4e-3)])
def test_stored_types(pairs, tmp_path, dtype, error):
    features = toy.make_features(tmp_path / dtype, pairs, dtype=dtype)
    features.verify()
    image, _ = toy.feature_values(pairs, 6, 2)
    got = read_all(features, pairs)
    worst = np.abs(got["image"] - image[:, 1])[got["present"]].max()
    assert worst <= error
    assert (worst > 0) == (dtype != "float32")


def test_absent_rows_take_no_room(whole):
    reader = tfrecord.RecordReader(whole.path / whole.manifest["shards"][0]["file"])
    block = Block.decode(reader.read(0), np.dtype(ml_dtypes.bfloat16))
    assert block.image.shape == (7, 2, 6)  # row 3 of 8 is absent
    assert block.present.tolist() == [True, True, True, False, True, True, True, True]


def test_small_cache_gives_the_same(pairs, whole):
    tiny = FeatureSet.open(whole.path, pairs, cache_blocks=1)
    for name, value in read_all(whole, pairs).items():
        np.testing.assert_array_equal(value, read_all(tiny, pairs)[name])
    assert len(tiny.blocks._known) == 1


def test_statistics_are_those_of_all_stored_vectors(pairs, whole):
    image, text = toy.feature_values(pairs, 6, 2)
    here = ~toy.absent(len(pairs))
    stored = {
        "image": bf16(image[here].reshape(-1, 6)),
        "text": bf16(np.concatenate([t for t, p in zip(text, here) if p])),
    }
    for tower, x in stored.items():
        got = whole.statistics[tower]
        assert got["count"] == len(x)
        np.testing.assert_allclose(got["mean"], x.astype(np.float64).mean(0), atol=1e-12)
        np.testing.assert_allclose(got["covariance"], np.cov(x.astype(np.float64).T, bias=True), atol=1e-12)


def test_moments_merge_exactly_and_take_nothing():
    x = np.random.default_rng(1).normal(size=(50, 4)) + 100
    merged = Moments.of(x[:0])
    for part in (x[:1], x[1:30], x[30:30], x[30:]):
        merged = merged.merge(Moments.of(part))
    np.testing.assert_allclose(merged.covariance, np.cov(x.T, bias=True), rtol=1e-10)
    assert merged.count == 50
    assert Moments.of(x[:0]).merge(Moments.of(x[:0])).count == 0


def test_resumed_writing_gives_the_same_bytes(pairs, whole, tmp_path):
    path = tmp_path / "t"
    writer = toy.feature_writer(path, pairs)
    toy.write_shard(writer, 1)
    with pytest.raises(InputError, match=r"lacks shards \[0, 2\]"):
        writer.finish()
    again = toy.feature_writer(path, pairs)
    assert again.pending() == [0, 2]
    toy.write_shard(again, 2)
    # interrupted within shard 0: records are there, its statistics are not
    toy.write_shard(again, 0)
    next(path.glob("*00000*.statistics")).unlink()
    last = toy.feature_writer(path, pairs)
    assert last.pending() == [0]
    toy.write_shard(last, 0)
    with pytest.raises(InputError, match="no finished features"):
        FeatureSet.open(path, pairs)
    last.finish()
    assert content(path) == content(whole.path)
    assert toy.feature_writer(path, pairs).pending() == []
    toy.feature_writer(path, pairs).finish()  # finishing a finished set changes nothing
    assert content(path) == content(whole.path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"width": 5}, "width"),
        ({"weights_hash": "v"}, "weights_hash"),
        ({"views": 1}, "views"),
        ({"block": 4}, "block"),
    ],
)
def test_another_plan_does_not_go_on_in_the_same_folder(pairs, whole, change, word):
    with pytest.raises(InputError, match=f"holds other features \\({word}"):
        toy.feature_writer(whole.path, pairs, **change)


def test_shard_bounds_depend_on_rows_alone(pairs, tmp_path):
    one = toy.feature_writer(tmp_path / "a", pairs, shards=None, block=256)
    two = toy.feature_writer(tmp_path / "b", pairs, shards=None, block=256, width=9, views=1)
    assert [one.rows(s) for s in one.pending()] == [two.rows(s) for s in two.pending()] == [range(0, 40)]


def test_selected_rows_are_part_of_the_plan(pairs, tmp_path):
    rows = RowIndex(np.arange(4), pairs.hash, "few")
    toy.feature_writer(tmp_path / "a", pairs, rows=rows)
    with pytest.raises(InputError, match="selected"):
        toy.feature_writer(tmp_path / "a", pairs)
    with pytest.raises(InputError, match="is for the set"):
        toy.feature_writer(tmp_path / "b", pairs, rows=RowIndex(np.arange(4), "other", "few"))


def test_nothing_present_is_a_set_without_features(pairs, tmp_path):
    writer = toy.feature_writer(tmp_path / "t", pairs)
    for shard in writer.pending():
        n = len(writer.rows(shard))
        writer.write_shard(shard, np.zeros(n, bool), np.full((n, 2, 6), np.nan), [np.zeros((0, 6))] * n)
    writer.finish()
    features = FeatureSet.open(tmp_path / "t", pairs)
    features.verify()
    assert not read_all(features, pairs)["present"].any()
    assert features.statistics["text"]["count"] == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda image, text: image.__setitem__((0, 0, 0), np.nan), "norm nan|NaN"),
        (lambda image, text: image.__setitem__((1, 1), 0.0), "norm 0"),
        (lambda image, text: image.__setitem__((1, 1), 2.0), "norm 4.899, not 1"),
        (lambda image, text: text.__setitem__(2, text[2][:1]), "row 2 has 3 captions"),
        (lambda image, text: text.pop(), "takes 16 rows"),
    ],
)
def test_writer_refuses(pairs, tmp_path, spoil, message):
    writer = toy.feature_writer(tmp_path / "t", pairs)
    image, text = toy.feature_values(pairs, 6, 2)
    n = len(writer.rows(0))
    image, text = image[:n].copy(), [t.copy() for t in text[:n]]
    spoil(image, text)
    with pytest.raises(InputError, match=message):
        writer.write_shard(0, np.ones(n, bool), image, text)
    assert writer.pending() == [0, 1, 2]
    assert not list((tmp_path / "t").glob("*.tfrecord*"))


def test_zero_rows_are_refused_without_a_norm_too(pairs, tmp_path):
    writer = toy.feature_writer(tmp_path / "t", pairs, norm="none")
    image, text = toy.feature_values(pairs, 6, 2)
    n = len(writer.rows(0))
    image[1, 1] = 0
    with pytest.raises(InputError, match="all zeros"):
        writer.write_shard(0, np.ones(n, bool), image[:n], text[:n])


@pytest.mark.parametrize("change", [{"space": "other"}, {"norm": "l1"}, {"dtype": "int8"}, {"width": 0}])
def test_writer_refuses_wrong_arguments(pairs, tmp_path, change):
    with pytest.raises(InputError):
        toy.feature_writer(tmp_path / "t", pairs, **change)


def rewrite(folder, change):
    """Spoils the first block behind all checksums: record, index, manifest and its hash agree with each other."""
    manifest = io.read_json(folder / "manifest.json")
    file = folder / manifest["shards"][0]["file"]
    records = [tfrecord.RecordReader(file).read(i) for i in range(len(tfrecord.RecordReader(file)))]
    block = Block.decode(records[0], np.dtype(ml_dtypes.bfloat16))
    fields = {name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in vars(block).items()}
    change(fields)
    records[0] = Block(**fields).encode()
    tfrecord.write(file, records)
    manifest["shards"][0] |= {"bytes": file.stat().st_size, "sha256": io.sha256_file(file)}
    seal(folder, manifest)


def seal(folder, manifest):
    manifest.pop("hash", None)
    io.write_json(folder / "manifest.json", {**manifest, "hash": io.hash_of(manifest)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["image"].__setitem__((0, 0, 0), np.nan), "NaN"),
        (lambda f: f["text"].__setitem__(1, 0), "all zeros"),
        (lambda f: f.update(ids=f["ids"][32:] + f["ids"][:32]), "other ids"),
        (lambda f: f.update(image=f["image"][:, :1]), "views, width"),
        (lambda f: f.update(image=f["image"][1:]), "rows, views"),
        (lambda f: f.update(text=f["text"][1:]), "text features for"),
        (lambda f: f.update(first=8), "does not hold rows 0 to 8"),
    ],
)
def test_reader_refuses_what_checksums_do_not_see(pairs, copy, change, message):
    rewrite(copy, change)
    features = FeatureSet.open(copy, pairs)
    with pytest.raises(InputError, match=message) as caught:
        read_views(features, pairs)
    assert "features.tfrecord-00000" in str(caught.value)
    assert "\n" not in str(caught.value)


def flip(folder):
    file = folder / io.read_json(folder / "manifest.json")["shards"][0]["file"]
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)


def cut(folder):
    file = folder / io.read_json(folder / "manifest.json")["shards"][0]["file"]
    file.write_bytes(file.read_bytes()[:-100])


def narrow(fields):
    fields.update(image=fields["image"][..., :5], text=fields["text"][..., :5])


def state(folder, **changes):
    seal(folder, {**io.read_json(folder / "manifest.json"), **changes})


FAULTS = {
    "NaN": (lambda f: rewrite(f, lambda b: b["text"].__setitem__((3, 1), np.nan)), "text features .* are NaN"),
    "minus infinity": (lambda f: rewrite(f, lambda b: b["image"].__setitem__((3, 0, 1), -np.inf)), "NaN or infinite"),
    "zero row": (lambda f: rewrite(f, lambda b: b["image"].__setitem__((2, 1), 0)), "image features .* all zeros"),
    "swapped ids": (
        lambda f: rewrite(f, lambda b: b.update(ids=b["ids"][32:64] + b["ids"][:32] + b["ids"][64:])),
        "other ids than the pairs of rows 0 to 8",
    ),
    "truncated shard": (cut, "is truncated"),
    "wrong width": (lambda f: rewrite(f, narrow), r"image features are \(7, 2, 5\), not \(rows, views, width\)"),
    "other view policy": (
        lambda f: state(f, policy=ViewPolicy(seed=9).to_dict()),
        "states a view policy that does not",
    ),
    "other pairs set": (
        lambda f: state(f, pairs={"hash": "f" * 64, "rows": 40}),
        r"another set of pairs \(ffffffffffff\)",
    ),
    "bit flip": (flip, "record 1 fails its checksum"),
}


@pytest.mark.parametrize("way", ["reader", "verify"])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_refused_by_name(pairs, copy, fault, way, capsys):
    plant, says = FAULTS[fault]
    command = ["features", "verify", str(copy), "--pairs", str(pairs.path)]
    assert main(command) == 0  # before
    read_all(FeatureSet.open(copy, pairs), pairs)
    plant(copy)
    if way == "verify":
        assert main(command) == 2
        error = capsys.readouterr().err
    else:
        with pytest.raises(InputError) as caught:
            read_views(FeatureSet.open(copy, pairs), pairs)
        error = f"{caught.value}\n"
    assert re.search(says, error)
    assert str(copy) in error
    assert error.count("\n") == 1


def test_verify_refuses_sets_whose_views_are_not_the_same(pairs, tmp_path, capsys):
    toy.make_features(tmp_path / "a", pairs, teacher="a")
    toy.make_features(tmp_path / "b", pairs, teacher="b", width=9)
    assert main(["features", "verify", str(tmp_path)]) == 0
    capsys.readouterr()
    toy.make_features(tmp_path / "c", pairs, teacher="c", policy=ViewPolicy(seed=9))
    assert main(["features", "verify", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "c has 2 views of the view policy" in captured.err
    assert captured.out == ""
    assert main(["features", "verify", str(tmp_path / "c")]) == 0


def test_pictures_can_be_read_without_captions(pairs, whole):
    n = len(pairs)
    alone = whole.read(np.arange(n), np.ones(n), None)
    assert sorted(alone) == ["image", "present"]
    both = read_all(whole, pairs)
    np.testing.assert_array_equal(alone["image"], both["image"])
    np.testing.assert_array_equal(alone["present"], both["present"])


def test_verify_notices_a_feature_that_only_differs(pairs, copy):
    rewrite(copy, lambda f: f["image"].__setitem__((0, 0), f["image"][1, 0]))
    with pytest.raises(InputError, match="statistics are not those"):
        FeatureSet.open(copy, pairs).verify()


def test_verify_passes_what_is_whole(pairs, whole):
    FeatureSet.open(whole.path, pairs).verify()
    FeatureSet.open(whole.path, None).verify()


def test_reader_refuses_another_set(whole, tmp_path):
    with pytest.raises(InputError, match="another set of pairs"):
        FeatureSet.open(whole.path, toy.make_pairs(tmp_path / "pairs", n=41))


def test_reader_refuses_other_captions(whole, pairs, monkeypatch):
    monkeypatch.setitem(pairs.manifest, "captions_hash", "x")
    with pytest.raises(InputError, match="other captions"):
        FeatureSet.open(whole.path, pairs)


def test_reader_refuses_another_policy(whole, pairs):
    with pytest.raises(InputError, match="view policy"):
        FeatureSet.open(whole.path, pairs, policy=ViewPolicy(seed=9))
    FeatureSet.open(whole.path, pairs, policy=toy.POLICY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["pairs"].update(rows=41), "has features of 41 rows"),
        (lambda m: m.update(width=7), "says width 7"),
        (lambda m: m.update(schema=9), "schema 9"),
        (lambda m: m.update(kind="pairs"), "not the manifest of a feature set"),
    ],
)
def test_reader_refuses_manifest(pairs, copy, change, message):
    manifest = io.read_json(copy / "manifest.json")
    change(manifest)
    seal(copy, manifest)
    with pytest.raises(InputError, match=message):
        FeatureSet.open(copy, pairs)


def test_reader_refuses_a_changed_manifest(pairs, copy):
    manifest = io.read_json(copy / "manifest.json")
    manifest["license"] = "free"
    io.write_json(copy / "manifest.json", manifest)
    with pytest.raises(InputError, match="was changed"):
        FeatureSet.open(copy, pairs)


def test_damaged_shard_is_named_at_its_record(pairs, copy):
    file = copy / io.read_json(copy / "manifest.json")["shards"][1]["file"]
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    features = FeatureSet.open(copy, pairs)
    features.read(np.arange(8), np.zeros(8), np.zeros(8))  # another shard
    with pytest.raises(InputError, match=re.escape(file.name) + ": record 0 fails its checksum"):
        read_all(features, pairs)
    file.write_bytes(data[:-10])
    with pytest.raises(InputError, match="manifest says"):
        FeatureSet.open(copy, pairs)
    file.unlink()
    with pytest.raises(InputError, match="is missing"):
        FeatureSet.open(copy, pairs)


@pytest.mark.parametrize(
    ("rows", "views", "captions", "message"),
    [([40], [0], [0], "40 rows"), ([0], [2], [0], "2 views"), ([0], [0], [1], "caption"), ([-1], [0], [0], "40 rows")],
)
def test_read_refuses_what_is_not_there(whole, rows, views, captions, message):
    with pytest.raises(InputError, match=message):
        whole.read(np.array(rows), np.array(views), np.array(captions))


def test_command(pairs, whole, capsys):
    assert main(["features", "show", str(whole.path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["teacher"], shown["backend"]) == ("t", "torch 9.9")
    assert main(["features", "verify", str(whole.path), "--pairs", str(pairs.path)]) == 0
    assert json.loads(capsys.readouterr().out)["whole"] is True
    assert main(["features", "show", str(pairs.path)]) == 2
    assert "not the manifest of a feature set" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_is_looked_at_wherever_it_lies(dtype):
    """At every distance from whole words of memory, the first and the last value too; large numbers are no fault."""
    dtype = DTYPES[dtype]
    for offset in range(9):
        for rows, width in ((1, 1), (2, 5), (3, 16)):
            raw = np.zeros(rows * width * dtype.itemsize + 32, np.uint8)
            x = raw[offset:][: rows * width * dtype.itemsize].view(dtype).reshape(rows, width)
            for place in range(x.size):
                for value, says in ((np.nan, "NaN"), (np.inf, "NaN"), (-np.inf, "NaN"), (2.0, ""), (-100.0, "")):
                    x[...] = 0.1
                    x.flat[place] = value
                    assert (says in unusable(x)) if says else not unusable(x)
            x[...] = 0.1
            x[-1] = -0.0
            assert unusable(x) == "are all zeros"


def test_sets_that_are_read_together_are_not_taken_for_each_other(pairs, whole, copy):
    """Records of one length, one with other rows absent: what is known of the first is not said of the second."""

    def move(fields):
        present = fields["present"]
        present[[2, 3]] = present[[3, 2]]
        fields["counts"][[2, 3]] = fields["counts"][[3, 2]]

    rewrite(copy, move)
    sets = [whole, FeatureSet.open(copy, pairs)]
    asked = np.arange(8), np.zeros(8, int), None
    first, second = read_together(sets, *asked)
    assert first["present"].tolist() == [True, True, True, False, True, True, True, True]
    assert second["present"].tolist() == [True, True, False, True, True, True, True, True]
    np.testing.assert_array_equal(first["image"][2], second["image"][3])
    rewrite(copy, lambda f: f["image"].__setitem__((1, 0, 0), np.nan))
    with pytest.raises(InputError, match="NaN"):
        read_together([whole, FeatureSet.open(copy, pairs)], *asked)


def test_a_shard_that_is_cut_while_it_is_open_is_refused(pairs, copy):
    """Not touched: what a mapped file has lost ends the process."""
    features = FeatureSet.open(copy, pairs)
    read_all(features, pairs)
    file = copy / features.manifest["shards"][0]["file"]
    with open(file, "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(InputError, match=r"was cut from .* to 100 bytes while it was open"):
        read_all(features, pairs)
