"""Diagnosis of slides: from tiles to numbers and a page, leakage, attention that finds what decides, wrong tables."""

import csv
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from mmkd_jax import cli, io
from mmkd_jax import config as configs
from mmkd_jax.data import made_slides
from mmkd_jax.errors import InputError
from mmkd_jax.evals import diagnosis, diagnosis_study, results, studies
from mmkd_jax.report import heatmap

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
COLOURS = {"red": (200, 40, 60), "green": (60, 190, 70), "blue": (50, 60, 200)}
MADE = ("--config.made.positive=red", "--config.made.negative=('green', 'blue')", "--config.made.side=3")
SIZES = ("--config.made.train=48", "--config.made.val=16", "--config.made.test=24")


def tar_of_tiles(folder, per_class: int = 40):
    """A WebDataset of coloured tiles with noise, half for testing."""
    import io as memory
    import tarfile

    folder.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "toy.tar", "w") as tar:
        for k in range(3 * per_class):
            label = list(COLOURS)[k % 3]
            pixels = np.array(COLOURS[label]) + rng.normal(0, 25, 3) + rng.normal(0, 20, (16, 16, 3))
            stream = memory.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
            told = {"key": f"t{k:03d}", "set": "toy", "label": label, "label_id": k % 3, "caption": label,
                    "split": "test" if k % 2 else "train", "group": str(k)}  # fmt: skip
            for ending, data in (("jpg", stream.getvalue()), ("json", json.dumps(told).encode())):
                member = tarfile.TarInfo(f"t{k:03d}.{ending}")
                member.size = len(data)
                tar.addfile(member, memory.BytesIO(data))
    (folder / "classes.json").write_text(json.dumps(list(COLOURS)))
    return folder


