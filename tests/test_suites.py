"""Suites: which sets, what is absent, and means that are taken only where nothing is."""

import csv
import json

import numpy as np
import pytest
import set_fixtures
from test_evals_sets import Pixels

from mmkd_jax.cli import main
from mmkd_jax.errors import InputError
from mmkd_jax.evals import base, results, sets, suites
from mmkd_jax.evals.suites import Mean, Suite
from mmkd_jax.evals.suites import studies as suite_studies


def test_every_suite_names_sets_that_are_known():
    known = suites.known()
    assert {"medmnist12", "unimed21", "six-tasks"} <= set(known)
    assert len(known["medmnist12"].sets) == 12
    assert len(known["unimed21"].sets) == 21
    for suite in known.values():
        assert set(suite.sets) <= set(sets.known()), suite.name
        assert len(set(suite.sets)) == len(suite.sets), suite.name
        assert set(suite.tasks) <= {*base.TASKS, *base.MORE_TASKS}, suite.name
        assert suite.title, suite.name
        assert suite.evidence, suite.name
        for mean in suite.means:
            assert mean.sets, (suite.name, mean.name)
            assert set(mean.sets) <= set(suite.sets), (suite.name, mean.name)
            assert {task for task, _ in mean.of} <= {*suite.tasks, "survival", "diagnosis_attention"}, mean.name


def test_six_tasks_has_a_mean_of_each():
    suite = suites.find("six-tasks")
    kinds = {kind for name in suite.sets for kind in sets.known()[name].types}
    assert kinds == {kind for types in sets.TASKS.values() for kind in types}
    assert {task for mean in suite.means for task, _ in mean.of} == {
        "zeroshot", "linear_probe", "retrieval", "vqa", "survival", "diagnosis_attention"
    }  # fmt: skip
    assert {sets.known()[name].modality for name in suite.means[0].sets} == {
        "xray", "ct", "mri", "ultrasound", "histopathology", "fundus", "oct", "dermoscopy", "endoscopy"
    }  # fmt: skip


SUITE = Suite(
    "toy", "Toys", ("kvasir", "chestmnist", "tcga_blca"), ("zeroshot", "multilabel"),
    (Mean("AUC", (("zeroshot", "macro_auc"), ("multilabel", "macro_auc")), ("kvasir", "chestmnist")),
     Mean("C-index", (("survival", "c_index"),), ("tcga_blca",))),
    "ours",
)  # fmt: skip


def row(dataset, task, metric, value, model="a"):
    return {"model": model, "dataset": dataset, "task": task, "metric": metric, "value": value}


def test_a_mean_is_over_all_sets_or_there_is_none():
    whole = [row("kvasir", "zeroshot", "macro_auc", 0.5), row("chestmnist", "multilabel", "macro_auc", 0.9)]
    (mean,) = suites.means(
        SUITE, [*whole, row("kvasir", "zeroshot", "accuracy", 0.1), row("other", "zeroshot", "macro_auc", 0)]
    )
    assert mean["value"] == pytest.approx(0.7)
    assert suites.lines(SUITE, [mean])[0].endswith("toy: AUC: 0.700 over 2 sets")
    mean, alone = suites.means(SUITE, [*whole, row("kvasir", "zeroshot", "macro_auc", 0.8, "b")])
    assert (mean["model"], mean["value"], alone["model"], alone["value"]) == ("a", pytest.approx(0.7), "b", None)
    assert (alone["of"], alone["absent"]) == ({"kvasir": 0.8}, ["chestmnist"])
    assert "AUC: no mean: 1 of 2 sets are absent (chestmnist)" in suites.lines(SUITE, [alone])[0]
    with pytest.raises(InputError, match="two numbers for AUC of a on kvasir"):
        suites.means(SUITE, [*whole, whole[0] | {"value": 0.6}])


def test_a_metric_may_end_in_a_count():
    suite = Suite("r", "", ("rocov2",), (), (Mean("R", (("retrieval", "i2t_R@5_of_"),), ("rocov2",)),), "")
    rows = [
        row("rocov2", "retrieval", f"i2t_R@5_of_{tail}", value) for tail, value in (("20", 0.3), ("20_strict", 0.1))
    ]
    assert [mean["value"] for mean in suites.means(suite, rows)] == [0.3]


def test_sets_are_looked_for_by_name_or_right_in_the_folder(tmp_path):
    (tmp_path / "kvasir").mkdir()
    (tmp_path / "chestmnist_64.npz").write_bytes(b"")
    there, absent = SUITE.located(str(tmp_path), {})
    assert there == {"kvasir": str(tmp_path / "kvasir"), "chestmnist": str(tmp_path)}
    assert absent == ("tcga_blca",)
    there, absent = SUITE.located("", {"tcga_blca": "x"})
    assert (there, absent) == ({"tcga_blca": "x"}, ("kvasir", "chestmnist"))


def test_an_archive_of_several_sets_is_one_folder(tmp_path):
    suite = suites.find("unimed21")
    for name in suite.sets:
        set_fixtures.write(sets.known()[name], tmp_path)
    assert suite.located(str(tmp_path), {}) == (dict.fromkeys(suite.sets, str(tmp_path)), ())
    (tmp_path / "13_FIVES.csv").unlink()
    assert suite.located(str(tmp_path), {})[1] == ("unimed_fives",)


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Runs `mmkd eval --suite toy` with pixels for a model."""
    monkeypatch.setattr("mmkd_jax.api.load", lambda path, name=None: Pixels())
    monkeypatch.setattr(suites, "find", lambda name: SUITE)
    out = ["--out", str(tmp_path / "out"), "--bootstrap", "20"]
    return lambda *words: main(["eval", "--suite", "toy", "--checkpoint", "x", *out, *words])


def cohort(folder, n=90):
    """Patients of six sites whose age decides when they die."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    with (folder / "tcga_blca.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["case_id", "slide_id", "age", "site", "survival_months", "censorship", "is_female"])
        for k in range(n):
            age = 40 + 40 * rng.random()
            table.writerow(
                [f"p{k}", f"s{k}.svs", age, f"site{k % 6}", 3 * (80 - age) + 1 + rng.random(), int(k % 4 == 0), k % 2]
            )
    return folder


