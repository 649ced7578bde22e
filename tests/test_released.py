"""MMKD-CLIP's published data: imported whole, faults named one by one, and recipe `public` on it against torch."""

import json
import pickle

import data_fixtures as toy
import jax.numpy as jnp
import numpy as np
import pytest

from mmkd_jax import cli
from mmkd_jax.data import ingest, released
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.pairs import PairsSet, pair_id
from mmkd_jax.data.selection import Selection
from mmkd_jax.data.sources import open_source
from mmkd_jax.errors import InputError
from mmkd_jax.models import pickles
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower
from mmkd_jax.tasks import distill, targets
from mmkd_jax.tasks.base import Features
from mmkd_jax.train import setup

WIDTHS = {"Alpha": 6, "Beta": 10}
PROJECTED = 8
KEPT = [("Alpha", "Beta"), ("Alpha",), ("Beta",), ("Alpha", "Beta")]


def sample(place, number: int, teachers) -> dict[str, dict[str, np.ndarray]]:
    """Picture, metadata and both pickles of a sample; gives what the pickles hold."""
    place.mkdir(parents=True)
    (place / "figure.jpg").write_bytes(toy.picture(number))
    labels = {
        "image_secondary_label": ["Endoscopy"],
        "article_accession_id": f"PMC{number}",
        "article_license": "CC BY",
    }
    (place / "figure.json").write_text(json.dumps(labels))
    stored = {"clips_output.pt": {}, "clips_project_output.pt": {}}
    for seed, name in enumerate(teachers):
        for end, more in (("img", 0), ("txt", 50)):
            vector = toy.vectors(1, WIDTHS[name], seed=100 * number + seed + more)[0]
            stored["clips_output.pt"][f"{name}_{end}"] = vector
            wide = 2.0 * toy.vectors(1, PROJECTED, seed=100 * number + seed + more + 7)[0]
            stored["clips_project_output.pt"][f"{name}_{end}"] = wide
    for file, vectors in stored.items():
        pickles.write(place / file, vectors)
    return stored


def release(folder) -> list[dict]:
    """Four samples in the published layout; gives what each holds."""
    lines, stored = [], []
    for number, teachers in enumerate(KEPT):
        path = f"features/data_1/s{number}"
        stored.append(sample(folder / path, number, teachers))
        line = {"folderid": "data_1", "id": f"s{number}", "imgpath": f"{path}/figure.jpg"}
        line |= {"metapath": f"{path}/figure.json", "txt": f"figure {number}", "available_clips": list(teachers)}
        lines.append(json.dumps(line))
    (folder / "meta.jsonl").write_text("\n".join(lines) + "\n")
    return stored


def imported(folder, out, **options):
    """The pairs and the summary of an import."""
    pairs = ingest.ingest(open_source("mmkd_release", [str(folder)]), out / "pairs", max_bad=0.5, **options)
    return pairs, released.import_features([str(folder)], pairs, out / "features")


def read(out, space, name, pairs, row) -> dict[str, np.ndarray]:
    zero = np.zeros(1, np.int64)
    return FeatureSet.open(out / "features" / space / name, pairs).read(np.array([row]), zero, zero)


def test_all_that_was_published_comes_through_unchanged(tmp_path):
    stored = release(tmp_path / "release")
    pairs, summary = imported(tmp_path / "release", tmp_path)
    assert summary["problems"] == {}
    assert summary["features"] == {f"{s}/{n}": 3 for s in ("native", "projected") for n in WIDTHS}
    for number, teachers in enumerate(KEPT):
        row = pairs.ids(np.arange(4)).index(pair_id("mmkd_release", f"data_1/s{number}"))
        pair = pairs.read(row)
        assert (pair.captions, pair.modality, pair.license) == ([f"figure {number}"], "endoscopy", "CC BY")
        assert pair.article == f"PMC{number}"
        for space, file in (("native", "clips_output.pt"), ("projected", "clips_project_output.pt")):
            for name in WIDTHS:
                found = read(tmp_path, space, name, pairs, row)
                assert found["present"][0] == (name in teachers)
                for tower, end in (("image", "img"), ("text", "txt")) if name in teachers else ():
                    np.testing.assert_array_equal(found[tower][0], stored[number][file][f"{name}_{end}"])
        selection = Selection.load(tmp_path / "features" / "selection.npz").check(pairs, list(WIDTHS))
        assert [name for name in selection.teachers if selection.of(name)[row]] == sorted(teachers)
    again = released.import_features([str(tmp_path / "release")], pairs, tmp_path / "features")
    assert again == summary