class Colours:
    """An encoder of tiles whose features are mean colours among features without meaning."""

    name, checkpoint, identity = "colours", "", "1"

    def encode_image(self, pictures):
        means = np.stack([np.asarray(one, np.float32).mean((0, 1)) / 255 for one in pictures])
        return np.concatenate([means, np.sin(1e3 * means)], axis=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    tiles = tar_of_tiles(tmp_path_factory.mktemp("tiles") / "toy")
    asked = [
        f"--config.tiles={tiles}",
        *MADE,
        *SIZES,
        "--config.heads.steps=30",
        "--config.heads.checkpoints=1",
        "--config.heads.lr=1e-2",
    ]
    return configs.load(f"{CONFIGS}/diagnosis.py:made", asked)


@pytest.fixture(scope="module")
def evaluated(config, tmp_path_factory, quick_compilation):
    out = io.as_path(tmp_path_factory.mktemp("out"))
    page = studies.run(config, out, [Colours()], resamples=200, seed=0)
    return out, page


def test_slides_are_told_apart_and_attention_finds_the_tiles(evaluated):
    out, _ = evaluated
    rows = {(row["task"], row["metric"]): row for row in results.load(out / "results.json")}
    assert rows["diagnosis_attention", "macro_auc"]["low"] > 0.8
    assert rows["diagnosis_attention", "attention_auc"]["low"] > 0.9
    assert rows["diagnosis_probe", "macro_auc"]["value"] > 0.8
    assert ("diagnosis_probe", "attention_auc") not in rows
    assert all(row["n"] == 24 and row["model"] == "colours" and row["low"] <= row["value"] for row in rows.values())
    stored = results.load_predictions(out, "colours", "made", "diagnosis_attention")
    assert stored["scores"].shape == (24, 2)
    assert (stored["scores"].argmax(1) == stored["labels"]).mean() == rows["diagnosis_attention", "accuracy"]["value"]


def test_the_page_and_the_heat_maps(evaluated, config):
    out, page = evaluated
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 2 * config.pictures
    assert "deciding tiles" in text
    assert "Blue frames" in text
    page.unlink()
    assert cli.main(["report", str(out)]) == 0
    assert page.read_text() == text  # from what was saved
    drawn = sorted((out / "heatmaps" / "colours").iterdir())
    assert len(drawn) == config.pictures
    with Image.open(drawn[0]) as picture:
        assert picture.size == (48, 48)


def test_made_slides_are_what_they_say(config, evaluated, tmp_path):
    out, _ = evaluated
    folder = made_slides.make(config.tiles, out, **configs.to_dict(config.made))  # made once
    table = diagnosis_study.read(config, folder)
    truth = diagnosis_study.positives(folder / "tiles.csv")
    assert [(table.splits == name).sum() for name in ("train", "val", "test")] == [48, 16, 24]
    for name, label in zip(table.names, table.labels):
        known = truth[str(name)]
        assert len(known) == 9
        assert (1 <= sum(known.values()) <= 2) == (table.classes[label] == "positive")
        for (x, y), positive in list(known.items())[:3]:
            with Image.open(folder / "slides" / name / f"{x}_{y}.jpg") as tile:
                mean = np.asarray(tile).mean((0, 1))
            assert (mean.argmax() == 0) == positive  # red
    with pytest.raises(InputError, match="no class 'rde'; did you mean 'red'"):
        made_slides.make(config.tiles, tmp_path, **{**configs.to_dict(config.made), "positive": "rde"})
    with pytest.raises(InputError, match="needs as many of the negative classes"):
        made_slides.make(config.tiles, tmp_path, **{**configs.to_dict(config.made), "side": 9})
    assert not list(tmp_path.iterdir())


def features(folder, n: int = 90, seed: int = 0):
    """Bags whose mean depends on the label, as files; `slides.csv` of patients with one or two slides."""
    rng = np.random.default_rng(seed)
    (folder / "features").mkdir(parents=True)
    rows = []
    for k in range(n):
        patient, split = k // 2, ("train", "train", "test")[(k // 2) % 3]
        label = patient % 2
        x = rng.normal(size=(rng.integers(5, 9), 6)) + 0.8 * label * np.eye(1, 6)
        np.save(folder / "features" / f"s{k}.npy", x.astype(np.float32))
        rows.append([f"s{k}", f"p{patient}", ("benign", "malignant")[label], split])
    return rows


def write(folder, rows, heading=("slide", "patient", "label", "split")) -> None:
    with open(folder / "slides.csv", "w", newline="") as file:
        csv.writer(file).writerows([heading, *rows])


def scores(folder, models=("probe",), seed: int = 0, **heads) -> dict[str, dict]:
    asked = [f"--config.root={folder}", f"--config.features={folder / 'features'}", f"--config.models={models!r}"]
    asked += [f"--config.heads.{name}={value}" for name, value in heads.items()]
    out = io.as_path(folder / f"out{seed}")
    studies.run(configs.load(f"{CONFIGS}/diagnosis.py", asked), out, (), resamples=300, seed=seed)
    return {(row["task"], row["metric"]): row for row in results.load(out / "results.json")}


def permuted(rows, seed: int):
    """The labels of patients, drawn anew."""
    patients = sorted({row[1] for row in rows})
    labels = {row[1]: row[2] for row in rows}
    drawn = np.random.default_rng(seed).permutation([labels[patient] for patient in patients])
    told = dict(zip(patients, drawn))
    return [[slide, patient, told[patient], split] for slide, patient, _, split in rows]


def test_features_from_files_and_permuted_labels_give_chance(tmp_path):
    rows = features(tmp_path / "a")
    write(tmp_path / "a", rows)
    found = scores(tmp_path / "a")
    assert found["diagnosis_probe", "macro_auc"]["low"] > 0.6
    assert found["diagnosis_probe", "macro_auc"]["model"] == "features:features"
    inside = []
    for seed in range(6):
        write(tmp_path / "a", permuted(rows, seed))
        row = scores(tmp_path / "a", seed=seed + 1)["diagnosis_probe", "macro_auc"]
        inside.append(row["low"] < 0.5 < row["high"])
    assert sum(inside) >= 5  # 95 % intervals


@pytest.mark.full
def test_attention_with_permuted_labels_is_at_chance(tmp_path):
    rows = features(tmp_path / "a", 180)
    inside = []
    for seed in range(5):
        write(tmp_path / "a", permuted(rows, seed))
        asked = {"models": ("attention",), "steps": 60, "checkpoints": 2}
        row = scores(tmp_path / "a", seed=seed, **asked)["diagnosis_attention", "macro_auc"]
        inside.append(row["low"] < 0.5 < row["high"])
    assert sum(inside) >= 4
    write(tmp_path / "a", rows)
    found = scores(tmp_path / "a", seed=9, models=("attention",), steps=60, checkpoints=2)
    assert found["diagnosis_attention", "macro_auc"]["low"] > 0.6


@pytest.mark.parametrize(
    ("record", "message"),
    [("[]", "is no record of a study"), ('{"task": "diagnosis", "name": "x"}', "lacks what its page shows")],
)
def test_damaged_records_of_studies(tmp_path, record, message, capsys):
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "x.json").write_text(record)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_attention_as_a_detector():
    truth = [np.array([1, 0, 0, 1], bool), np.array([0, 0], bool), np.array([0, 1], bool)]
    weights = [np.array([0.4, 0.1, 0.2, 0.3]), np.array([0.5, 0.5]), np.array([0.9, 0.1])]
    found = diagnosis.finds(weights, truth, 100, 0)
    assert found.value == 0.5  # 1 of the first slide, 0 of the last; the other has nothing to find
    assert set(found.replicates) <= {0.0, 0.5, 1.0}
    with pytest.raises(InputError, match="no tested slide has tiles that are known to matter"):
        diagnosis.finds(weights[1:2], truth[1:2], 100, 0)


