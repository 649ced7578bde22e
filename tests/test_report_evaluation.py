"""The page of an evaluation folder: what it says is what results and predictions say, and nothing is left unsaid."""

import re

import data_fixtures as toy
import numpy as np
import pytest
from test_compare import CLASSES, SKILL, N, outputs, store

from mmkd_jax import report
from mmkd_jax.cli import main
from mmkd_jax.errors import InputError
from mmkd_jax.evals import metrics, results
from mmkd_jax.evals.floor import FLOOR
from mmkd_jax.report import compare, evaluation, examples, floor, ranks, reliability
from mmkd_jax.report.board import Board

MODALITY = {"eyes": "fundus", "lungs": "ct", "skin": "ct"}


def row(model, dataset, value, **context):
    about = {"model": model, "checkpoint": f"runs/{model}", "dataset": dataset, "task": "zeroshot"}
    context = {"modality": MODALITY[dataset], "classes": CLASSES[dataset], "model_hash": model} | context
    numbers = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": N[dataset], "seed": 0}
    return {**about, "metric": "balanced_accuracy", **numbers, "context": context}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models on three sets; the poorest lacks skin."""
    out, rows = tmp_path_factory.mktemp("evaluated"), []
    for k, (model, skill) in enumerate(SKILL.items()):
        for dataset in N:
            if (model, dataset) != ("teacher:poor", "skin"):
                arrays = outputs(dataset, skill, k)
                store(out, model, dataset, arrays)
                value = metrics.balanced_accuracy(arrays["labels"], arrays["predictions"])
                rows.append(row(model, dataset, value))
    results.save(out / "results.json", rows)
    return out


@pytest.fixture(scope="module")
def data(folder):
    return evaluation.gather(folder)


def text(markup) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", str(markup)))


def values_of(folder):
    return {(r["model"], r["dataset"]): r["value"] for r in results.load(folder / "results.json")}


def test_ranks_are_over_the_sets_that_all_have_and_the_others_are_named(folder, data):
    values = values_of(folder)
    (record,) = data["comparisons"]
    assert record["summary"]["datasets"] == ["eyes", "lungs"]
    assert data["highlight"] == record["models"][0]["label"] == "good"
    means = {r["model"]: r for r in data["rows"] if r["dataset"] == "mean"}
    for model in SKILL:
        assert means[model]["value"] == pytest.approx((values[model, "eyes"] + values[model, "lungs"]) / 2)
    assert any("skin" in note and "teacher:poor" in note for note in data["notes"])
    page = text(report.page(data))
    assert compare.headline(record) in page
    assert "mean of 2 of 3 sets" in page
    assert "skin (absent: teacher:poor)" in page


def test_modalities_show_who_lacks_what(folder, data):
    values = values_of(folder)
    shown = text(ranks.modalities(Board(data), "zeroshot", "balanced_accuracy"))
    ct = 100 * (values["good", "lungs"] + values["good", "skin"]) / 2
    assert f"good {ct:.1f} {100 * values['good', 'eyes']:.1f}" in shown
    assert f"poor – lacks 1 {100 * values['teacher:poor', 'eyes']:.1f}" in shown  # no mean over half of the modality


def test_wins_are_counted_over_common_sets(folder, data):
    values = values_of(folder)
    shown = text(ranks.duels(data["comparisons"][0]))
    for model in SKILL:
        won = [
            "·" if other == model else str(sum(values[model, d] > values[other, d] for d in ("eyes", "lungs")))
            for other in (one["label"] for one in data["comparisons"][0]["models"])
        ]
        assert f"{model} {' '.join(won)}" in shown


def test_calibration_is_that_of_the_predictions(folder):
    found = reliability.measure(folder, "good", ["eyes"])
    arrays = outputs("eyes", SKILL["good"], 0)
    confidence = arrays["scores"].max(1).astype(float)
    right = arrays["predictions"] == arrays["labels"]
    assert sum(b["share"] for b in found["bins"]) == pytest.approx(1)
    assert sum(b["share"] * b["right"] for b in found["bins"]) == pytest.approx(right.mean())
    assert sum(b["share"] * b["confidence"] for b in found["bins"]) == pytest.approx(confidence.mean())
    gaps = [b["share"] * abs(b["right"] - b["confidence"]) for b in found["bins"]]
    assert found["ece"] == pytest.approx(sum(gaps))
    both = reliability.measure(folder, "good", ["eyes", "skin"])  # sets count alike whatever their sizes
    other = reliability.measure(folder, "good", ["skin"])
    assert both["ece"] == pytest.approx((found["ece"] + other["ece"]) / 2)
    for part, whole in zip(("right",), (both,)):
        mean = [sum(b["share"] * b[part] for b in one["bins"]) for one in (found, other)]
        assert sum(b["share"] * b[part] for b in whole["bins"]) == pytest.approx(np.mean(mean))


def test_numbers_of_different_weights_under_one_name_are_told(folder, tmp_path):
    rows = results.load(folder / "results.json")
    rows[0]["context"]["model_hash"] = "older"
    results.save(tmp_path / "results.json", rows)
    notes = evaluation.gather(tmp_path)["notes"]
    assert [note for note in notes if "different weights" in note] == [
        "good: its sets were evaluated with different weights; evaluate all of them again"
    ]


def test_numbers_of_every_task_are_on_the_page(folder):
    """Of a task without a part of its own too: a page that leaves out what was measured misleads."""
    few = {"task": "label_efficiency", "metric": "accuracy_at_10%", "low": 0.3, "high": 0.5}
    counted = {"task": "zeroshot_mmkd", "metric": "auc", "value": 65.52, "low": 58.4, "high": 72.3}
    rows = [row("good", "eyes", 0.42) | few, row("good", "eyes", 0, unit="percent") | counted]
    page = text(report.page({"title": "few", "rows": [*rows, row("good", "eyes", 0.5)]}))
    assert "label efficiency on eyes Number good accuracy at 10% 0.42 0.3 to 0.5" in page
    assert "zeroshot mmkd on eyes, in percent Number good auc 65.5 58.4 to 72.3" in page
    assert page.count("on eyes Number") == 1  # zero-shot has its own part
    assert "Further numbers" not in text(report.page({"title": "plain", "rows": [row("good", "eyes", 0.5)]}))


def test_cases_are_right_and_wrong_as_predicted(tmp_path):
    pairs = toy.make_pairs(tmp_path / "pairs")
    rows, classes = np.arange(20), ("cat", "dog")
    scores = np.random.default_rng(0).dirichlet([1, 1], 20)
    labels = np.asarray(pairs.table["label_id"])[rows]
    arrays = {"ids": pairs.table["id"][rows].astype(str), "labels": labels, "scores": scores, "groups": rows}
    store(tmp_path, "model", "toy", arrays)
    found = examples.cases(tmp_path, "model", pairs, "toy", classes, each=3)
    right = scores.argmax(1) == labels
    assert found["accuracy"] == right.mean()
    assert all(case["truth"] == case["answer"] for case in found["right"])
    assert all(case["truth"] != case["answer"] for case in found["wrong"])
    assert (len(found["right"]), len(found["wrong"])) == (min(3, right.sum()), min(3, (~right).sum()))
    page = report.page({"cases": [found]})
    assert page.count("data:image/jpeg") == len(found["right"]) + len(found["wrong"])
    assert page.count("✓ right") == len(found["right"])
    store(tmp_path, "model", "toy", arrays | {"ids": np.array([f"{i:032x}" for i in rows])})
    with pytest.raises(InputError, match="evaluated on other rows"):
        examples.cases(tmp_path, "model", pairs, "toy", classes)


def test_the_page_needs_nothing_but_the_folder(folder, tmp_path, capsys):
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    for part in ("By modality", "Ranks: zeroshot", "Whether probabilities can be believed", "Read with care"):
        assert part in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page


def test_models_of_other_cases_are_not_ranked_and_it_says_so(folder, tmp_path):
    rows = results.load(folder / "results.json")
    for k, model in enumerate(("good", "fair")):
        arrays = outputs("eyes", 1.0, k)
        store(tmp_path, model, "eyes", arrays | {"ids": np.array([f"{model}{i}" for i in range(N["eyes"])])})
    results.save(
        tmp_path / "results.json", [r for r in rows if r["dataset"] == "eyes" and r["model"] in ("good", "fair")]
    )
    found = evaluation.gather(tmp_path)
    assert not found["comparisons"]
    assert any("not ranked" in note and "not tested on the same cases" in note for note in found["notes"])
    assert "not ranked" in report.page(found)


def test_who_finds_less_than_pixels_is_said_and_whether_by_chance(tmp_path):
    """Skill 3 is far above what the floor knows (1.5), 0 far below, and 1.45 below by no more than chance could."""
    rows = []
    for k, (model, skill) in enumerate({FLOOR: 1.5, "good": 3.0, "bad": 0.0, "near": 1.45}.items()):
        arrays = outputs("lungs", skill, k % 2)
        store(tmp_path, model, "lungs", arrays, "linear_probe")
        value = metrics.balanced_accuracy(arrays["labels"], arrays["predictions"])
        rows.append({**row(model, "lungs", value), "task": "linear_probe"})
    values = {one["model"]: one["value"] for one in rows}
    assert values["near"] < values[FLOOR] < values["good"]
    bad, near = sorted(floor.shortfalls(tmp_path, rows))
    assert bad.startswith("bad is below floor:pixels in linear_probe, beyond chance on lungs")
    assert f"{values['bad']:.3f} against {values[FLOOR]:.3f}" in bad
    assert "too few cases to say so" not in bad
    assert near.startswith("near is below floor:pixels in linear_probe, too few cases to say so on lungs")
    assert "beyond chance" not in near
    assert floor.shortfalls(tmp_path, [one for one in rows if one["model"] != FLOOR]) == []
