"""Zero-shot as public harnesses count it, several findings a picture, calibration, neighbours, label efficiency."""

import io
import json
import warnings

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk
from sklearn.neighbors import KNeighborsClassifier
from test_evals_tasks import CLASSES, ColourEncoder, FakePairs, blobs, one_row

from mmkd_jax.errors import InputError
from mmkd_jax.evals import (
    base,
    bootstrap,
    calibration,
    confusion,
    label_efficiency,
    linear_probe,
    multilabel,
    neighbours,
    profiles,
    prompts,
    results,
    zeroshot,
)  # fmt: skip
from mmkd_jax.evals.features import unit


def answered(classes, n=120, seed=0, decimals=2, present=None):
    """Labels (of the classes `present` only) and coarse cosines, with ties, better than chance."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(present or classes, size=n)
    return labels, np.round(0.2 + 0.1 * rng.standard_normal((n, classes)) + 0.08 * np.eye(classes)[labels], decimals)


def softmaxed(cosines, scale):
    odds = np.exp(scale * (cosines - cosines.max(1, keepdims=True)))
    return odds / odds.sum(1, keepdims=True)


def measured(profile, labels, cosines, weights=None, scale=25.0):
    scores = softmaxed(cosines, scale if profile.scale is None else profile.scale)
    weights = np.ones((1, len(labels)), int) if weights is None else weights
    return profile.measure(labels, cosines, scores, weights), scores


def values(estimates):
    return {name: estimate.value for name, estimate in estimates.items()}


# ---------------------------------------------------------------- confusion, AUC, AP against scikit-learn


@pytest.mark.parametrize(("classes", "present"), [(2, 2), (4, 4), (5, 3)])
def test_counts_equal_scikit_learn_on_rows_repeated_as_drawn(classes, present):
    """Also where a resample or the whole set lacks a class, or one is only predicted."""
    rng = np.random.default_rng(classes)
    labels, predicted = rng.integers(present, size=25), rng.integers(classes, size=25)
    weights = bootstrap.draw(25, 30, 0)
    found = confusion.counts(labels, predicted, classes, weights)
    averages = ("macro", "weighted", "binary") if classes == 2 else ("macro", "weighted")
    for k, weight in enumerate(weights):
        y, p = np.repeat(labels, weight), np.repeat(predicted, weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = {
                "accuracy": sk.accuracy_score(y, p),
                "balanced": sk.balanced_accuracy_score(y, p),
                "kappa": sk.cohen_kappa_score(y, p),
                "quadratic": sk.cohen_kappa_score(y, p, weights="quadratic"),
            }
            for average in averages:
                for name in ("f1", "precision", "recall"):
                    expected[name, average] = getattr(sk, f"{name}_score")(y, p, average=average, zero_division=0)
        one = found[k : k + 1]
        own = {
            "accuracy": confusion.accuracy(one)[0],
            "balanced": confusion.balanced_accuracy(one)[0],
            "kappa": confusion.kappa(one)[0],
            "quadratic": confusion.kappa(one, quadratic=True)[0],
        }
        for average in averages:
            own |= {
                (name, average): getattr(confusion, name)(one, average)[0] for name in ("f1", "precision", "recall")
            }
        assert own == pytest.approx(expected, abs=1e-12)


def test_kappa_without_variation_does_not_exist():
    one = confusion.counts([1, 1], [1, 1], 3, np.ones((1, 2), int))
    assert np.isnan(confusion.kappa(one)[0])
    assert np.isnan(confusion.kappa(one, quadratic=True)[0])


def test_auc_and_average_precision_equal_scikit_learn():
    rng = np.random.default_rng(0)
    labels, cosines = answered(4, 60, decimals=1)
    scores, weights = softmaxed(cosines, 3.0), bootstrap.draw(60, 20, 1)
    reference = sk.roc_auc_score(labels, scores, multi_class="ovo", average="macro")
    assert bootstrap.one_versus_one_auc(labels, scores, np.ones((1, 60), int))[0] == pytest.approx(reference, abs=1e-12)
    there, coarse = labels == 0, np.round(rng.random(60), 1)
    for k, weight in enumerate(weights):
        y, s = np.repeat(there, weight), np.repeat(coarse, weight)
        assert bootstrap.binary_auc(there, coarse, weights)[k] == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)
        found = bootstrap.average_precision(there, coarse, weights)[k]
        assert found == pytest.approx(sk.average_precision_score(y, s), abs=1e-12)
    nobody = np.zeros(60, bool)
    assert np.isnan(bootstrap.binary_auc(nobody, coarse, weights)).all()
    assert np.isnan(bootstrap.average_precision(nobody, coarse, weights)).all()


# ---------------------------------------------------------------- profiles


def test_profile_mmkd_of_many_classes():
    labels, cosines = answered(5)
    found, _ = measured(profiles.MMKD, labels, cosines)
    predicted = cosines.argmax(1)
    expected = {
        "accuracy": 100 * sk.accuracy_score(labels, predicted),
        "auc": 100 * sk.roc_auc_score(labels, softmaxed(cosines, 1.0), multi_class="ovr", average="macro"),
        "f1": 100 * sk.f1_score(labels, predicted, average="macro"),
        "precision": 100 * sk.precision_score(labels, predicted, average="macro", zero_division=0),
        "recall": 100 * sk.recall_score(labels, predicted, average="macro"),
    }
    assert values(found) == pytest.approx(expected, abs=1e-9)
    scaled = sk.roc_auc_score(labels, softmaxed(cosines, 100.0), multi_class="ovr", average="macro")
    assert abs(found["auc"].value - 100 * scaled) > 0.01  # the scale matters, so scale 1 is what was reproduced


@pytest.mark.parametrize("profile", [profiles.MMKD, profiles.UNIMED])
def test_profiles_mmkd_and_unimed_of_two_classes(profile):
    labels, cosines = answered(2)
    found, _ = measured(profile, labels, cosines)
    predicted, times = cosines.argmax(1), 100 if profile is profiles.MMKD else 1
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "auc": sk.roc_auc_score(labels, cosines[:, 1] - cosines[:, 0]),
        "f1": sk.f1_score(labels, predicted),
        "precision": sk.precision_score(labels, predicted),
        "recall": sk.recall_score(labels, predicted),
    }
    assert values(found) == pytest.approx({name: times * value for name, value in expected.items()}, abs=1e-9)


def test_profile_unimed_of_many_classes_gives_accuracy_only():
    assert set(measured(profiles.UNIMED, *answered(4))[0]) == {"accuracy"}


@pytest.mark.parametrize("classes", [2, 4])
def test_profile_conch(classes):
    labels, cosines = answered(classes)
    found, scores = measured(profiles.CONCH, labels, cosines)
    predicted = scores.argmax(1)
    many = {"multi_class": "ovo", "average": "macro"}
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "bacc": sk.balanced_accuracy_score(labels, predicted),
        "kappa": sk.cohen_kappa_score(labels, predicted),
        "quad_kappa": sk.cohen_kappa_score(labels, predicted, weights="quadratic"),
        "roc_auc": sk.roc_auc_score(labels, scores[:, 1]) if classes == 2 else sk.roc_auc_score(labels, scores, **many),
        "weighted_f1": sk.f1_score(labels, predicted, average="weighted"),
    }
    assert values(found) == pytest.approx(expected, abs=1e-9)
    if classes > 2:
        rest = sk.roc_auc_score(labels, scores, multi_class="ovr", average="macro")
        assert abs(found["roc_auc"].value - rest) > 1e-4  # pairs, not one against the rest


@pytest.mark.parametrize("classes", [2, 4, 6])
def test_profiles_clip_benchmark_and_open_clip(classes):
    labels, cosines = answered(classes, decimals=9)
    found, scores = measured(profiles.CLIP_BENCHMARK, labels, cosines)
    order = np.argsort(-scores, axis=1)
    expected = {
        "acc1": np.mean(order[:, 0] == labels),
        "mean_per_class_recall": sk.balanced_accuracy_score(labels, order[:, 0]),
    }
    if classes >= 5:
        expected["acc5"] = np.mean((order[:, :5] == labels[:, None]).any(1))
    assert values(found) == pytest.approx(expected, abs=1e-12)
    del expected["mean_per_class_recall"]
    assert values(measured(profiles.OPEN_CLIP, labels, cosines)[0]) == pytest.approx(expected, abs=1e-12)


def test_top_five_of_equal_scores_counts_by_index():
    answers = profiles.Answers(np.array([0, 4, 5]), None, np.ones((3, 6)), None, np.ones((1, 3), int))
    assert profiles.top(answers, 5)[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize("classes", [2, 4])
def test_profile_medmnist(classes):
    """Its evaluator written out: the mean of the columns' AUCs; of two classes the last column and one half."""
    labels, cosines = answered(classes)
    found, scores = measured(profiles.MEDMNIST, labels, cosines)
    if classes == 2:
        auc, accuracy = sk.roc_auc_score(labels, scores[:, -1]), np.mean((scores[:, -1] > 0.5) == labels)
    else:
        auc = np.mean([sk.roc_auc_score(labels == c, scores[:, c]) for c in range(classes)])
        accuracy = np.mean(scores.argmax(1) == labels)
    assert values(found) == pytest.approx({"AUC": auc, "ACC": accuracy}, abs=1e-12)


