"""Routing: who is believed for which modality, against plain loops; the table as a file; `mmkd features route`."""

import json

import data_fixtures as toy
import numpy as np
import pytest

from mmkd_jax import io
from mmkd_jax.cli import main
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.pairs import PairsSet, PairsWriter
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.errors import InputError
from mmkd_jax.tasks import routing

WIDTH = 8
# Twelve pairs of ct, twelve of mri, five of pet; captions of mri come in three kinds.
MODALITIES = ("ct",) * 12 + ("mri",) * 12 + ("pet",) * 5


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> PairsSet:
    with PairsWriter(tmp_path_factory.mktemp("set") / "pairs", "toy", shards=1) as writer:
        for row, modality in enumerate(MODALITIES):
            pair = toy.pair(row, 1)
            pair.modality, pair.group = modality, ""
            if modality == "mri":
                pair.captions[:] = [f"a scan of kind {row % 3}"]
            writer.add(pair)
        return writer.finish({"dev": list(range(len(MODALITIES))), "train": [0, 1]})


def features(path, pairs, name, image, text, present=None) -> FeatureSet:
    """A stored set of one view: float `[n, width]` of pictures and of captions."""
    writer = toy.feature_writer(path / name, pairs, teacher=name, width=WIDTH, views=1, shards=1, dtype="float32")
    present = np.ones(len(pairs), bool) if present is None else present
    writer.write_shard(0, present, unit(image)[:, None], list(unit(text)[:, None]))
    writer.finish()
    return FeatureSet.open(path / name, pairs)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def texts(pairs, seed):
    """A vector a distinct caption, so that equal captions have equal features, as from a teacher."""
    captions = [pair.captions[0] for pair in pairs.read_many(range(len(pairs)))]
    vectors = {caption: toy.vectors(1, WIDTH, seed=seed + i)[0] for i, caption in enumerate(sorted(set(captions)))}
    return captions, np.stack([vectors[caption] for caption in captions])


def specialist(path, pairs, name, modality, seed) -> FeatureSet:
    """A teacher that is perfect in one modality, and at chance elsewhere."""
    _, text = texts(pairs, seed)
    known = np.array(MODALITIES) == modality
    return features(path, pairs, name, np.where(known[:, None], text, toy.vectors(len(pairs), WIDTH, seed=seed)), text)


@pytest.fixture(scope="module")
def teachers(pairs, tmp_path_factory):
    path = tmp_path_factory.mktemp("features")
    return {
        "for_ct": specialist(path, pairs, "for_ct", "ct", 100),
        "for_mri": specialist(path, pairs, "for_mri", "mri", 200),
        "for_none": specialist(path, pairs, "for_none", "none", 300),
    }


def strength(stored, pairs, modality) -> float:
    """The measure by plain loops: mean of 1 / rank of a picture's caption among the distinct ones of its modality."""
    rows = [row for row, m in enumerate(MODALITIES) if m == modality]
    captions = [pairs.read(row).captions[0] for row in rows]
    found = stored.read(np.array(rows), np.zeros(len(rows), int), np.zeros(len(rows), int))
    total = 0.0
    for i, caption in enumerate(captions):
        own = found["image"][i] @ found["text"][i]
        rank = 1
        for other in set(captions) - {caption}:
            rank += found["image"][i] @ found["text"][captions.index(other)] > own
        total += 1 / rank
    return total / len(rows)


def test_each_teacher_is_believed_where_it_is_perfect(pairs, teachers):
    record = routing.measure(pairs, teachers, pairs.rows("dev"))
    assert record["weights"] == {
        "ct": {"for_ct": 1.0, "for_mri": 0.0, "for_none": 0.0},
        "mri": {"for_ct": 0.0, "for_mri": 1.0, "for_none": 0.0},
    }
    assert record["strength"]["ct"]["for_ct"] == record["strength"]["mri"]["for_mri"] == 1.0
    assert record["strength"]["ct"]["for_mri"] < 0.8
    for modality in ("ct", "mri"):
        for name, stored in teachers.items():
            np.testing.assert_allclose(record["strength"][modality][name], strength(stored, pairs, modality))
    assert record["rows"] == pairs.rows("dev").hash
    assert record["features"] == {name: stored.hash for name, stored in teachers.items()}


