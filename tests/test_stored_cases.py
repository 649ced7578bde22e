"""`mmkd compare` on answers to questions, risks of patients and diagnoses of slides, as their result rows count."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mmkd_jax.cli import main
from mmkd_jax.evals import bootstrap, comparison, diagnosis, outcomes, results, survival, survival_folds
from mmkd_jax.evals.survival_curves import Outcomes

SHARE = {"good": 0.9, "poor": 0.5}


def answers(model: str, seeds: int = 1) -> dict[str, np.ndarray]:
    """120 questions on 40 pictures: a third each of yes or no, left or right (closed), and open."""
    rng = np.random.default_rng(0)
    kind = np.arange(120) % 3
    truth = np.array([("yes no", "left right", "big mass|small mass")[k].split(" |"[k // 2])[rng.integers(2)]
                      for k in kind])  # fmt: skip
    own = np.random.default_rng(len(model))
    wrong = {"yes": "no", "no": "yes", "left": "right", "right": "left", "big mass": "mass", "small mass": "big"}
    right = own.random((seeds, 120)) < SHARE[model]
    said = np.where(right, truth, [wrong[one] for one in truth])
    polar = np.isin(truth, ["yes", "no"])
    yes = np.where(polar, (truth == "yes") + own.normal(0, 2 - 2 * SHARE[model] + 0.1, (seeds, 120)), np.nan)
    more = {"answers_of_seeds": said, "yes_of_seeds": yes} if seeds > 1 else {}
    common = {"ids": np.array([f"q{k:03d}" for k in range(120)]), "groups": np.arange(120) // 3, "truth": truth,
              "closed": kind < 2, "asked": np.ones(120, bool)}  # fmt: skip
    return {**common, "answers": said[0], "yes": yes[0], **more}


def store(folder, model, arrays, task="vqa", dataset="rad") -> str:
    results.save_predictions(results.predictions_path(folder, model, dataset, task), arrays)
    return f"{folder}:{model}"


def compared(entries, task, metric, **more):
    record = comparison.compare(comparison.contestants(entries), task=task, metric=metric, **{"resamples": 200, **more})
    (row,) = record["sets"]
    return row, row["differences"][0]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    return [store(folder, model, answers(model)) for model in SHARE]


@pytest.mark.parametrize(
    ("metric", "n"),
    [("accuracy", 120), ("closed_accuracy", 80), ("open_accuracy", 40), ("yes_no_accuracy", 40), ("yes_no_auc", 40)],
)
def test_questions_are_paired_on_resampled_pictures(asked, metric, n):
    """Against questions repeated as drawn, and scikit-learn's AUC."""
    row, told = compared(asked, "vqa", metric)
    given = {model: answers(model) for model in SHARE}
    one = given["good"]
    among = {"accuracy": one["asked"], "closed_accuracy": one["closed"], "open_accuracy": ~one["closed"]}
    among = among.get(metric, np.isin(one["truth"], ["yes", "no"]))

    def measured(arrays, counts):
        rows = np.repeat(np.arange(120), counts * among)
        if metric == "yes_no_auc":
            return roc_auc_score(arrays["truth"][rows] == "yes", arrays["yes"][rows])
        return np.mean(arrays["answers"][rows] == arrays["truth"][rows])

    drawn = bootstrap.draw(120, 200, bootstrap.seed_of(0, "rad", *one["ids"].tolist()), units=one["groups"])
    gaps = [measured(given["good"], counts) - measured(given["poor"], counts) for counts in drawn]
    whole = np.ones(120, int)
    assert told["value"] == pytest.approx(measured(given["good"], whole) - measured(given["poor"], whole))
    assert (told["low"], told["high"]) == pytest.approx(tuple(np.percentile(gaps, [2.5, 97.5])))
    assert row["n"] == n
    assert row["classes"] is None


