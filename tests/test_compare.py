"""`mmkd compare`: paired differences against index resampling, absent sets shown, other cases refused, the page."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from mmkd_jax.cli import main
from mmkd_jax.evals import bootstrap, comparison, metrics, outcomes, results, significance

CLASSES = {"eyes": 2, "lungs": 3, "skin": 4}
N = {"eyes": 60, "lungs": 45, "skin": 80}
SKILL = {"good": 2.0, "fair": 1.0, "teacher:poor": 0.0}


def outputs(dataset, skill, seed, grouped=False):
    """Labels that depend on the set only; scores that know them the better the more skill."""
    rng = np.random.default_rng([N[dataset], CLASSES[dataset]])
    n, classes = N[dataset], CLASSES[dataset]
    labels = rng.permutation(np.arange(n) % classes)
    noise = np.random.default_rng([seed, n]).standard_normal((n, classes))
    scores = np.exp(skill * np.eye(classes)[labels] + noise)
    scores = (scores / scores.sum(1, keepdims=True)).astype(np.float32)
    groups = np.arange(n) // 3 if grouped else -1 - np.arange(n)
    ids = np.array([f"{dataset}{i:04}" for i in range(n)])
    return {"ids": ids, "labels": labels, "groups": groups, "scores": scores, "predictions": scores.argmax(1)}


def store(folder, model, dataset, arrays, task="zeroshot"):
    results.save_predictions(results.predictions_path(folder, model, dataset, task), arrays)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three models on three sets; `b` and `c` in a folder of their own, `c` without skin."""
    root = tmp_path_factory.mktemp("compare")
    for k, (model, skill) in enumerate(SKILL.items()):
        for dataset in N:
            if (model, dataset) != ("teacher:poor", "skin"):
                arrays = outputs(dataset, skill, k, grouped=dataset == "lungs")
                store(root / ("a" if model == "good" else "bc"), model, dataset, arrays)
    return root


@pytest.fixture(scope="module")
def record(folders):
    entries = [f"{folders}/a", f"{folders}/bc:fair", f"{folders}/bc:teacher:poor"]
    return comparison.compare(comparison.contestants(entries), resamples=1500)


def row_of(record, dataset):
    return next(row for row in record["sets"] if row["dataset"] == dataset)


def test_differences_equal_index_resampling(record):
    """Every step again with rows repeated as drawn; the first thousand resamples are those of the result rows."""
    arrays = [outputs("eyes", SKILL[m], k) for k, m in enumerate(SKILL)]
    seed = bootstrap.seed_of(0, "eyes", *arrays[0]["ids"].tolist())
    weights = np.concatenate(
        [bootstrap.draw(60, count, seed + k) for k, count in enumerate((1000, 500))]
    )  # both classes have 20 rows or more: no strata
    values = np.array([[_balanced(one, np.repeat(np.arange(60), w)) for w in weights] for one in arrays])
    row = row_of(record, "eyes")
    for k, one in enumerate(row["differences"], 1):
        gaps = values[0] - values[k]
        assert (one["low"], one["high"]) == pytest.approx(tuple(np.percentile(gaps, [2.5, 97.5])), abs=1e-12)
        tail = 1 + min(np.sum(gaps <= 1e-12), np.sum(gaps >= -1e-12))
        assert one["p"] == pytest.approx(min(1, 2 * tail / 1501))
        assert one["value"] == pytest.approx(row["values"]["good"]["value"] - row["values"][one["other"]]["value"])


def _balanced(one, index):
    labels, right = one["labels"][index], (one["predictions"] == one["labels"])[index]
    return np.mean([right[labels == c].mean() for c in np.unique(labels)])


def test_intervals_are_those_of_the_result_rows(folders, tmp_path):
    """Also where the rows of the set are in no order of ids."""
    order = np.random.default_rng(0).permutation(45)
    arrays = {name: value[order] for name, value in outputs("lungs", SKILL["good"], 0, grouped=True).items()}
    store(tmp_path, "good", "lungs", arrays)
    models = comparison.contestants([f"{tmp_path}", f"{folders}/bc:fair"])
    found = comparison.compare(models, resamples=1000, metric="macro_auc", sets=["lungs"])
    seed = bootstrap.seed_of(0, "lungs", *arrays["ids"].tolist())
    plan = bootstrap.plan(arrays["labels"], arrays["groups"], 1000, seed)
    estimate = bootstrap.classification(arrays["labels"], arrays["scores"], plan.weights)["macro_auc"]
    assert row_of(found, "lungs")["values"]["good"] == {
        "value": estimate.value, "low": estimate.interval()[0], "high": estimate.interval()[1],
    }  # fmt: skip