def test_replicates_are_the_metrics_of_rows_repeated_as_drawn():
    labels, cosines = answered(3, 40)
    weights = bootstrap.draw(40, 8, 2)
    for profile in (profiles.MMKD, profiles.CONCH, profiles.CLIP_BENCHMARK, profiles.MEDMNIST):
        found, _ = measured(profile, labels, cosines, weights)
        for k, weight in enumerate(weights):
            index = np.repeat(np.arange(40), weight)
            again, _ = measured(profile, labels[index], cosines[index])
            assert {n: e.replicates[k] for n, e in found.items()} == pytest.approx(values(again), abs=1e-9)


@pytest.mark.parametrize("profile", [profiles.MMKD, profiles.CONCH, profiles.MEDMNIST])
def test_profiles_refuse_an_auc_that_does_not_exist(profile):
    with pytest.raises(InputError, match="every class"):
        measured(profile, *answered(4, present=3))
    with pytest.raises(InputError, match="does not exist"):
        measured(profile, np.zeros(30, int), answered(2, 30)[1])


def test_the_forced_bootstrap_has_its_bias_and_the_default_has_not():
    """10 rare rows of 1000: one row of each class is forced, so that 1.00 % becomes 1.098 % on average."""
    labels = np.repeat([0, 1], [990, 10])
    forced = bootstrap.draw_forced(labels, 4000, 42)
    assert (forced.sum(1) == 1000).all()
    share = forced[:, 990:].sum(1)
    assert share.min() >= 1
    assert share.mean() == pytest.approx(1 + 998 * 0.01, abs=0.15)
    assert share.mean() > 10.7
    plain = bootstrap.draw(1000, 4000, 42)[:, 990:].sum(1)
    assert plain.mean() == pytest.approx(10, abs=0.15)
    assert (bootstrap.plan(labels, np.arange(1000), 500, 0).weights[:, 990:].sum(1) == 10).all()
    assert (bootstrap.draw_forced(labels, 50, 1) == bootstrap.draw_forced(labels, 50, 1)).all()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Every further task on the coloured pictures."""
    out, pairs = tmp_path_factory.mktemp("tasks"), FakePairs()
    sets = [s for s in base.sets_of(pairs) if s.name == "colours"]
    tasks = ["zeroshot", *base.MORE_TASKS]
    return out, pairs, sets[0], base.run(ColourEncoder(), pairs, sets, out, tasks=tasks, bootstrap=100)


def test_profiles_run_beside_the_default_and_leave_it_alone(ran, tmp_path):
    out, pairs, colours, rows = ran
    alone = base.run(ColourEncoder(), pairs, [colours], tmp_path, tasks=["zeroshot"], bootstrap=100)
    assert [row for row in rows if row["task"] == "zeroshot"] == alone
    others = {"retrieval_all", *(task for task in base.MORE_TASKS if task.startswith("vqa"))}  # of what it has not
    assert {row["task"] for row in rows} == {"zeroshot", *base.MORE_TASKS} - others
    row = one_row(rows, task="zeroshot_mmkd", metric="accuracy")
    assert row["value"] == pytest.approx(100 * one_row(rows, task="zeroshot", metric="accuracy")["value"])
    assert (row["context"]["profile"], row["context"]["logit_scale"], row["context"]["unit"]) == (
        "mmkd",
        1.0,
        "percent",
    )
    assert row["context"]["bootstrap"]["strata"] == "one row a class forced"
    assert one_row(rows, task="zeroshot_conch", metric="bacc")["context"]["logit_scale"] == 10.0  # the model's own
    named = base.EvalSet(**{**vars(colours), "prompts": prompts.default(CLASSES, profile="names")})
    again = base.run(ColourEncoder(), pairs, [named], tmp_path, tasks=["zeroshot_mmkd"], bootstrap=10)
    assert again[0]["context"]["profile"] == "mmkd:names"
    stored = results.load_predictions(out, "colour:net", "colours", "zeroshot_mmkd")
    np.testing.assert_allclose(stored["scores"].sum(1), 1, rtol=1e-6)


def test_synonyms_make_a_flat_mean():
    """Classes of two names and of one: each sentence counts alike, unlike a mean of the names' means."""
    made = prompts.from_synonyms([["mass", "lump"], ["cyst"]], ["a {}", "the {}", "{}"])
    assert made.sentences == (
        ("a mass", "the mass", "mass", "a lump", "the lump", "lump"),
        ("a cyst", "the cyst", "cyst"),
    )
    features = unit(np.random.default_rng(0).standard_normal((9, 5)))
    found = zeroshot.class_embeddings(features, [6, 3])
    np.testing.assert_allclose(found[0], unit(features[:6].mean(0)), rtol=1e-5)
    for wrong, message in ((["no place"], "must contain"), ([], "at least one prompt")):
        with pytest.raises(InputError, match=message):
            prompts.from_synonyms([["a"], ["b"]], wrong)


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.json"
    records = {
        "colours": {"templates": ["a {}", "{}"], "synonyms": {"red nodule": ["red lump", "red nodule"]}},
        "plain": {"templates": ["a {}"]},
        "full": {"sentences": {name: [f"this is {name}"] for name in CLASSES}},
    }
    path.write_text(json.dumps(records))
    made = prompts.default(CLASSES, profile=str(path), name="colours")
    assert made.sentences[0] == ("a red nodule", "red nodule", "a red lump", "red lump")
    assert (made.sentences[1], made.profile) == (("a green nodule", "green nodule"), "synonyms")
    assert prompts.default(CLASSES, profile=str(path), name="plain").profile == "templates"
    assert prompts.default(CLASSES, profile=str(path), name="full").sentences[2] == ("this is blue nodule",)
    assert prompts.default(CLASSES, "ct", str(path), name="another") == prompts.default(CLASSES, "ct")
    for record, message in (
        ([], "must be"),
        ({"template": ["{}"]}, "must be"),
        ({"templates": "a {}"}, "must be lists"),
        ({"templates": ["{}"], "synonyms": {"red nodul": ["x"]}}, "did you mean 'red nodule'"),
        ({"templates": ["a"]}, "must contain"),
        ({"sentences": {"red nodule": ["x"]}}, "no prompts are given"),
    ):
        path.write_text(json.dumps({"colours": record}))
        with pytest.raises(InputError, match=message):
            prompts.default(CLASSES, profile=str(path), name="colours")
    path.write_text("[]")
    with pytest.raises(InputError, match="by the name of a set"):
        prompts.default(CLASSES, profile=str(path), name="colours")