def test_words_in_common_count_for_open_questions(asked):
    row, _ = compared(asked, "vqa", "open_token_f1")
    one = answers("good")
    right, opened = one["answers"] == one["truth"], ~one["closed"]
    half = np.array([2 * len(set(a.split()) & set(b.split())) / (len(a.split()) + len(b.split()))
                     for a, b in zip(one["answers"], one["truth"])])  # fmt: skip
    assert row["values"]["good"]["value"] == pytest.approx(half[opened].mean())
    assert half[opened].mean() > right[opened].mean()


def test_training_seeds_are_a_mean_with_their_spread(asked, tmp_path):
    several = store(tmp_path, "good", answers("good", seeds=3))
    row, _ = compared([several, asked[1]], "vqa", "accuracy")
    said = answers("good", seeds=3)
    each = (said["answers_of_seeds"] == said["truth"]).mean(1)
    assert row["values"]["good"]["value"] == pytest.approx(each.mean())
    drawn = bootstrap.draw(120, 200, bootstrap.seed_of(0, "rad", *said["ids"].tolist()), units=said["groups"])
    right = said["answers_of_seeds"] == said["truth"]
    estimates = [bootstrap.Estimate(one.mean(), bootstrap.mean(one, drawn)) for one in right]
    expected = bootstrap.mean_over_seeds(estimates, bootstrap.seed_of(0, "rad", "seeds")).interval()
    assert (row["values"]["good"]["low"], row["values"]["good"]["high"]) == pytest.approx(expected)


def test_rows_in_another_order_are_joined(asked, tmp_path):
    order = np.random.default_rng(0).permutation(120)
    moved = store(tmp_path, "poor", {name: array[order] for name, array in answers("poor").items()})
    assert compared([asked[0], moved], "vqa", "closed_accuracy") == compared(asked, "vqa", "closed_accuracy")


