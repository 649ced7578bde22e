"""Survival studies as configs describe them: rows, predictions, page; leakage; wrong tables answer in one line."""

import csv
import pathlib

import numpy as np
import pytest

from mmkd_jax import cli, io
from mmkd_jax import config as configs
from mmkd_jax.errors import InputError
from mmkd_jax.evals import results, studies, survival_heads, survival_study
from mmkd_jax.evals.survival_curves import Outcomes
from mmkd_jax.report import survival as page

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
COLUMNS = ("case_id", "cohort", "age", "is_female", "stage", "site", "fold", "months", "died", "slide_ids")
KNOWN = {"BLCA": 0.63, "BRCA": 0.69, "COADREAD": 0.71, "HNSC": 0.56, "STAD": 0.57}  # said beside the tables


def table(folder, n: int = 160, seed: int = 0, permute: bool = False, change=None):
    """Patients of one cohort whose lives age and gene g0 shorten; a third of them have no genes."""
    rng = np.random.default_rng(seed)
    age, gene = rng.normal(size=n), rng.normal(size=n)
    lived, watched = rng.exponential(20 * np.exp(-0.6 * age - 1.6 * gene)), rng.exponential(40, n)
    order = rng.permutation(n) if permute else np.arange(n)
    time, died = np.minimum(lived, watched)[order] + 0.01, (lived <= watched)[order].astype(int)
    rows = []
    for k in range(n):
        stage = ("I", "II", "III", "IV", "")[k % 5]
        known = [f"p{k}", "X", f"{60 + 10 * age[k]:.2f}", k % 2, stage, f"s{k % 11}", k % 5]
        rows.append([*known, f"{time[k]:.4f}", died[k], f"p{k}-a.svs;p{k}-b.svs"])
    rows = change(rows) if change else rows
    folder.mkdir(exist_ok=True)
    with open(folder / "patients.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    with open(folder / "genes.csv", "w", newline="") as file:
        values = rng.normal(size=(n, 3))
        values[:, 0] = gene
        known = [[f"p{k}", *map("{:.4f}".format, values[k])] for k in range(n) if k % 3]
        csv.writer(file).writerows([["case_id", "g0", "g1", "g2"], *known])
    return folder


def asked(folder, *more: str) -> list[str]:
    fixed = {"root": folder, "table": "patients.csv", "time": "months", "event": "died", "fold": "fold", "site": "site",
             "name": "toy"}  # fmt: skip
    return [*(f"--config.{name}={value}" for name, value in fixed.items()), "--config.cohorts=('X',)",
            "--config.strengths=(0.03, 0.3)", "--config.times=(12.0,)", *more]  # fmt: skip


GENES = ("--config.tables=('genes=genes.csv',)", "--config.cox=('clinical', 'clinical+genes')")


def run(folder, *more: str, seed: int = 0, resamples: int = 200):
    config = configs.load(f"{CONFIGS}/survival.py", asked(folder, *more))
    out = io.as_path(folder / f"out{seed}")
    return out, studies.run(config, out, (), resamples=resamples, seed=seed)


def test_rows_predictions_and_page_of_a_comparison(tmp_path):
    out, shown = run(table(tmp_path / "a"), *GENES)
    rows = {(row["model"], row["metric"]): row for row in results.load(out / "results.json")}
    names = {"c_index", "c_index_ipcw", "auc", "brier", "auc@12"}
    for model in ("cox: clinical", "cox: clinical+genes"):
        assert names <= {metric for name, metric in rows if name == model}
        assert all(rows[model, name]["low"] < rows[model, name]["value"] < rows[model, name]["high"] for name in names)
        stored = results.load_predictions(out, model, "toy.X", "survival")
        assert len(stored["ids"]) == rows[model, "c_index"]["n"] == sum(k % 3 > 0 for k in range(160))
        assert set(stored["fold"]) == set("01234")
        context = rows[model, "c_index"]["context"]
        assert np.mean([fold["c_index"] for fold in context["folds"]]) == pytest.approx(rows[model, "c_index"]["value"])
        assert context["log_rank"]["p"] < (1e-3 if "genes" in model else 1)
    gain = rows["cox: clinical+genes", "c_index_less_cox: clinical"]
    expected = rows["cox: clinical+genes", "c_index"]["value"] - rows["cox: clinical", "c_index"]["value"]
    assert gain["value"] == pytest.approx(expected)
    assert 0 < gain["low"] < gain["high"] < 0.4  # paired: the gene does shorten lives
    text = shown.read_text()
    assert text.count('class="curve"') == 4  # two groups of two models
    assert "log-rank p &lt; 0.001" in text
    assert "clinical+genes (Cox regression) against clinical (Cox regression): better in 1, worse in 0" in text
    assert "left out: 54" in text
    shown.unlink()
    assert cli.main(["report", str(out)]) == 0
    assert shown.read_text() == text  # from what was saved
    assert not (out / "report.html").exists()
    again, _ = run(tmp_path / "a", *GENES)  # the same numbers, merged into the same rows
    assert {(row["model"], row["metric"]): row for row in results.load(again / "results.json")} == rows


def test_curves_on_the_page_are_those_of_the_groups():
    outcomes = Outcomes([1, 0, 1, 1], [1, 2, 3, 4])
    record = survival_study.survival.curves(outcomes, np.array([1, 1, -1, -1.0]))
    drawn = page.km("cox: x", {"curves": record, "log_rank": {"p": 0.04}}, "months")
    assert "log-rank p = 0.040" in drawn
    assert "higher risk: 2 patients, 1 events" in drawn
    # the high group falls to a half at month 1 of 4: a step at a quarter of the width
    assert f"L{46 + 100:.1f} {54:.1f}L{46 + 100:.1f} {152:.1f}" in drawn


def test_permuted_outcomes_give_chance(tmp_path):
    inside, values = [], []
    for seed in range(6):
        out, _ = run(table(tmp_path / "a", seed=seed, permute=True), *GENES, seed=seed, resamples=300)
        found = [row for row in results.load(out / "results.json") if row["metric"] == "c_index"]
        inside += [row["low"] < 0.5 < row["high"] for row in found]
        values += [row["value"] for row in found]
    assert sum(inside) >= 10  # of 12 intervals of 95 %
    assert abs(np.mean(values) - 0.5) < 0.04


def test_sites_stay_whole_where_no_column_of_folds_is_given(tmp_path):
    out, _ = run(table(tmp_path / "a"), "--config.fold=", "--config.folds=4")
    stored = results.load_predictions(out, "cox: clinical", "toy.X", "survival")
    site = np.array([int(one[1:]) % 11 for one in stored["ids"]])
    assert set(stored["fold"]) == set("0123")
    assert all(len(set(stored["fold"][site == k])) == 1 for k in range(11))


def test_features_of_slides_are_covariates_too(tmp_path):
    folder = table(tmp_path / "a")
    (folder / "features").mkdir()
    rng = np.random.default_rng(1)
    for k in range(160):
        for part in "ab":
            x = rng.normal(size=(rng.integers(2, 5), 4)).astype(np.float32)
            np.save(folder / "features" / f"p{k}-{part}.npy", x)
    more = (f"--config.slides={folder / 'features'}", "--config.cox=('clinical', 'clinical+slides')")
    out, _ = run(folder, *more)
    assert {row["model"] for row in results.load(out / "results.json")} == {"cox: clinical", "cox: clinical+slides"}
    cohort = survival_study.read(configs.load(f"{CONFIGS}/survival.py", asked(folder, *more)), "X")
    both = [np.load(folder / "features" / f"p7-{part}.npy") for part in "ab"]
    np.testing.assert_allclose(cohort.blocks["slides"][7], np.concatenate(both).mean(0), rtol=1e-5)
    assert cohort.bags.sizes[7] == sum(map(len, both))


HEADS = {"steps": 300, "batch": 32, "lr": 1e-2, "checkpoints": 1, "hidden": 16, "attention": 8, "dropout": 0.0}


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("permute", [False, True])
def test_attention_with_hazards_in_nested_folds(tmp_path, permute, quick_compilation):
    """A signal is found, and permuted outcomes give chance; a fold's head learns from some 130 patients."""
    heads = [f"--config.heads.{name}={value}" for name, value in HEADS.items()]
    more = ("--config.cox=()", "--config.mil=('clinical+genes',)", GENES[0], "--config.fold=", "--config.folds=3")
    out, _ = run(table(tmp_path / "a", 600, permute=permute), *more, *heads)
    found = {row["metric"]: row for row in results.load(out / "results.json")}["c_index"]
    assert [one.name for one in (out / "runs" / "toy.X").iterdir()] == ["mil%3A%20clinical%2Bgenes"]
    if permute:
        assert found["low"] < 0.5 < found["high"]
    else:
        assert found["low"] > 0.6


@pytest.mark.parametrize("resamples", [20, 1])
def test_a_tiny_cohort_has_intervals_that_say_what_they_rest_on(tmp_path, resamples):
    """25 patients in five folds: most resamples lack a number in some fold, and none is lost for that."""
    out, shown = run(table(tmp_path / "a", 25, seed=1), resamples=resamples)
    rows = {row["metric"]: row for row in results.load(out / "results.json")}
    assert {"c_index", "c_index_ipcw", "auc", "auc@12", "brier"} <= set(rows)
    counts = {name: row["context"]["bootstrap"]["incomplete"] for name, row in rows.items()}
    assert all(row["context"]["bootstrap"]["resamples"] == resamples for row in rows.values())
    assert counts["brier"] == 0  # an error of curves needs no pair of patients
    if resamples > 1:
        assert 0 < counts["c_index"] < resamples
        assert all(row["low"] < row["value"] < row["high"] for row in rows.values())
        assert f"C-index {counts['c_index']}" in shown.read_text()


def test_a_fold_without_a_comparable_pair_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^toy.X, cox: clinical: fold 0: no pair .* take fewer folds"):
        run(table(tmp_path / "a", 25, seed=0), resamples=20)


def test_curves_of_hazards():
    logits = np.array([[0.0, 0.0], [10.0, 0.0]])  # hazards of a half; an event in the first bin
    found = survival_heads.curve(logits, np.array([0.0, 4.0, 10.0]), np.array([0.0, 2.0, 4.0, 10.0, 20.0]))
    np.testing.assert_allclose(found[0], [1, 0.75, 0.5, 0.25, 0.25])
    np.testing.assert_allclose(found[1, 2:], 0, atol=1e-3)


@pytest.mark.parametrize("name", KNOWN)
def test_real_cohorts_through_a_config(name, mmkd_data, tmp_path):
    """Age, sex and stage on the published folds: within 0.02 of the C-index that comes with the tables."""
    more = [f"--config.root={mmkd_data / 'tcga_survival'}", f"--config.cohorts=('TCGA-{name}',)"]
    out = io.as_path(tmp_path)
    studies.run(configs.load(f"{CONFIGS}/survival.py", more), out, (), resamples=100, seed=0)
    rows = {row["metric"]: row for row in results.load(out / "results.json")}
    assert abs(rows["c_index"]["value"] - KNOWN[name]) < 0.02
    assert rows["c_index"]["dataset"] == f"tcga.{name}"


def cell(row: int, column: str, value):
    def change(rows):
        rows[row][COLUMNS.index(column)] = value
        return rows

    return change


def no_events_in_fold_2(rows):
    died, fold = COLUMNS.index("died"), COLUMNS.index("fold")
    return [[*row[:died], 0 if row[fold] == 2 else row[died], *row[died + 1 :]] for row in rows]


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (cell(3, "months", "0"), (), "times must be finite and above zero, row 3 has 0"),
        (cell(3, "months", "-2"), (), "row 3 has -2"),
        (cell(3, "died", "2"), (), "choose one event where several compete"),
        (cell(3, "died", ""), (), "leave out patients whose event is missing"),
        (cell(3, "case_id", "p4"), (), "patient 'p4' has several rows"),
        (cell(3, "age", "old"), (), "'old', which is no number"),
        (no_events_in_fold_2, (), "toy.X: fold 2 has no event"),
        (None, ("--config.time=os_months",), "no column 'os_months'"),
        (None, ("--config.clinical=('age', 'grade')",), "no column 'grade'"),
        (None, ("--config.cox=('clinicl',)",), "did you mean 'clinical'"),
        (None, ("--config.cox=()",), "nothing to evaluate"),
        (None, ("--config.tables=('genes=gone.csv',)", "--config.cox=('genes',)"), "gone.csv does not exist"),
        (None, ("--config.tables=('genes',)", "--config.cox=('genes',)"), "is not NAME=FILE"),
        (None, ("--config.slides=nowhere", "--config.cox=('slides',)"), "there is no folder of features"),
        (None, ("--config.cohorts=('Y',)",), "has no row where"),
        (None, ("--config.fold=", "--config.site="), "folds need config.fold"),
        (None, ("--config.root=",), "no folder of tables is given"),
    ],
)
def test_wrong_studies_answer_in_one_line(tmp_path, capsys, change, more, message):
    folder = table(tmp_path / "a", 60, change=change)
    out = tmp_path / "out"
    assert cli.main(["eval", "--config", f"{CONFIGS}/survival.py", *asked(folder, *more), "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1
    assert not out.exists()