# ---------------------------------------------------------------- several findings


def findings(n=80, seed=0):
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, 3)) < [0.5, 0.2, 0.1]).astype(int)
    targets[:2] = [[1, 1, 1], [0, 0, 0]]
    scores = np.round(rng.random((n, 3)) + 0.3 * targets, 1)
    return np.where(rng.random((n, 3)) < 0.1, -1, targets) if seed else targets, scores


@pytest.mark.parametrize("seed", [0, 1])
def test_findings_equal_scikit_learn(seed):
    targets, scores = findings(seed=seed)
    found = multilabel.measure(targets, scores, ["a", "b", "c"], np.ones((1, 80), int))
    auc, ap = [], []
    for k, name in enumerate("abc"):
        known = targets[:, k] >= 0
        auc.append(sk.roc_auc_score(targets[known, k], scores[known, k]))
        ap.append(sk.average_precision_score(targets[known, k], scores[known, k]))
        assert found[f"auc:{name}"][0].value == pytest.approx(auc[-1], abs=1e-12)
        assert found[f"ap:{name}"][0].value == pytest.approx(ap[-1], abs=1e-12)
        assert found[f"auc:{name}"][1] == known.sum()
    assert found["macro_auc"][0].value == pytest.approx(np.mean(auc), abs=1e-12)
    assert found["map"][0].value == pytest.approx(np.mean(ap), abs=1e-12)
    assert found["map"][0].replicates == pytest.approx([np.mean(ap)])
    if seed == 0:
        assert np.mean(auc) == pytest.approx(sk.roc_auc_score(targets, scores, average="macro"), abs=1e-12)