@pytest.mark.parametrize(
    ("change", "metric", "message"),
    [
        ({}, "picture_gain", "sets a model beside itself without the picture; compare models by accuracy"),
        ({}, "closed_acuracy", "did you mean 'closed_accuracy'"),
        ({"truth": np.full(120, "yes")}, "accuracy", "differ in truth"),
        ({"closed": np.arange(120) % 3 < 1}, "closed_accuracy", "is of different questions, since a model guessed"),
        ({"yes": np.full(120, np.nan)}, "yes_no_auc", "no question counts for yes_no_auc"),
    ],
)
def test_answers_that_cannot_be_compared(asked, tmp_path, change, metric, message, capsys):
    other = store(tmp_path, "poor", answers("poor") | change)
    words = ["compare", asked[0], other, "--task", "vqa", "--metric", metric, "--out", str(tmp_path / "out")]
    assert main([*words, "--bootstrap", "50"]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1


def test_guessed_types_do_not_hinder_accuracy(asked, tmp_path):
    other = store(tmp_path, "poor", answers("poor") | {"closed": np.arange(120) % 3 < 1})
    assert compared([asked[0], other], "vqa", "accuracy") == compared(asked, "vqa", "accuracy")


# ---------------------------------------------------------------- patients


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Two Cox models in nested folds, as a study stores them: a column that matters, and one that does not."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("followed")
    x = rng.normal(size=(120, 2))
    lived, watched = rng.exponential(20 * np.exp(-x[:, 0])), rng.exponential(40, 120)
    known, label = Outcomes(lived <= watched, np.minimum(lived, watched) + 0.01), np.arange(120) % 4
    patients = np.array([f"p{k}" for k in range(120)])
    folds = list(survival_folds.nested(label, known, patients))
    options = {"times": (12.0,), "resamples": 200, "seed": bootstrap.seed_of(0, "toy.X"), "strengths": (0.1,)}
    scored = [survival.run(x[:, k : k + 1], known, folds, **options) for k in (0, 1)]
    entries = []
    for name, one in zip(("cox: age", "cox: noise"), scored):
        arrays = {
            "ids": patients,
            "fold": label.astype("U4"),
            "risk": one.risk,
            "time": known.time,
            "event": known.event,
        }
        entries.append(store(folder, name, arrays, "survival", "toy.X"))
    return entries, scored


@pytest.mark.parametrize("metric", ["c_index", "c_index_ipcw", "auc", "auc@12"])
def test_intervals_of_survival_are_those_of_the_study(followed, metric):
    entries, (one, other) = followed
    row, told = compared(entries, "survival", metric)
    expected = survival.difference(one, other, metric)
    assert told["value"] == pytest.approx(expected.value, abs=1e-12)
    assert (told["low"], told["high"]) == pytest.approx(expected.interval(), abs=1e-12)
    own = row["values"]["cox: age"]
    assert (own["value"], own["low"], own["high"]) == pytest.approx(
        (one.metrics[metric], *one.estimates[metric].interval()), abs=1e-12
    )
    assert row["n"] == 120
    assert told["low"] > 0  # age does shorten lives
    assert compared(entries[::-1], "survival", metric)[1]["value"] == pytest.approx(-told["value"])


def test_the_command_takes_the_c_index_by_default(followed, tmp_path, capsys):
    words = ["compare", *followed[0], "--task", "survival", "--bootstrap", "60", "--out", str(tmp_path)]
    assert main(words) == 0
    assert "survival c_index: cox: age minus each other model" in capsys.readouterr().out
    assert "toy.X" in (tmp_path / "compare.html").read_text()


@pytest.mark.parametrize(
    ("change", "metric", "message"),
    [
        ({}, "brier", "brier needs predicted curves, and risks are what is stored; compare by c_index"),
        ({}, "c_indx", "did you mean 'c_index'"),
        ({}, "auc@9000", "no fold has auc@9000"),
        ({"ids": np.array([f"x{k}" for k in range(120)])}, "c_index", "differ in ids"),
        ({"fold": np.repeat(["0", "1", "2", "3"], 30)}, "c_index", "differ in fold"),
    ],
)
def test_risks_that_cannot_be_compared(followed, tmp_path, change, metric, message, capsys):
    entries, _ = followed
    stored = results.load_predictions(entries[0].partition(":")[0], "cox: noise", "toy.X", "survival")
    second = store(tmp_path, "cox: noise", stored | change, "survival", "toy.X")
    words = ["compare", entries[0], second, "--task", "survival", "--metric", metric, "--out", str(tmp_path / "out")]
    assert main([*words, "--bootstrap", "50"]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1


def test_intervals_of_diagnosis_are_those_of_the_study(tmp_path):
    """Slides of one patient are resampled together."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) // 2 % 2
    names, patients = np.array([f"s{k:02d}" for k in range(60)]), np.array([f"p{k // 2}" for k in range(60)])
    splits = np.where(np.arange(60) % 20 < 10, "train", "test")
    slides = diagnosis.Slides(names, patients, labels, splits, ("benign", "malignant"))
    test, entries, found = slides.rows("test"), [], []
    groups = np.unique(patients[test], return_inverse=True)[1]
    for model, skill in (("a", 1.5), ("b", 0.2)):
        scores = np.exp(skill * np.eye(2)[labels[test]] + rng.normal(size=(len(test), 2)))
        scores = (scores / scores.sum(1, keepdims=True)).astype(np.float32)
        found.append(diagnosis.estimates("slides", slides, scores, 200, 0))
        arrays = {"ids": names[test], "labels": labels[test], "scores": scores, "groups": groups}
        entries.append(store(tmp_path, model, arrays, "diagnosis_attention", "slides"))
    for metric in ("macro_auc", "balanced_accuracy"):
        _, told = compared(entries, "diagnosis_attention", metric)
        expected = bootstrap.difference(found[0][metric], found[1][metric])
        assert (told["low"], told["high"]) == pytest.approx(expected.interval(), abs=1e-9)


def test_outputs_say_what_they_are(asked, followed):
    folder, _, model = asked[0].rpartition(":")
    one = outcomes.read(folder, model, "rad", "vqa", "x")
    assert (one.asked, one.followed, one.classified) == (True, False, False)
    assert dataclasses.asdict(one)["model"] == "x"