def test_what_is_believed_follows_the_teacher_and_not_its_name(pairs, teachers):
    """Negative control: with names exchanged the weights go with the features."""
    exchanged = {"for_ct": teachers["for_mri"], "for_mri": teachers["for_ct"]}
    weights = routing.measure(pairs, exchanged, pairs.rows("dev"))["weights"]
    assert weights["ct"] == {"for_ct": 0.0, "for_mri": 1.0}
    assert weights["mri"] == {"for_ct": 1.0, "for_mri": 0.0}


def test_a_modality_of_too_few_pairs_is_left_out(pairs, teachers):
    record = routing.measure(pairs, teachers, pairs.rows("dev"))
    assert record["pairs"] == {"ct": 12, "mri": 12, "pet": 5}
    assert "pet" not in record["weights"]
    few = RowIndex(np.arange(routing.FEWEST - 1), pairs.hash, "few")
    assert routing.measure(pairs, teachers, few)["weights"] == {}
    enough = RowIndex(np.arange(routing.FEWEST), pairs.hash, "enough")
    assert set(routing.measure(pairs, teachers, enough)["weights"]) == {"ct"}


def test_where_nothing_can_be_measured_the_teachers_that_were_made_for_it_are_believed(pairs, teachers):
    declared = {"for_none": ["pet", "ct"], "for_ct": ["pet"], "unknown": ["pet"]}
    record = routing.measure(pairs, teachers, pairs.rows("dev"), declared=declared)
    assert record["weights"]["pet"] == {"for_ct": 1.0, "for_mri": 0.0, "for_none": 1.0}
    assert set(record["strength"]) == {"ct", "mri"}
    assert record["weights"]["ct"] == {"for_ct": 1.0, "for_mri": 0.0, "for_none": 0.0}  # what is measured decides


def test_crops_of_few_pictures_measure_nothing(tmp_path):
    """Twelve pairs of two pictures are two cases; of eight pictures, they are enough."""
    for pictures, measured in ((2, False), (routing.FEWEST - 1, False), (routing.FEWEST, True)):
        with PairsWriter(tmp_path / f"pairs{pictures}", "toy", shards=1) as writer:
            for row in range(12):
                pair = toy.pair(row, 1)
                pair.modality, pair.source, pair.group = "ct", "toy", f"picture {row % pictures}"
                writer.add(pair)
            pairs = writer.finish({"dev": list(range(12))})
        stored = features(tmp_path, pairs, f"t{pictures}", toy.vectors(12, WIDTH), toy.vectors(12, WIDTH, seed=9))
        record = routing.measure(pairs, {"t": stored}, pairs.rows("dev"))
        assert bool(record["weights"]) == measured


def test_copies_of_a_caption_do_not_compete(pairs, tmp_path):
    """Three kinds of caption, four pictures each: a teacher that names the kind has strength 1."""
    captions, text = texts(pairs, 400)
    image = text.copy()
    rows = np.flatnonzero(np.array(MODALITIES) == "mri")
    kinds = sorted({captions[row] for row in rows})
    stored = features(tmp_path, pairs, "t", image, text)
    assert routing.measure(pairs, {"t": stored}, pairs.rows("dev"))["strength"]["mri"]["t"] == 1.0
    vectors = {kind: text[captions.index(kind)] for kind in kinds}
    for row in rows:  # every picture lies nearest to another kind, and second nearest to its own
        next_kind = kinds[(kinds.index(captions[row]) + 1) % 3]
        last_kind = kinds[(kinds.index(captions[row]) + 2) % 3]
        image[row] = vectors[next_kind] + 0.9 * vectors[captions[row]] - 2 * vectors[last_kind]
    stored = features(tmp_path, pairs, "second", image, text)
    expected = strength(stored, pairs, "mri")
    found = routing.measure(pairs, {"t": stored}, pairs.rows("dev"))["strength"]["mri"]["t"]
    np.testing.assert_allclose(found, expected)
    assert found >= 1 / 3  # never worse than last of the three kinds; copies that competed would give less