def test_findings_refuse_wrong_input():
    targets, scores = findings()
    weights = np.ones((1, 80), int)
    for change, message in (
        ((targets * 0, scores), "all with it or all without"),
        ((targets[:, :2], scores), "are not"),
        ((targets * 2, scores), "targets 1"),
        ((targets, scores * np.nan), "finite"),
        ((targets[:0], scores[:0]), "are not"),
    ):
        with pytest.raises(InputError, match=message):
            multilabel.measure(*change, ["a", "b", "c"], weights if len(change[0]) else weights[:, :0])


def test_findings_are_asked_as_there_and_not_there(ran, tmp_path):
    _, pairs, colours, _ = ran
    targets = np.eye(3, dtype=int)[pairs.table["label_id"][colours.rows]]
    against = prompts.from_templates(CLASSES, ["nothing {} about it, z"], "absent")
    several = base.EvalSet(**{**vars(colours), "targets": targets, "absent": against})
    assert not zeroshot.applies(several)
    tasks = ["zeroshot", "multilabel"]
    rows = base.run(ColourEncoder(), pairs, [several], tmp_path, tasks=tasks, bootstrap=50)
    assert {row["task"] for row in rows} == {"multilabel"}
    assert {row["metric"] for row in rows} >= {"macro_auc", "map", "auc:red nodule", "ap:blue nodule"}
    stored = results.load_predictions(tmp_path, "colour:net", "colours", "multilabel")
    # the encoder hears the same colour in both prompts: it cannot tell there from not there
    np.testing.assert_allclose(stored["scores"], 0.5)
    assert one_row(rows, metric="macro_auc")["value"] == 0.5
    apart = base.EvalSet(**{**vars(several), "absent": prompts.from_templates(["x", "x", "x"], ["{}"], "absent")})
    rows = base.run(ColourEncoder(), pairs, [apart], tmp_path, tasks=tasks, bootstrap=50)
    assert one_row(rows, metric="macro_auc")["value"] > 0.6
    present, absent = np.array([[0.3, 0.1]]), np.array([[0.2, 0.4]])
    pair = np.exp(10 * np.stack([present, absent]))
    np.testing.assert_allclose(multilabel.probabilities(present, absent, 10), pair[0] / pair.sum(0), rtol=1e-5)
    assert len(prompts.absent(CLASSES).sentences) == 3