def test_order_of_rows_and_of_resampling_does_not_matter(folders, tmp_path):
    """Outputs stored in another order are joined by id; swapping the models mirrors the table."""
    for dataset in N:
        order = np.random.default_rng(0).permutation(N[dataset])
        arrays = outputs(dataset, SKILL["fair"], 1, grouped=dataset == "lungs")
        store(tmp_path / "fair", "fair", dataset, {name: value[order] for name, value in arrays.items()})
    found = comparison.compare(comparison.contestants([f"{folders}/a", f"{tmp_path}/fair"]), resamples=300)
    models = comparison.contestants([f"{folders}/a", f"{folders}/bc:fair"])
    assert found["sets"] == comparison.compare(models, resamples=300)["sets"]
    back = comparison.compare(models[::-1], resamples=300)
    for one, other in zip(found["sets"], back["sets"]):
        a, b = one["differences"][0], other["differences"][0]
        assert (a["value"], a["low"], a["high"], a["p"]) == pytest.approx((-b["value"], -b["high"], -b["low"], b["p"]))


def test_an_absent_set_is_shown_and_no_average_hides_it(record):
    skin = row_of(record, "skin")
    assert skin["absent"] == ["teacher:poor"]
    assert skin["values"]["teacher:poor"] is None
    assert skin["differences"][1] is None
    assert skin["differences"][0]["other"] == "fair"
    summary = record["summary"]
    assert summary["datasets"] == ["eyes", "lungs"]
    assert record["left_out"] == [{"dataset": "skin", "absent": ["teacher:poor"]}]
    for one in summary["models"]:
        over = [row_of(record, d)["values"][one["label"]]["value"] for d in ("eyes", "lungs")]
        assert one["mean"]["value"] == pytest.approx(np.mean(over))


def test_corrections_and_tests_over_sets(record):
    for k, other in enumerate(("fair", "teacher:poor")):
        given = [row["differences"][k] for row in record["sets"] if row["differences"][k]]
        np.testing.assert_array_equal([one["p_holm"] for one in given], significance.holm([one["p"] for one in given]))
        for one in given:
            assert one["decided"] == (np.sign(one["value"]) if one["p_holm"] < 0.05 else 0)
        gaps = [row_of(record, d)["differences"][k]["value"] for d in ("eyes", "lungs")]
        one = record["summary"]["differences"][k]
        assert (one["other"], one["value"]) == (other, pytest.approx(np.mean(gaps)))
        assert one["wilcoxon"]["p"] == stats.wilcoxon(gaps).pvalue
        assert (one["wins"], one["ties"], one["losses"]) == (sum(np.array(gaps) > 0), 0, sum(np.array(gaps) < 0))
        assert [w["value"] for w in one["without"]] == pytest.approx(gaps[::-1])
    assert any(row["differences"][1] and row["differences"][1]["decided"] == 1 for row in record["sets"])
    ranks = [one["mean_rank"]["value"] for one in record["summary"]["models"]]
    assert ranks == sorted(ranks)
    assert sum(ranks) == pytest.approx(6)


def test_mcnemar_and_delong_where_rows_are_independent(record):
    a, b = outputs("eyes", SKILL["good"], 0), outputs("eyes", SKILL["fair"], 1)
    one = row_of(record, "eyes")["differences"][0]
    only = [np.sum((x["predictions"] == x["labels"]) & (y["predictions"] != y["labels"])) for x, y in ((a, b), (b, a))]
    assert [one["mcnemar"]["only_first"], one["mcnemar"]["only_other"]] == only
    assert one["mcnemar"]["p"] == pytest.approx(stats.binomtest(int(only[0]), int(sum(only))).pvalue)
    gap = metrics.macro_auc(a["labels"], a["scores"]) - metrics.macro_auc(b["labels"], b["scores"])
    assert one["delong"]["value"] == pytest.approx(gap, abs=1e-9)
    assert row_of(record, "skin")["differences"][0]["delong"] is None  # four classes
    lungs = row_of(record, "lungs")["differences"][0]
    assert (lungs["mcnemar"], lungs["delong"]) == (None, None)  # cases of three rows