def test_a_modality_of_one_caption_is_left_out(pairs, tmp_path):
    """Where there is nothing to choose between, every teacher would be perfect."""
    stored = features(tmp_path, pairs, "t", toy.vectors(len(pairs), WIDTH), texts(pairs, 600)[1])
    kind = [row for row, modality in enumerate(MODALITIES) if modality == "mri" and row % 3 == 0]
    one = RowIndex(np.array([*kind, *kind]), pairs.hash, "one kind")
    record = routing.measure(pairs, {"t": stored}, one)
    assert len(one) >= routing.FEWEST
    assert record["pairs"]["mri"] == len(one)
    assert record["weights"] == {}
    two = RowIndex(np.array([*kind, *kind, kind[0] + 1]), pairs.hash, "two kinds")
    assert set(routing.measure(pairs, {"t": stored}, two)["weights"]) == {"mri"}


def test_equal_similarities_give_the_middle_rank(pairs, tmp_path):
    """A teacher that says the same of everything is at chance and not at the top."""
    same = np.tile(toy.vectors(1, WIDTH), (len(pairs), 1))
    stored = features(tmp_path, pairs, "same", same, same)
    found = routing.measure(pairs, {"same": stored}, pairs.rows("dev"))["strength"]
    np.testing.assert_allclose([found["ct"]["same"], found["mri"]["same"]], [1 / 6.5, 1 / 2])


def test_soft_weights_sum_to_one_and_follow_the_strength(pairs, teachers):
    record = routing.measure(pairs, teachers, pairs.rows("dev"), temperature=0.1)
    for modality, weights in record["weights"].items():
        strengths = record["strength"][modality]
        odds = {name: np.exp(value / 0.1) for name, value in strengths.items()}
        for name in weights:
            np.testing.assert_allclose(weights[name], odds[name] / sum(odds.values()), rtol=1e-9)
        assert abs(sum(weights.values()) - 1) < 1e-12
    soft = routing.measure(pairs, teachers, pairs.rows("dev"), temperature=1e6)["weights"]["ct"]
    np.testing.assert_allclose(list(soft.values()), 1 / 3, rtol=1e-4)
    hard = routing.measure(pairs, teachers, pairs.rows("dev"), temperature=1e-4)["weights"]["ct"]
    assert hard["for_ct"] == 1.0
    for wrong in (-1.0, float("nan")):
        with pytest.raises(InputError, match="temperature"):
            routing.measure(pairs, teachers, pairs.rows("dev"), temperature=wrong)


def test_weights_by_teacher_are_the_same_for_every_modality(pairs, teachers):
    """From the mean of the strengths over the measured modalities, however many pairs each has; pet has too few."""
    record = routing.measure(pairs, teachers, pairs.rows("dev"), by="teacher", temperature=0.1)
    means = {name: np.mean([record["strength"][m][name] for m in ("ct", "mri")]) for name in teachers}
    odds = {name: np.exp(value / 0.1) for name, value in means.items()}
    expected = {name: value / sum(odds.values()) for name, value in odds.items()}
    assert set(record["weights"]) == {"ct", "mri", "pet"}
    for weights in record["weights"].values():
        assert weights == pytest.approx(expected, rel=1e-9)
    assert len({round(value, 6) for value in expected.values()}) == 3
    hard = routing.measure(pairs, teachers, pairs.rows("dev"), by="teacher")["weights"]
    best = max(means, key=means.get)
    assert hard["pet"] == {name: float(name == best) for name in teachers}
    with pytest.raises(InputError, match="weights by 'teachers'; did you mean 'teacher'"):
        routing.measure(pairs, teachers, pairs.rows("dev"), by="teachers")
    few = RowIndex(np.arange(routing.FEWEST - 1), pairs.hash, "few")
    with pytest.raises(InputError, match="no modality has enough held-out pairs"):
        routing.measure(pairs, teachers, few, by="teacher")


def test_pools_are_bounded(pairs, teachers, monkeypatch):
    """With pools of four, a caption competes with three others: chance is higher, perfection stays."""
    before = routing.measure(pairs, teachers, pairs.rows("dev"))["strength"]["ct"]
    monkeypatch.setattr(routing, "POOL", 4)
    after = routing.measure(pairs, teachers, pairs.rows("dev"))["strength"]["ct"]
    assert after["for_ct"] == 1.0
    assert after["for_none"] > before["for_none"]