class Run:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_faults_are_named_by_sample_and_cost_nothing_else(tmp_path):
    folder, ran = tmp_path / "release", tmp_path / "ran"
    stored = release(folder)
    place = folder / "features" / "data_1"
    (place / "s0" / "clips_project_output.pt").unlink()
    (place / "s1" / "clips_output.pt").write_bytes(pickle.dumps({"Alpha_img": Run(ran)}))
    ragged = dict(stored[3]["clips_output.pt"])
    ragged["Beta_img"] = ragged["Beta_img"][:-1]
    ragged["Alpha_txt"] = 2 * ragged["Alpha_txt"]
    pickles.write(place / "s3" / "clips_output.pt", ragged)
    broken = {**stored[3]["clips_project_output.pt"], "Alpha_img": np.full(PROJECTED, np.nan, np.float32)}
    broken["Gamma_img"] = broken["Gamma_txt"] = np.ones(PROJECTED, np.float32)
    del broken["Beta_txt"]
    pickles.write(place / "s3" / "clips_project_output.pt", broken)
    with (folder / "meta.jsonl").open("a") as meta:
        meta.write('{"id": "half"}\n')
        outside = {"folderid": "..", "id": "x", "imgpath": "../../secret", "metapath": "m", "txt": "t"}
        meta.write(json.dumps({**outside, "available_clips": []}) + "\n")
    pairs, summary = imported(folder, tmp_path)
    assert len(pairs) == 4
    assert not ran.exists()
    problems = [json.loads(line) for line in (tmp_path / "features" / "problems.jsonl").read_text().splitlines()]
    named = {(p["key"].split("/")[1], p["file"].split("_")[1], p.get("teacher", "")): p["reason"] for p in problems}
    assert named == {
        ("s0", "project", ""): "missing",
        ("s1", "output.pt", ""): "not readable",
        ("s3", "output.pt", "Beta"): "another width than the teacher's",
        ("s3", "output.pt", "Alpha"): "not of unit length",
        ("s3", "project", "Alpha"): "not finite or zero",
        ("s3", "project", "Beta"): "picture or text without the other",
        ("s3", "project", "Gamma"): "a teacher that no sample names",
    }
    assert sum(summary["problems"].values()) == len(problems)
    assert summary["features"] == {"native/Alpha": 1, "native/Beta": 2, "projected/Alpha": 1, "projected/Beta": 1}
    skipped = (tmp_path / "pairs" / "skipped.jsonl").read_text()
    assert "line 5" in skipped
    assert "outside of the folder" in skipped
    for name in ("native/Alpha", "projected/Beta"):
        FeatureSet.open(tmp_path / "features" / name, pairs).verify()


def test_command_and_wrong_input(tmp_path, capsys):
    release(tmp_path / "release")
    given = ["--input", str(tmp_path / "release"), "--out", str(tmp_path / "pairs")]
    assert cli.main(["ingest", "mmkd_release", *given, "--features", str(tmp_path / "features")]) == 0
    assert "native/Alpha" in capsys.readouterr().out
    assert PairsSet.open(tmp_path / "pairs").rows("train").rows.size == 4
    (tmp_path / "empty").mkdir()
    other = toy.make_pairs(tmp_path / "other")
    with pytest.raises(InputError, match=r"no sample of .* is a pair of"):
        released.import_features([str(tmp_path / "release")], other, tmp_path / "nothing")
    for arguments, says in (
        (["mmkd_release", "--input", str(tmp_path / "empty"), "--out", str(tmp_path / "new")], "does not exist"),
        (["sample", "--out", str(tmp_path / "new"), "--features", str(tmp_path / "f")], "brings no features along"),
    ):
        assert cli.main(["ingest", *arguments]) == 2
        complaint = capsys.readouterr().err
        assert says in complaint
        assert complaint.count("\n") == 1
        assert not (tmp_path / "new").exists()


def test_the_published_samples_train_by_recipe_public_as_torch_says(mmkd_data, tmp_path):
    """Loss terms of the draw on the real projected features, from the formulas."""
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    folder = mmkd_data / "mmkd_clip_demo"
    if not folder.is_dir():
        pytest.skip("needs mmkd_clip_demo, the published samples, in MMKD_DATA")
    pairs, summary = imported(folder, tmp_path)
    assert summary["problems"] == {}
    n, embed = len(pairs), 512
    rows, zeros = np.arange(n), np.zeros(n, np.int64)
    names = sorted(name.split("/")[1] for name in summary["features"] if name.startswith("projected/"))
    sets = {name: FeatureSet.open(tmp_path / "features" / "projected" / name, pairs) for name in names}
    stored = {name: one.read(rows, zeros, zeros) for name, one in sets.items()}
    spec = ModelSpec(
        image=ImageTower(16, 1, 2, 16, 32, 32),
        text=TextTower(width=16, layers=1, heads=2, mlp_width=32, vocab_size=60, positions=16, context=16),
        embed=embed,
        preprocess=Preprocess(size=32),
    )
    task = distill.DistillTask(
        spec, [setup.teacher_target(sets[name]) for name in names], distill.Recipe(), np.ones((1, len(names))), seed=3
    )
    student = {t: toy.vectors(n, embed, seed=i) for i, t in enumerate(("image", "text"))}
    batch = {"modality": np.zeros(n, np.int32), "targets": stored}
    params = {"logit_scale": jnp.asarray(2.5)}
    _, reports, _ = task.objective(params, Features(**student), batch, jnp.asarray(4))

    present = {name: jnp.asarray(stored[name]["present"]) for name in names}
    drawn = {name: np.asarray(x) for name, x in targets.draw_teacher(present, 3, jnp.asarray(4)).items()}
    chosen = [next(name for name in names if drawn[name][i]) for i in range(n)]
    assert len(set(chosen)) > 1
    goal = {t: torch.tensor(np.stack([stored[c][t][i] for i, c in enumerate(chosen)])).double() for t in student}
    ours = {t: torch.tensor(x).double() for t, x in student.items()}
    feature = sum(((ours[t] - goal[t]) ** 2).mean() for t in student)
    scale, labels = np.log(1 / 0.07), torch.arange(n)
    entropy = torch.nn.functional.cross_entropy
    icl = sum(entropy(scale * ours[a] @ goal[b].T, labels) for a, b in (("image", "text"), ("text", "image"))) / 2
    np.testing.assert_allclose(reports["loss/feature"], feature.item(), rtol=1e-6)
    np.testing.assert_allclose(reports["loss/icl"], icl.item(), rtol=1e-6)
    assert min(np.linalg.norm(stored[c]["image"][i]) for i, c in enumerate(chosen)) > 1.05  # as they were published