def test_a_suite_with_an_absent_set_takes_no_mean_without_it(evaluate, tmp_path, capsys):
    root = tmp_path / "sets"
    cohort(root / "tcga_blca")
    (root / "kvasir").mkdir()
    set_fixtures.write(sets.known()["kvasir"], root / "kvasir")
    assert evaluate("--sets-root", str(root)) == 0
    printed = capsys.readouterr().out
    assert "toy: 2 of 3 sets; absent: chestmnist" in printed
    assert "AUC: no mean: 1 of 2 sets are absent (chestmnist)" in printed
    told = json.loads((tmp_path / "out" / "suites" / "toy.json").read_text())
    assert told["absent"] == ["chestmnist"]
    by_name = {mean["name"]: mean for mean in told["means"]}
    assert by_name["AUC"]["value"] is None
    assert by_name["AUC"]["of"].keys() == {"kvasir"}
    assert by_name["C-index"]["value"] > 0.9  # age says it all
    rows = results.load(tmp_path / "out" / "results.json")
    assert {row["dataset"] for row in rows} == {"kvasir", "tcga_blca"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sets-root", "{}/none"], "none does not exist; give the folder that holds the sets of toy"),
        (["--sets-root", "{}"], "none of the 3 sets of toy is in "),
        (["--set", "busi={}"], "the set 'busi' is not in the suite toy"),
        (["--sets-root", "{}", "--pairs", "x"], "--pairs does not go with --suite"),
    ],
)
def test_wrong_suites_are_one_clear_line(words, message, evaluate, tmp_path, capsys):
    assert evaluate(*[word.format(tmp_path) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_unknown_suites_are_one_clear_line(tmp_path, capsys):
    for words, message in [
        (["--suite", "medmnist13", "--sets-root", str(tmp_path)], "did you mean 'medmnist12'"),
        (["--sets-root", str(tmp_path), "--set", "a=b"], "--sets-root goes with --suite"),
    ]:
        assert main(["eval", "--checkpoint", "x", "--out", str(tmp_path / "out"), *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


# ---------------------------------------------------------------- sets of patients and slides


def test_patients_become_the_table_that_the_study_reads(tmp_path):
    root = cohort(tmp_path / "in")
    config = suite_studies.survival(sets.known()["tcga_blca"], str(root), tmp_path / "out")
    assert (config.name, config.cox, config.site, config.fold) == ("tcga_blca", ("clinical",), "site", "")
    with (tmp_path / "out" / "patients.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (root / "tcga_blca.csv").open() as file:
        given = list(csv.DictReader(file))
    assert [row["event"] for row in rows] == [str(1 - int(row["censorship"])) for row in given]
    assert [float(row["time"]) for row in rows] == [float(row["survival_months"]) for row in given]
    for number in range(90):  # with features of every slide, these are evaluated as well
        (root / "features").mkdir(exist_ok=True)
        np.save(root / "features" / f"s{number}.npy", np.zeros((2, 3), np.float32))
    config = suite_studies.survival(sets.known()["tcga_blca"], str(root), tmp_path / "out")
    assert (config.cox, config.slides) == (("clinical", "slides"), str(root / "features"))


def test_slides_become_the_table_that_the_study_reads(tmp_path):
    one = sets.known()["tcga_brca_subtype"]
    set_fixtures.write(one, tmp_path / "in")
    config = suite_studies.diagnosis(one, str(tmp_path / "in"), tmp_path / "out")
    assert config.classes == one.classes.names
    with (tmp_path / "out" / "slides.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == set(one.classes.names)
    assert {row["split"] for row in rows} == {"train", "test"}
    links = tmp_path / "out" / "slides"
    assert config.features == str(links)
    assert all((links / f"{row['slide']}.npy").read_bytes() for row in rows)
    first = next((tmp_path / "in" / "features").iterdir())
    first.unlink()
    with pytest.raises(InputError, match="1 of 12 slides are missing"):
        suite_studies.diagnosis(one, str(tmp_path / "in"), tmp_path / "out")


@pytest.mark.full
def test_a_suite_of_slides_is_evaluated(tmp_path, monkeypatch, capsys):
    one = sets.known()["tcga_brca_subtype"]
    root = tmp_path / "sets" / one.name
    (root / "features").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for k in range(60):
        x = rng.standard_normal((8, 4)).astype(np.float32)
        x[0, 0] += 8 * (k % 2)  # one tile says it
        np.save(root / "features" / f"s{k}.npy", x)
        rows.append({"slide_id": f"s{k}.svs", "case_id": f"p{k // 2}", "oncotree_code": ("IDC", "ILC")[k % 2]})
    set_fixtures.table(root / "tcga_brca.csv", rows)
    of = (("diagnosis_attention", "balanced_accuracy"),)
    suite = Suite("toy", "", (one.name,), (), (Mean("diagnosis", of, (one.name,)),), "ours")
    monkeypatch.setattr(suites, "find", lambda name: suite)
    out = tmp_path / "out"
    words = ["--sets-root", str(tmp_path / "sets"), "--out", str(out), "--bootstrap", "20"]
    assert main(["eval", "--suite", "toy", *words]) == 0
    (mean,) = json.loads((out / "suites" / "toy.json").read_text())["means"]
    assert mean["value"] > 0.8
    assert (out / f"{one.name}.html").exists()
