"""Selections: which teachers a pair keeps, against plain loops; the artefact, the command, and training on it."""

import data_fixtures as toy
import numpy as np
import pytest

from mmkd_jax import cli
from mmkd_jax.data import select
from mmkd_jax.data.batches import Batches
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.selection import Selection
from mmkd_jax.errors import InputError

ROWS, WIDTH = 60, 16


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> PairsSet:
    return toy.make_pairs(tmp_path_factory.mktemp("set") / "pairs", ROWS)


@pytest.fixture(scope="module")
def features(pairs, tmp_path_factory):
    """`sharp` matches nearly all of its captions, `vague` few, `deaf` none; each lacks some rows."""
    root, found = tmp_path_factory.mktemp("features"), {}
    for seed, (name, noise) in enumerate({"sharp": 0.2, "vague": 1.5, "deaf": 1e6}.items()):
        text = [
            toy.vectors(int(count), WIDTH, seed=seed + 31 * row) for row, count in enumerate(pairs.table["captions"])
        ]
        first = np.stack([of_row[0] for of_row in text])
        image = first + noise * toy.vectors(ROWS, WIDTH, seed=seed + 7)
        image /= np.linalg.norm(image, axis=1, keepdims=True)
        writer = toy.feature_writer(root / name, pairs, teacher=name, width=WIDTH, views=1, dtype="float32")
        for shard in writer.pending():
            here = slice(writer.rows(shard).start, writer.rows(shard).stop)
            writer.write_shard(shard, ~toy.absent(ROWS)[here], image[here, None].astype(np.float32), text[here])
        writer.finish()
        found[name] = FeatureSet.open(root / name, pairs)
    return found


def cosines(one) -> np.ndarray:
    """Row by row."""
    values = []
    for row in range(ROWS):
        found = one.read([row], [0], [0])
        values.append(float(found["image"][0] @ found["text"][0]) if found["present"][0] else -np.inf)
    return np.array(values)


def test_all_keeps_what_is_there_and_absent_rows_never_pass(pairs, features):
    kept = select.select(pairs, features, "all")
    assert kept.teachers == ("deaf", "sharp", "vague")
    for name in features:
        np.testing.assert_array_equal(kept.of(name), ~toy.absent(ROWS))
    for by in select.TESTS:
        assert not select.select(pairs, features, by, threshold=0.0).kept[toy.absent(ROWS)].any(), by


def test_cosine_and_quantile_equal_a_loop_over_rows(pairs, features):
    by_cosine = select.select(pairs, features, "cosine", threshold=0.5)
    by_quantile = select.select(pairs, features, "quantile", threshold=0.25)
    for name, one in features.items():
        values = cosines(one)
        clear = np.abs(values - 0.5) > 1e-5
        np.testing.assert_array_equal(by_cosine.of(name)[clear], (values >= 0.5)[clear])
        there = values[np.isfinite(values)]
        assert by_quantile.of(name).sum() == int(np.ceil(0.75 * len(there)))  # of each teacher alike
        lowest = values[by_quantile.of(name)].min()
        assert lowest >= values[~by_quantile.of(name)].max()
    assert by_cosine.of("sharp").mean() > 0.8
    assert by_cosine.of("deaf").mean() < 0.2


def test_rank_equals_a_loop_in_one_pool(pairs, features):
    found = select.select(pairs, features, "rank", threshold=2, pool=ROWS)
    for name, one in features.items():
        rows = np.flatnonzero(~toy.absent(ROWS))
        zeros = np.zeros_like(rows)
        stored = one.read(rows, zeros, zeros)
        scores = stored["image"] @ stored["text"].T
        for i, row in enumerate(rows):
            assert found.of(name)[row] == (1 + (scores[i] > scores[i, i]).sum() <= 2), (name, row)
    assert found.of("sharp").sum() > found.of("vague").sum() > found.of("deaf").sum()