# ---------------------------------------------------------------- calibration


def test_calibration_by_hand():
    rng = np.random.default_rng(0)
    labels, cosines = answered(4, 200, decimals=9)
    scores = softmaxed(cosines, 12.0)
    weights = bootstrap.draw(200, 3, 0)
    found = calibration.measure(labels, scores, weights)
    for k, weight in enumerate([np.ones(200, int), *weights]):
        index = np.repeat(np.arange(200), weight)
        y, s = labels[index], scores[index]
        confidence, right = s.max(1), s.argmax(1) == y
        error = 0.0
        for low in np.arange(15) / 15:
            inside = (confidence > low) & (confidence <= low + 1 / 15)
            if inside.any():
                error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
        expected = {
            "ece": error,
            "brier": np.mean(((s - np.eye(4)[y]) ** 2).sum(1)),
            "log_loss": sk.log_loss(y, s, labels=range(4)),
        }
        own = {name: e.value if k == 0 else e.replicates[k - 1] for name, e in found.items()}
        assert own == pytest.approx(expected, abs=1e-9)
    sure = np.eye(4)[rng.integers(4, size=200)]
    assert calibration.measure(sure.argmax(1), sure, weights)["ece"].value == 0
    assert calibration.measure(labels, sure, weights)["ece"].value == pytest.approx(np.mean(sure.argmax(1) != labels))