def test_heat_maps_show_ranks_and_places():
    attention = np.array([0.7, 0.1, 0.15, 0.05])
    assert heatmap.ranks(attention).tolist() == [1.0, 1 / 3, 2 / 3, 0.0]
    light = heatmap.colours(np.linspace(0, 1, 50)).astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(light) > 0).all()  # it is read without colours
    places = np.array([[0, 0], [100, 0], [0, 100], [100, 100]])
    white = Image.new("RGB", (50, 50), "white")
    drawn = np.asarray(heatmap.draw(white, places, 100, (200, 200), attention, np.array([False, True, False, False])))
    centres = drawn[[12, 12, 37, 37], [12, 37, 12, 37]].astype(float)
    assert centres.sum(1).argsort().tolist() == [3, 1, 2, 0]  # least attention is darkest
    assert tuple(drawn[0, 26]) == (0, 200, 255)  # the frame
    assert tuple(drawn[0, 5]) != (0, 200, 255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [["s0", "p1", "benign", "test"], *rows[1:]], "patient 'p1' is in two splits|patient 'p0' is in"),
        (lambda rows: [[*row[:3], "train"] for row in rows], "no slide has the split 'test'"),
        (lambda rows: [[*row[:2], "benign", row[3]] for row in rows], "training slides have one class"),
        (lambda rows: [*rows, rows[0]], "slide 's0' comes twice"),
        (lambda rows: [[*row[:3], "dev"] for row in rows], "has the split 'dev', not train, val or test"),
        (lambda rows: [*rows, ["s99", "p99", "benign", "train"]], r"there is no file of features .*s99\.npy"),
        (lambda rows: [], "has no rows"),
    ],
)
def test_wrong_tables(tmp_path, change, message, capsys):
    """One line, exit code 2, and no results."""
    rows = change(features(tmp_path / "a", 24))
    if "two splits" in message:
        rows[1] = ["s1", "p1", "benign", "train"]
    write(tmp_path / "a", rows)
    asked = ["eval", "--config", f"{CONFIGS}/diagnosis.py", f"--config.root={tmp_path / 'a'}"]
    asked += [f"--config.features={tmp_path / 'a' / 'features'}", "--out", str(tmp_path / "out")]
    assert cli.main(asked) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    import re

    assert re.search(message, said), said
    assert not (tmp_path / "out" / "results.json").exists()


def test_wrong_questions(tmp_path, capsys):
    write(tmp_path, features(tmp_path, 24))
    base = ["eval", "--config", f"{CONFIGS}/diagnosis.py", "--out", str(tmp_path / "out")]
    stored = f"--config.features={tmp_path / 'features'}"
    for more, message in (
        ([], "no folder of slides is given"),
        ([f"--config.root={tmp_path}"], "nothing encodes the slides"),
        ([f"--config.root={tmp_path}", stored, "--config.label=dx"], "no column 'dx'"),
        ([f"--config.root={tmp_path}", stored, "--config.models=('attentoin',)"], "did you mean 'attention'"),
        ([f"--config.root={tmp_path}", stored, "--pairs", "x"], "--pairs does not go with --config"),
        ([f"--config.root={tmp_path}", stored, "--config.classes=('benign', 'malign')"], "has the label 'malignant'"),
        ([f"--config.root={tmp_path}", stored, "--config.task=diagnosys"], "did you mean 'diagnosis'"),
    ):
        assert cli.main([*base, *more]) == 2, more
        assert message in capsys.readouterr().err


def test_one_patient_of_two_splits_is_refused_where_slides_are_made_by_hand():
    with pytest.raises(InputError, match="patient 'a' is in two splits"):
        diagnosis.Slides(
            np.array(["1", "2"]), np.array(["a", "a"]), np.array([0, 1]), np.array(["train", "test"]), ("x", "y")
        )