def test_a_model_against_its_own_copy_decides_nothing(folders, tmp_path):
    for dataset in N:
        store(tmp_path / "copy", "good", dataset, outputs(dataset, 2.0, 0, grouped=dataset == "lungs"))
    models = comparison.contestants([f"{folders}/a", f"{tmp_path}/copy"])
    assert [one.label for one in models] == ["a:good", "copy:good"]
    found = comparison.compare(models, resamples=200)
    for row in found["sets"]:
        assert [row["differences"][0][k] for k in ("value", "low", "high", "p", "p_holm", "decided")] == [
            0,
            0,
            0,
            1,
            1,
            0,
        ]
    (one,) = found["summary"]["differences"]
    assert (one["ties"], one["wilcoxon"]["p"], one["over_sets"]) == (3, 1, {"low": 0, "high": 0})
    assert [m["mean_rank"]["value"] for m in found["summary"]["models"]] == [1.5, 1.5]


def retrieved(seed, n=30):
    rng = np.random.default_rng(seed)
    ranks = {
        f"{r}_rank": rng.integers(1, 12, n if r != "t2i" else 10) for r in ("i2t", "t2i", "i2t_strict", "t2i_strict")
    }
    captions = {"texts": np.array([f"caption {i}" for i in range(10)]), "caption_of": np.arange(n) // 3}
    captions |= {"owner": np.arange(n), "i2t_precision": rng.random(n)}
    return {"ids": np.array([f"{i:04}" for i in range(n)]), "groups": np.arange(n) // 2, **captions, **ranks}


def test_retrieval_is_compared_by_recall(tmp_path):
    for k in range(2):
        store(tmp_path / "ab"[k], "net", "pairs", retrieved(k), "retrieval")
    models = comparison.contestants([f"{tmp_path}/a", f"{tmp_path}/b"])
    for metric, rank, cut in (
        ("i2t_R@5", "i2t_rank", 5),
        ("t2i_R@1", "t2i_rank", 1),
        ("t2i_R@5_strict", "t2i_strict_rank", 5),
    ):
        found = comparison.compare(models, task="retrieval", metric=metric, resamples=100)
        hits = [np.mean(retrieved(k)[rank] <= cut) for k in range(2)]
        assert found["sets"][0]["differences"][0]["value"] == pytest.approx(hits[0] - hits[1])
    found = comparison.compare(models, task="retrieval", metric="i2t_mAP", resamples=100)
    means = [retrieved(k)["i2t_precision"].mean() for k in range(2)]
    assert found["sets"][0]["differences"][0]["value"] == pytest.approx(means[0] - means[1])


# ---------------------------------------------------------------- the command and its page


def line(out, *words):
    return main(["compare", "--out", str(out), "--bootstrap", "500", *map(str, words)])


def test_command_writes_table_record_and_page(folders, tmp_path, capsys):
    assert line(tmp_path / "out", folders / "a", f"{folders}/bc:fair", f"{folders}/bc:teacher:poor") == 0
    printed = capsys.readouterr().out
    assert re.search(r"skin +teacher:poor +absent +n=80", printed)
    assert re.search(r"mean of 2 of 3 sets +fair +[+−]", printed)
    assert "not in the means: skin (absent: teacher:poor)" in printed
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["resamples"] == 500
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("<td>absent</td>") == 2
    assert page.count("<svg") == 2
    assert "mean of 2 of 3 sets" in page
    assert not re.search(r"(src|href)=", page)  # nothing from elsewhere


def test_page_without_a_common_set_and_with_a_hostile_name(tmp_path, capsys):
    name = "<script>alert(1)</script>"
    store(tmp_path / "a", name, "eyes", outputs("eyes", 1.0, 0))
    store(tmp_path / "b", "net", "lungs", outputs("lungs", 1.0, 0))
    assert line(tmp_path, tmp_path / "a", tmp_path / "b") == 0
    assert "there is no mean" in capsys.readouterr().out
    assert json.loads((tmp_path / "compare.json").read_text())["summary"] is None
    page = (tmp_path / "compare.html").read_text()
    assert "<script" not in page
    assert "no set is common to all models" in page


def test_different_prompts_are_told(folders, tmp_path):
    for model, profile in (("x", "names"), ("y", "ensemble")):
        store(tmp_path / model, model, "eyes", outputs("eyes", 1.0, 0))
        about = {"model": model, "checkpoint": "", "dataset": "eyes", "task": "zeroshot", "metric": "accuracy"}
        values = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 60, "seed": 0, "context": {"profile": profile}}
        results.save(tmp_path / model / "results.json", [about | values])
    models = comparison.contestants([f"{tmp_path}/x", f"{tmp_path}/y"])
    found = comparison.compare(models, resamples=100)
    assert found["notes"] == ["eyes: the models' profile differs (x: names, y: ensemble)"]
    assert (
        comparison.compare(comparison.contestants([f"{folders}/a", f"{folders}/bc:fair"]), resamples=200)["notes"] == []
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "at least two"),
        (["a", "nowhere"], "no folder with predictions"),
        (["a", "bc"], "holds several models; name one as"),
        (["a", "bc:fairr"], "did you mean 'fair'"),
        (["a", "a:good"], "given twice"),
        (["a", "bc:fair", "--sets", "skins"], "did you mean 'skin'"),
        (["a", "bc:teacher:poor", "--sets", "skin"], "teacher:poor has no outputs on 'skin'"),
        (["a", "bc:fair", "--metric", "accurate"], "did you mean 'accuracy'"),
        (["a", "bc:fair", "--task", "linear_probe"], "none of these models has outputs of task 'linear_probe'"),
        (["a", "bc:fair", "--bootstrap", "50"], "use at least --bootstrap 120"),
        (["a", "bc:fair", "--bootstrap", "0"], "at least 1"),
    ],
)
def test_command_refuses_wrong_input(folders, tmp_path, words, message, capsys):
    words = [f"{folders}/{w}" if w.partition(":")[0] in ("a", "bc", "nowhere") else w for w in words]
    assert line(tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "compare.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "ids": np.char.add("x", a["ids"])}, "differ in ids"),
        (lambda a: {name: value[:-2] for name, value in a.items()}, "60 and 58 rows"),
        (lambda a: {**a, "labels": 1 - a["labels"]}, "differ in labels"),
        (lambda a: {**a, "groups": a["groups"] // 2}, "differ in groups"),
        (lambda a: {**a, "scores": np.pad(a["scores"], ((0, 0), (0, 1)))}, "different numbers of classes"),
        (lambda a: {**a, "scores": a["scores"] * np.nan}, "not a finite number"),
        (lambda a: {"scores": a["scores"]}, "no ids and groups"),
        (lambda a: {k: v for k, v in a.items() if k != "scores"}, "neither scores of classes nor ranks"),
        (lambda a: retrieved(0), "by i2t_R@1"),
    ],
)
def test_outputs_of_other_cases_are_refused(folders, tmp_path, change, message, capsys):
    store(tmp_path / "other", "other", "eyes", change(outputs("eyes", 1.0, 5)))
    first = tmp_path / "other" if message == "by i2t_R@1" else folders / "a"
    second = tmp_path / "copy" if message == "by i2t_R@1" else tmp_path / "other"
    store(tmp_path / "copy", "copy", "eyes", change(outputs("eyes", 1.0, 5)))
    assert line(tmp_path / "out", first, second) == 2
    assert message in capsys.readouterr().err


def test_names_with_colons_and_escapes_are_read_back(folders, tmp_path):
    store(tmp_path, "teacher:a/b", "a set.v2", outputs("eyes", 1.0, 0))
    assert outcomes.models(tmp_path) == ["teacher:a/b"]
    assert outcomes.datasets(tmp_path, "teacher:a/b", "zeroshot") == ["a set.v2"]
    found = comparison.contestants([f"{tmp_path}:teacher:a/b", f"{folders}/bc:teacher:poor"])
    assert [one.model for one in found] == ["teacher:a/b", "teacher:poor"]