def test_absent_rows_are_refused(pairs, tmp_path):
    _, text = texts(pairs, 500)
    present = np.ones(len(pairs), bool)
    present[3] = False
    stored = features(tmp_path, pairs, "t", text, text, present)
    with pytest.raises(InputError, match="teacher t has no features of some rows"):
        routing.measure(pairs, {"t": stored}, pairs.rows("dev"))
    rest = RowIndex(np.flatnonzero(present), pairs.hash, "rest")
    assert routing.measure(pairs, {"t": stored}, rest)["strength"]["ct"]["t"] == 1.0


def test_a_table_comes_back_from_its_file(pairs, teachers, tmp_path):
    record = routing.measure(pairs, teachers, pairs.rows("dev"), temperature=0.1)
    routing.save(tmp_path / "routing.json", record)
    assert routing.load(tmp_path / "routing.json") == record["weights"]
    stored = io.read_json(tmp_path / "routing.json")
    assert stored.pop("hash") == io.hash_of(stored)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "does not exist"),
        ("{", "is not valid JSON"),
        ("[1]", "is no routing table"),
        ('{"ct": {"a": 1}}', "is no routing table"),
        ('{"weights": {"ct": 1}}', "is no routing table"),
        ('{"weights": {"ct": {"a": "1"}}}', "the weight of a for ct is '1'"),
        ('{"weights": {"ct": {"a": -0.5}}}', "the weight of a for ct is -0.5"),
        ('{"weights": {"ct": {"a": NaN}}}', "the weight of a for ct is nan"),
        ('{"weights": {"ct": {"a": true}}}', "the weight of a for ct is True"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text, says):
    if text is not None:
        (tmp_path / "routing.json").write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        routing.load(tmp_path / "routing.json")
    assert "\n" not in str(caught.value)


def test_command(pairs, teachers, tmp_path, capsys):
    root, out = teachers["for_ct"].path.parent, tmp_path / "routing.json"
    arguments = ["features", "route", str(root), "--pairs", str(pairs.path), "--rows", "dev", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [["ct", "12"], ["mri", "12"], ["pet", "5"]]
    assert "for_ct 1.000 (strength 1.000)" in printed[0]
    assert "not measurable: all teachers alike" in printed[2]
    assert routing.load(out) == routing.measure(pairs, teachers, pairs.rows("dev"))["weights"]
    assert main(arguments) == 0  # the same again
    assert main([*arguments, "--temperature", "0.1"]) == 2
    assert "exists and holds something else; choose another --out" in capsys.readouterr().err
    soft = tmp_path / "soft.json"
    assert main([*arguments[:-1], str(soft), "--temperature", "0.1"]) == 0
    assert json.loads(soft.read_text())["temperature"] == 0.1
    less, alike = tmp_path / "less.json", tmp_path / "alike.json"
    assert main([*arguments[:-1], str(less), "--teachers", "for_mri", "for_none"]) == 0
    assert json.loads(less.read_text())["weights"]["ct"].keys() == {"for_mri", "for_none"}
    assert main([*arguments[:-1], str(alike), "--by", "teacher"]) == 0
    assert set(routing.load(alike)) == {"ct", "mri", "pet"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--rows": "dve"}, "did you mean 'dev'"),
        ({"--pairs": "/nowhere"}, "holds no finished set of pairs"),
        ({"--temperature": "-1"}, "temperature -1.0 is negative"),
        ({"--temperature": "hot"}, "invalid float value"),
        ({"--by": "modalitiy"}, "did you mean 'modality'"),
        ({"--teachers": "for_cd"}, "has no features of teacher 'for_cd'; did you mean 'for_ct'"),
        ({"--rows": None}, "--rows"),
        ({"--pairs": None}, "--pairs"),
        ({"--tempreature": "1"}, "did you mean '--temperature'"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(pairs, teachers, tmp_path, capsys, change, says):
    out = tmp_path / "routing.json"
    options = {"--pairs": str(pairs.path), "--rows": "dev", "--out": str(out), **change}
    given = [part for name, value in options.items() if value is not None for part in (name, value)]
    assert main(["features", "route", str(teachers["for_ct"].path.parent), *given]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_features_of_another_set_are_refused(pairs, teachers, tmp_path, capsys):
    other = toy.make_pairs(tmp_path / "other", rows={"dev": list(range(40))})
    options = ["--pairs", str(other.path), "--rows", "dev", "--out", str(tmp_path / "routing.json")]
    assert main(["features", "route", str(teachers["for_ct"].path.parent), *options]) == 2
    assert "are features of another set of pairs" in capsys.readouterr().err