def test_ranks_do_not_punish_copies_of_a_caption(pairs, tmp_path):
    """All pairs of a modality say the same: the teacher that knows it ranks it first, whatever the copies."""
    kinds = {name: toy.vectors(1, WIDTH, seed=90 + i)[0] for i, name in enumerate(pairs.modalities)}
    of_row = np.stack([kinds[pairs.modalities[m]] for m in pairs.table["modality"]])
    writer = toy.feature_writer(tmp_path / "t", pairs, teacher="t", width=WIDTH, views=1, dtype="float32", shards=1)
    text = [np.tile(v, (int(n), 1)) for v, n in zip(of_row, pairs.table["captions"])]
    writer.write_shard(0, np.ones(ROWS, bool), of_row[:, None], text)
    writer.finish()
    one = {"t": FeatureSet.open(tmp_path / "t", pairs)}
    assert select.select(pairs, one, "rank").kept.all()
    assert select.select(pairs, one, "modality").kept.all()
    other = dict(zip(pairs.modalities, [*pairs.modalities[1:], pairs.modalities[0]]))
    moved = np.stack([kinds[other[pairs.modalities[m]]] for m in pairs.table["modality"]])
    writer = toy.feature_writer(tmp_path / "u", pairs, teacher="u", width=WIDTH, views=1, dtype="float32", shards=1)
    writer.write_shard(0, np.ones(ROWS, bool), moved[:, None], text)
    writer.finish()
    assert not select.select(pairs, {"u": FeatureSet.open(tmp_path / "u", pairs)}, "modality").kept.any()


def test_the_outline_comes_near_the_published_share(pairs, features):
    found = select.select(pairs, features, "outline")
    share = found.kept.sum() / (3 * (~toy.absent(ROWS)).sum())
    assert found.made["share"] == pytest.approx(share)
    others = [select.select(pairs, features, "rank", pool=pool).kept.sum() for pool in (2, 4, 8, 16, 32)]
    shares = np.array(others) / (3 * (~toy.absent(ROWS)).sum())
    assert abs(share - select.PUBLISHED_SHARE) == pytest.approx(np.abs(shares - select.PUBLISHED_SHARE).min())


def test_a_selection_comes_back_from_its_file_and_damage_is_named(pairs, features, tmp_path):
    one = select.select(pairs, features, "cosine", threshold=0.5)
    one.save(tmp_path / "one.npz")
    again = Selection.load(tmp_path / "one.npz")
    assert (again.hash, again.teachers, again.made) == (one.hash, one.teachers, one.made)
    np.testing.assert_array_equal(again.kept, one.kept)
    data = bytearray((tmp_path / "one.npz").read_bytes())
    data[bytes(data).index(np.packbits(one.kept).tobytes())] ^= 1
    (tmp_path / "flipped.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"damaged|does not have the hash"):
        Selection.load(tmp_path / "flipped.npz")
    with pytest.raises(InputError, match="did you mean 'sharp'"):
        one.of("shrap")
    other = toy.make_pairs(tmp_path / "pairs", ROWS + 1)
    with pytest.raises(InputError, match="made for another set"):
        one.check(other, [])


def test_training_sees_only_what_is_kept(pairs, features):
    kept = select.select(pairs, features, "cosine", threshold=0.5)
    usual = {"batch": ROWS, "seed": 0, "policy": toy.POLICY, "image_size": 16, "tokenizer": toy.CharTokenizer()}
    plain = Batches(pairs, features=features, **usual)
    chosen = Batches(pairs, features=features, selection=kept, **usual)
    a, b = plain.batch(0), chosen.batch(0)
    np.testing.assert_array_equal(a["row"], b["row"])
    for name in features:
        expected = a["targets"][name]["present"] & kept.of(name)[a["row"]]
        np.testing.assert_array_equal(b["targets"][name]["present"], expected)
    assert plain.identity != chosen.identity
    fewer = Selection(kept.kept[:, :1], kept.teachers[:1], kept.pairs_hash)
    with pytest.raises(InputError, match="does not know teacher"):
        Batches(pairs, features=features, selection=fewer, **usual)


def test_command(pairs, features, tmp_path, capsys):
    root, out = str(features["sharp"].path.parent), tmp_path / "selection.npz"
    command = ["features", "select", root, "--pairs", str(pairs.path)]
    assert cli.main([*command, "--by", "rank", "--pool", "8", "--out", str(out)]) == 0
    table = capsys.readouterr().out.splitlines()
    found = Selection.load(out)
    assert table[0].split() == ["kept", "pairs", *found.teachers]
    assert [int(n) for n in table[-2].split()[1:]] == found.kept.sum(axis=0).tolist()
    assert found.hash == select.select(pairs, features, "rank", pool=8).hash
    for arguments, says in (
        (["--out", str(out)], "exists; choose another --out"),
        (["--by", "rnak", "--out", str(tmp_path / "new")], "did you mean 'rank'"),
        (["--by", "quantile", "--threshold", "1.5", "--out", str(tmp_path / "new")], "not in [0, 1)"),
        (["--by", "rank", "--pool", "1", "--out", str(tmp_path / "new")], "ranks nothing"),
    ):
        assert cli.main([*command, *arguments]) == 2
        complaint = capsys.readouterr().err
        assert says in complaint
        assert complaint.count("\n") == 1
        assert not (tmp_path / "new").exists()
