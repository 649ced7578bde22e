"""What stored features look like, against plain loops, and on the features published with MMKD-CLIP."""

import json
import re

import data_fixtures as toy
import numpy as np
import pytest

from mmkd_jax import cli
from mmkd_jax.data import agreement, ingest, released
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.sources import open_source
from mmkd_jax.report import feature_plots
from mmkd_jax.report import features as report

ROWS = 24


def cosine(a, b) -> float:
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pairs and three teachers, two of one width."""
    root = tmp_path_factory.mktemp("world")
    pairs = toy.make_pairs(root / "pairs", ROWS)
    widths = {"a": 6, "b": 6, "c": 9}
    features = {
        name: toy.make_features(root / "features" / name, pairs, seed, teacher=name, width=width, dtype="float32")
        for seed, (name, width) in enumerate(widths.items())
    }
    return pairs, features


def vectors(one, row) -> dict:
    found = one.read([row], [0], [0])
    return {tower: found[tower][0].astype(np.float64) for tower in ("image", "text")}


def here(pairs) -> list[int]:
    return [row for row in range(len(pairs)) if not toy.absent(len(pairs))[row]]


def test_a_set_alone_equals_loops(world):
    pairs, features = world
    found = agreement.measure(pairs, features)["sets"]
    for name, one in features.items():
        rows = [vectors(one, row) for row in here(pairs)]
        mine = found[name]
        assert (mine["width"], mine["sampled"], mine["license"]) == (one.width, len(rows), "CC0")
        for tower in ("image", "text"):
            np.testing.assert_allclose(mine[f"{tower}_norm"], np.mean([np.linalg.norm(v[tower]) for v in rows]))
            pairs_of = [cosine(v[tower], w[tower]) for v in rows for w in rows if v is not w]
            np.testing.assert_allclose(mine[f"{tower}_within"], np.mean(pairs_of), atol=1e-12)
        np.testing.assert_allclose(mine["matched"], np.mean([cosine(v["image"], v["text"]) for v in rows]), atol=1e-12)
        for modality, values in mine["by_modality"].items():
            of_it = [
                v for v, row in zip(rows, here(pairs)) if pairs.modalities[pairs.table["modality"][row]] == modality
            ]
            first = [all(cosine(v["image"], v["text"]) >= cosine(v["image"], w["text"]) for w in of_it) for v in of_it]
            np.testing.assert_allclose(values["r_at_1"], np.mean(first))
            assert values["rows"] == len(of_it)


def test_two_sets_equal_loops(world):
    pairs, features = world
    found = {tuple(one["sets"]): one for one in agreement.measure(pairs, features)["pairs"]}
    assert set(found) == {("a", "b"), ("a", "c"), ("b", "c")}
    rows = {name: [vectors(one, row) for row in here(pairs)] for name, one in features.items()}
    n = len(rows["a"])
    for (x, y), mine in found.items():
        both = [[cosine(v["image"], w["text"]) for v in rows[name] for w in rows[name]] for name in (x, y)]
        np.testing.assert_allclose(mine["agreement"], np.corrcoef(*both)[0, 1], atol=1e-12)
        assert ("same" in mine) == ((x, y) == ("a", "b"))
    same = [cosine(rows["a"][i]["image"], rows["b"][i]["image"]) for i in range(n)]
    apart = [cosine(rows["a"][i]["text"], rows["b"][j]["text"]) for i in range(n) for j in range(n) if i != j]
    np.testing.assert_allclose(found["a", "b"]["same"]["image"], [min(same), np.mean(same), max(same)], atol=1e-12)
    np.testing.assert_allclose(
        found["a", "b"]["different"]["text"], [min(apart), np.mean(apart), max(apart)], atol=1e-12
    )
    assert found["a", "b"]["agreement"] < 0.5  # unrelated teachers do not agree


def test_a_teacher_agrees_with_itself_turned_round(world):
    """An orthogonal map changes every number and nothing of what is alike."""
    _, features = world
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    one = agreement._read(features["a"], np.arange(ROWS))
    turned = {**one, "image": one["image"] @ turn, "text": one["text"] @ turn}
    found = agreement.between(one, turned, np.array(["ct"] * ROWS), distances=True)
    assert found["agreement"] == pytest.approx(1)
    assert found["distances"]["image"] == pytest.approx(1)
    assert abs(found["same"]["image"][1]) < 0.9


def test_effective_rank_counts_directions():
    assert agreement.effective_rank(np.diag([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert agreement.effective_rank(np.diag([1.0, 0.0])) == pytest.approx(1)
    assert 1 < agreement.effective_rank(np.diag([1.0, 0.1])) < 2


def test_command_prints_a_table_and_writes_a_page(world, tmp_path, capsys):
    pairs, features = world
    root = str(features["a"].path.parent)
    command = ["features", "stats", root, "--pairs", str(pairs.path)]
    assert cli.main([*command, "--out", str(tmp_path / "stats"), "--sample", "20"]) == 0
    printed = capsys.readouterr().out.splitlines()
    record = agreement.measure(pairs, features, sample=20)
    assert printed[0].split()[:4] == ["set", "teacher", "pairs", "width"]
    assert printed[0].split()[-2:] == ["licence", "hash"]
    assert [line.split()[0] for line in printed[1:4]] == ["a", "b", "c"]
    assert [line.split()[-1] for line in printed[1:4]] == [one.hash[:12] for one in features.values()]
    assert printed[6].split() == ["set", *record["modalities"]]
    ct = record["sets"]["a"]["by_modality"]["ct"]
    assert f"{ct['matched']:.3f} / {ct['r_at_1']:.3f} ({ct['rows']})" in printed[7]
    assert json.loads((tmp_path / "stats" / "stats.json").read_text()) == record
    page = (tmp_path / "stats" / "stats.html").read_text()
    assert "http" not in page
    for name in (*features, *record["modalities"], "Where each is strong", "How far they agree", "CC0"):
        assert f">{name}<" in page, name
    assert f"{record['pairs'][0]['agreement']:.2f}".replace("-", "−") in page
    check_plots(page, record)
    assert cli.main(["features", "stats", root]) == 2
    assert "--pairs" in capsys.readouterr().err
    assert cli.main([*command, "--sample", "1"]) == 2
    assert "give at least 2" in capsys.readouterr().err


def check_plots(page, record):
    """Marks of every teacher and modality, and a square of shades for each modality; without numbers, none."""
    names, modalities = list(record["sets"]), record["modalities"]
    for value in ("r_at_1", "matched"):
        plot = feature_plots.dots(record, value, "a title", 1000)
        for name in names:
            for modality in modalities:
                number = record["sets"][name]["by_modality"][modality][value]
                assert f"<title>{name}, {modality}: {number:.3f}</title>" in plot
                assert f"{name}, {modality}: {number:.3f}" in page
        if value == "r_at_1":  # from 0 at pixel 200 to 1 at pixel 970; the first teacher's marks are circles
            shares = [record["sets"]["a"]["by_modality"][m][value] for m in modalities]
            places = [float(x) for x in re.findall(r'<circle cx="([-0-9.]+)"', plot)]
            np.testing.assert_allclose(places[1:], [200 + 770 * share for share in shares], atol=0.006)
    for modality in (None, *modalities):
        drawn = feature_plots.grid(record, modality)
        assert drawn in page
        assert drawn.count("<rect") == len(names) ** 2
    first = record["pairs"][0]
    number = first["by_modality"]["ct"]
    assert f"<title>a and b: {number:.3f}</title>" in feature_plots.grid(record, "ct")
    assert f"<title>a and b: {number:.3f}</title>" not in feature_plots.grid(record, None)
    alone = {**record, "pairs": []}
    assert feature_plots.grid(alone, "ct") is None


def test_across_is_the_mean_over_other_teachers_of_one_width_and_space(world):
    pairs, features = world
    record = agreement.measure(pairs, features)
    same = [cosine(vectors(features["a"], row)["image"], vectors(features["b"], row)["image"]) for row in here(pairs)]
    assert report.across(record, "a")["image"] == pytest.approx(np.mean(same), abs=1e-12)
    assert report.across(record, "b") == report.across(record, "a")
    assert report.across(record, "c") == {"image": None, "text": None}  # another width
    record["sets"]["b"]["teacher"] = "a"  # the same teacher, as in another space
    assert report.across(record, "a") == {"image": None, "text": None}


def test_a_sample_is_bounded_and_drawn_by_the_seed(world):
    pairs, features = world
    assert agreement.measure(pairs, features, sample=10)["rows"] == 10
    a, b = (agreement.measure(pairs, features, sample=10, seed=seed) for seed in (0, 1))
    assert a != b
    assert json.dumps(a) == json.dumps(agreement.measure(pairs, features, sample=10, seed=0))


def test_the_published_features_have_the_geometry_that_a_script_finds(mmkd_data, tmp_path):
    """Numbers of the six published samples against loops over the authors' files."""
    torch = pytest.importorskip("torch", reason="torch reads the authors' files independently")
    folder = mmkd_data / "mmkd_clip_demo"
    if not folder.is_dir():
        pytest.skip("needs mmkd_clip_demo, the published samples, in MMKD_DATA")
    pairs = ingest.ingest(open_source("mmkd_release", [str(folder)]), tmp_path / "pairs")
    released.import_features([str(folder)], pairs, tmp_path / "features")
    sets = {
        f"{space}/{path.parent.name}": FeatureSet.open(path.parent, pairs)
        for space in ("native", "projected")
        for path in sorted((tmp_path / "features" / space).glob("*/manifest.json"))
    }
    found = agreement.measure(pairs, sets)
    lines = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    stored = {}
    for space, file in (("native", "clips_output.pt"), ("projected", "clips_project_output.pt")):
        for i, line in enumerate(lines):
            tensors = torch.load(folder / "features" / line["folderid"] / line["id"] / file, weights_only=True)
            for key, value in tensors.items():
                name, _, end = key.rpartition("_")
                tower = {"img": "image", "txt": "text"}[end]
                stored[space, name, tower, i] = value.double().numpy().reshape(-1)
    names = sorted({name for _, name, _, _ in stored})
    for name in names:
        rows = [i for i in range(len(lines)) if ("native", name, "image", i) in stored]
        for space in ("native", "projected"):
            get = lambda tower, i, space=space, name=name: stored[space, name, tower, i]  # noqa: E731
            mine = found["sets"][f"{space}/{name}"]
            matched = [cosine(get("image", i), get("text", i)) for i in rows]
            assert mine["matched"] == pytest.approx(np.mean(matched), abs=1e-6)
            for tower in ("image", "text"):
                norm = np.mean([np.linalg.norm(get(tower, i)) for i in rows])
                assert mine[f"{tower}_norm"] == pytest.approx(norm, abs=1e-6)
                assert (abs(norm - 1) < 1e-4) == (space == "native")
    between = {tuple(one["sets"]): one for one in found["pairs"]}
    for a in names:
        for b in names[names.index(a) + 1 :]:
            rows = [i for i in range(len(lines)) if all(("projected", n, "image", i) in stored for n in (a, b))]
            mine = between[f"projected/{a}", f"projected/{b}"]
            same = [cosine(stored["projected", a, "image", i], stored["projected", b, "image", i]) for i in rows]
            if rows:
                np.testing.assert_allclose(mine["same"]["image"], [min(same), np.mean(same), max(same)], atol=1e-6)
    whole = [name for name in names if found["sets"][f"native/{name}"]["sampled"] == len(lines)]
    assert len(whole) >= 3
    for name in whole:
        far = {
            space: [
                np.linalg.norm(stored[space, name, "image", i] - stored[space, name, "image", j])
                for i in range(len(lines))
                for j in range(i)
            ]
            for space in ("native", "projected")
        }
        mine = between[f"native/{name}", f"projected/{name}"]["distances"]["image"]
        assert mine == pytest.approx(np.corrcoef(far["native"], far["projected"])[0, 1], abs=1e-6)
    check_mean(found["mean"]["projected, width 512"], stored, names, len(lines))


def check_mean(mine, stored, names, n):
    """The mean over a sample's teachers, and its cosines against the mean of the teachers' cosines."""
    has = {i: [name for name in names if ("projected", name, "image", i) in stored] for i in range(n)}
    mean = {
        (tower, i): np.mean([stored["projected", name, tower, i] for name in has[i]], axis=0)
        for tower in ("image", "text")
        for i in range(n)
    }
    norms = [np.linalg.norm(mean["image", i]) for i in range(n)]
    np.testing.assert_allclose(mine["norm"]["image"], [min(norms), np.mean(norms), max(norms)], atol=1e-6)
    together, apart = [], []
    for i in range(n):
        for j in range(n):
            both = [name for name in has[i] if name in has[j]]
            if both:
                together.append(cosine(mean["image", i], mean["text", j]))
                values = [cosine(stored["projected", m, "image", i], stored["projected", m, "text", j]) for m in both]
                apart.append(np.mean(values))
    assert mine["agreement"] == pytest.approx(np.corrcoef(together, apart)[0, 1], abs=1e-6)