# ---------------------------------------------------------------- neighbours and few labels


def test_neighbours_equal_scikit_learn():
    x, y = blobs(120)
    reference = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(x[:90], y[:90]).predict_proba(x[90:])
    np.testing.assert_allclose(neighbours.votes(x[:90], y[:90], x[90:], 3), reference, atol=1e-12)
    assert np.abs(neighbours.votes(x[:90], y[:90], x[90:], 3, k=5) - reference).max() > 0.05
    few = neighbours.votes(x[:7], y[:7], x[90:], 4)
    np.testing.assert_allclose(few, np.tile(np.bincount(y[:7], minlength=4) / 7, (30, 1)), atol=1e-12)
    ties = neighbours.votes(np.ones((9, 2)), np.arange(9) % 3, np.ones((1, 2)), 3, k=4)
    np.testing.assert_allclose(ties, [[0.5, 0.25, 0.25]])  # rows 0 to 3
    for labels, k in ((y[:90], 0), (y[:90] + 2, 5), (y[:90] - 1, 5)):
        with pytest.raises(InputError, match="neighbours need"):
            neighbours.votes(x[:90], labels, x, 3, k=k)


def test_subsets_are_stratified_nested_and_hold_every_class():
    labels = np.repeat([0, 1, 2], [500, 60, 3])
    tenth, hundredth = (label_efficiency.draw(labels, 4, fraction=f) for f in (0.1, 0.01))
    assert np.bincount(labels[tenth]).tolist() == [50, 6, 1]
    assert np.bincount(labels[hundredth]).tolist() == [5, 1, 1]
    assert set(hundredth) < set(tenth)
    assert label_efficiency.draw(labels, 4, fraction=1.0).tolist() == list(range(563))
    assert np.bincount(labels[label_efficiency.draw(labels, 4, shots=5)]).tolist() == [5, 5, 3]
    assert (label_efficiency.draw(labels, 4, fraction=0.1) == tenth).all()
    assert set(label_efficiency.draw(labels, 5, fraction=0.1)) != set(tenth)
    for wrong in ({}, {"fraction": 0.0}, {"fraction": 1.5}, {"shots": 0}, {"shots": 1, "fraction": 0.1}):
        with pytest.raises(InputError, match="a subset is drawn"):
            label_efficiency.draw(labels, 0, **wrong)


def test_label_efficiency_says_what_its_stored_subsets_give(ran):
    out, pairs, colours, rows = ran
    found = {row["metric"] for row in rows if row["task"] == "label_efficiency"}
    assert {"accuracy_at_1%", "macro_auc_at_10%", "macro_f1_at_100%", "balanced_accuracy_at_5_shots"} <= found
    stored = results.load_predictions(out, "colour:net", "colours", "label_efficiency")
    labels = pairs.table["label_id"]
    of_seeds = []
    for seed in range(5):
        kept = stored[f"rows_5_shots_{seed}"]
        assert np.bincount(labels[kept]).tolist() == [5, 5, 5]
        assert set(kept) <= set(colours.train_rows)
        of_seeds.append(np.mean(stored[f"scores_5_shots_{seed}"].argmax(1) == labels[colours.rows]))
    assert one_row(rows, metric="accuracy_at_5_shots")["value"] == pytest.approx(np.mean(of_seeds))
    context = one_row(rows, metric="accuracy_at_1%")["context"]
    assert context["strengths"]["1%"] == [label_efficiency.FIXED] * 5  # one row a class: nothing to choose on
    assert set(context["strengths"]["100%"]) <= set(linear_probe.STRENGTHS)
    assert len(context["strengths"]["100%"]) == 1
    features = {name: np.stack([np.asarray(_colour(pairs, row)) for row in of]) for name, of in
                (("train", colours.train_rows), ("test", colours.rows))}  # fmt: skip
    train_labels = labels[colours.train_rows]
    alone = linear_probe.fit(features["train"], train_labels, np.arange(60), features["test"], 3)
    right = np.mean(alone.scores.argmax(1) == labels[colours.rows])
    assert one_row(rows, metric="accuracy_at_100%")["value"] == pytest.approx(right)  # the linear probe itself


def _colour(pairs, row):
    return ColourEncoder().encode_image([Image.open(io.BytesIO(pairs.images[row]))])[0]
