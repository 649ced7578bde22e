"""The ladder: one switch between rungs, what they share, and its table against plain sums; a table in a document."""

import itertools
import json

import numpy as np
import pytest
import train_fixtures as tiny

from mmkd_jax import cli, io
from mmkd_jax import config as configs
from mmkd_jax.errors import InputError
from mmkd_jax.evals import results, summary
from mmkd_jax.sweeps import ladder, plan, runner, table

LADDER = f"{tiny.CONFIGS}/sweeps/ladder.py"


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """What `mmkd demo --prepare` leaves, as far as a plan looks at it."""
    folder = tmp_path_factory.mktemp("demo")
    for captions in ("label", "modality"):
        (folder / f"features-{captions}").symlink_to(tiny.world() / "features")
        (folder / f"pairs-{captions}").symlink_to(tiny.world() / "pairs")
    return folder


def load(stand, workdir, argument="", *more):
    return plan.load(f"{LADDER}{argument}", [f"--config.demo={stand}", *more], workdir)


def resolved(run):
    """The config of a run, flat, without its name and what its rung's label changes."""
    words = run.commands[0]
    overrides = [word for word in words if word.startswith("--config.")]
    config = configs.to_dict(configs.load(words[words.index("--config") + 1], overrides))
    return {name: value for name, value in plan._flat(config).items() if name not in ("name", "label")}


def test_each_rung_differs_from_the_one_before_by_its_switch(stand, tmp_path):
    sweep = load(stand, tmp_path, ":seeds=1")
    found = {run.overrides["label"]: resolved(run) for run in sweep.runs}
    assert len(found) == len(sweep.runs)
    module = configs.module(LADDER)
    labels = list(module.CLIMB)
    assert [label for label in found if label in labels] == labels
    changed = lambda a, b: {name for name in found[a] if found[a][name] != found[b][name]}  # noqa: E731
    for before, after in itertools.pairwise(labels):
        routed = {"routing"} if "route" in module.CLIMB[after] else set()
        assert changed(before, after) == set(module.CLIMB[after]) | routed
    for label, change in module.BESIDE.items():
        assert changed(module.PLUS, label) == set(change) | ({"routing"} if "route" in change else set())
    for name in ("alpha", "beta"):
        assert changed(module.PLUS, f"plus-{name}") == {"teachers", "routing"}
    assert changed("public", "clip_only") == {"task", "features", "steps", "init"}
    assert found["clip_only"]["steps"] == found["public"]["steps"] + found["public"]["stage1_steps"]


def test_the_ends_of_the_climb_are_the_recipes(stand, tmp_path):
    found = {run.overrides["label"]: resolved(run) for run in load(stand, tmp_path, ":seeds=1").runs}
    for recipe, label in {"public": "public", "mean": "+icl_scale", "plus": "+routing"}.items():
        shipped = configs.to_dict(configs.load(f"{tiny.CONFIGS}/stage2_mmkd.py:demo,recipe={recipe}"))["recipe"]
        if recipe == "plus":
            shipped["icl_trained"] = False
        assert {name: found[label][f"recipe.{name}"] for name in shipped} == shipped
    assert found["+routing"]["routing"]


def test_common_parts_are_made_once_and_commands_parse(stand, tmp_path):
    sweep = load(stand, tmp_path, ":seeds=3,captions=modality")
    kinds = [task.name.split("/")[1].split("-")[0] for task in sweep.shared]
    assert kinds.count("init") == 3  # stage 1 of each seed
    # Hard, soft, and hard without each of the two teachers.
    assert kinds.count("routing") == 4
    routes = [task.commands[0] for task in sweep.shared if task.commands[0][0] == "features"]
    assert all(f"{stand}/features-label" in words and f"{stand}/pairs-label" in words for words in routes)
    for task in (*sweep.shared, *sweep.runs):
        for verb, *words in task.commands:
            args = cli.parse(verb, words)
            if verb == "train":
                config = configs.load(args.config, args.overrides)
                assert config.data.pairs == f"{stand}/pairs-modality"
                assert config.data.rows == "fit"
    assert all("endotect_gi" not in " ".join(run.commands[1]) for run in sweep.runs)


@pytest.mark.parametrize(
    ("argument", "more", "says"),
    [
        ("", ["--config.demo="], "use --config.demo=DIR"),
        (":captions=labels", [], "captions=labels: did you mean 'label'"),
        ("", ["--config.rungs=('publik',)"], "no rung 'publik'; did you mean 'public'"),
    ],
)
def test_wrong_ladders_are_one_line(stand, tmp_path, argument, more, says):
    with pytest.raises(InputError, match=says) as caught:
        load(stand, tmp_path, argument, *more)
    assert "\n" not in str(caught.value)


# --- the table ------------------------------------------------------------------------------------------------------

SETS, CASES, CLASSES = ("busi", "ham10000"), 40, 2
CURVES = {
    "public": [0.2, 0.4, 0.5],
    "+mean": [0.3, 0.6, 0.7],
    "+icl_scale": [0.1, 0.1, 0.1],
}  # plus the seed's number over 100


def answers(rate: float, seed: int):
    """Labels and scores of which about `rate` are right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(CASES) % CLASSES
    said = np.where(rng.random(CASES) < rate, labels, 1 - labels)
    return labels, np.eye(CLASSES, dtype=np.float32)[said]


def recall(labels, scores):
    return float(np.mean([(scores[labels == k].argmax(axis=1) == k).mean() for k in range(CLASSES)]))


def score(out, model, rates, seed):
    """Writes predictions and results as an evaluation does; returns the balanced accuracy of each set."""
    rows, found = [], []
    for number, name in enumerate(SETS):
        labels, scores = answers(rates[number], 10 * seed + number)
        ids = np.array([f"{name}{k}" for k in range(CASES)])
        stored = {"ids": ids, "labels": labels, "scores": scores, "groups": np.arange(CASES)}
        results.save_predictions(results.predictions_path(out, model, name, "zeroshot"), stored)
        found.append(recall(labels, scores))
        for task, value in (("zeroshot", found[-1]), ("linear_probe", found[-1] / 2)):
            about = {"model": model, "checkpoint": "", "dataset": name, "task": task, "metric": "balanced_accuracy"}
            rows.append({**about, "value": value, "low": value, "high": value, "n": CASES, "seed": 0, "context": {}})
    about = {"model": model, "checkpoint": "", "dataset": "medpix2", "task": "retrieval", "n": 9, "seed": 0}
    for metric, value in (("i2t_R@5_of_9", 0.25), ("i2t_R@5_of_9_strict", 0.9), ("t2i_R@5_of_9", 0.8)):
        rows.append({**about, "metric": metric, "value": value, "low": 0.0, "high": 1.0, "context": {}})
    results.update(io.as_path(out) / "results.json", rows)
    return found


@pytest.fixture(scope="module")
def climbed(stand, tmp_path_factory):
    """A plan with whole runs of two rungs and two seeds, one seed of a third; and their scores by label."""
    workdir = tmp_path_factory.mktemp("ladder")
    fields = [f"--config.scored={SETS}", "--config.bootstrap=200", "--config.rungs=('public', '+mean', '+icl_scale')"]
    sweep = load(stand, workdir, ":seeds=2", *fields)
    scores: dict[str, list[float]] = {}
    for run in sweep.runs:
        label, seed = run.overrides["label"], run.overrides["seed"]
        if (label, seed) == ("+icl_scale", 1):
            continue
        rates = (0.5, 0.6) if label == "public" else (0.9, 0.8)
        found = score(workdir / run.scores, "student", rates, seed)
        scores.setdefault(label, []).append(float(np.mean(found)))
        lines = [
            {"step": 30 * (k + 1), "pairs_per_second": 100.0 + k + seed}
            | {f"eval/{name}/zeroshot/balanced_accuracy": value + seed / 100 for name in SETS}
            for k, value in enumerate(CURVES.get(label, []))
        ]
        (workdir / run.name).mkdir(parents=True, exist_ok=True)
        (workdir / run.name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        io.write_json(workdir / run.name / "provenance.json", {"commit": ("ab12", "cd34-dirty")[seed], "cpus": 2})
        runner.mark_done(sweep, run)
    for model, rate in (("teacher:a", 0.95), ("teacher:b", 0.7)):
        score(stand, model, (rate, 1.6 - rate), 5)
    return sweep, scores


def test_the_table_is_the_mean_over_sets_and_seeds_of_whole_rungs(climbed):
    sweep, scores = climbed
    found = {one["rung"]: one for one in ladder.record(sweep, ladder.collect(sweep))["rungs"]}
    assert set(found) == {"public", "+mean"}  # the third lacks a seed
    for label, one in found.items():
        value, low, high = one["score"]
        assert value == pytest.approx(np.mean(scores[label]))
        assert low < value < high
        assert one["each"] == pytest.approx(scores[label])
        assert np.mean(one["linear_probe"]) == pytest.approx(value / 2)
        assert one["recall"] == [0.25, 0.25]
        assert one["pairs_per_second"] == 102.0  # of 101, 102, 102 and 103: the first of each run compiles
    gain, low, high = found["+mean"]["minus_public"]
    assert gain == pytest.approx(np.mean(scores["+mean"]) - np.mean(scores["public"]))
    assert 0 < low < gain < high
    assert found["+mean"]["minus_before"] == found["+mean"]["minus_public"]
    assert found["public"]["minus_public"] is found["public"]["minus_before"] is None
    # The last score of public: 0.5 and 0.51 of two seeds, 0.505 in the mean.
    assert found["public"]["steps_to_public"] == [None, 90]
    assert found["+mean"]["steps_to_public"] == [60, 60]


def test_references_are_the_teachers_and_the_best_of_each_set(climbed, stand):
    sweep, _ = climbed
    found = {one["name"]: one["score"] for one in ladder.record(sweep, ladder.collect(sweep))["references"]}
    each = [summary.mean(stand, ["teacher:a", "teacher:b"][k], [name]).value for k, name in enumerate(SETS)]
    (best,) = (score for name, score in found.items() if name.startswith("best teacher"))
    assert best[0] == pytest.approx(np.mean(each))
    assert best[0] > max(found["teacher:a"][0], found["teacher:b"][0])


def test_the_ladders_table_and_plot_take_the_place_of_the_sweeps(climbed, tmp_path):
    sweep, _ = climbed
    table.write(sweep)
    text = (sweep.workdir / "table.md").read_text()
    assert text.startswith(ladder.HEAD)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "| never, 90 |" in text
    assert "`+icl_scale`" not in text
    assert text.endswith("Commit `ab12`, `cd34-dirty`, 2 CPU cores.\n")
    plot = (sweep.workdir / "sweep.svg").read_text()
    assert all(name in plot for name in ("public", "+mean", "best teacher"))


# --- into a document ------------------------------------------------------------------------------------------------


class Whole:
    """A finished sweep, as far as a document needs it."""

    runs, config = (), {"name": "toy"}

    def __init__(self, folder, text):
        self.workdir = io.as_path(folder)
        (self.workdir / "table.md").write_text(text)
        (self.workdir / "sweep.svg").write_text("<svg/>")


def test_a_table_goes_to_its_place_and_nowhere_else(tmp_path):
    (tmp_path / "sweep").mkdir()
    document = tmp_path / "README.md"
    document.write_text("# Before\n")
    table.put_into(document, Whole(tmp_path / "sweep", "| one |\n"))
    first = document.read_text()
    assert first == "# Before\n\n<!-- toy -->\n| one |\n\n![toy](toy.svg)\n<!-- /toy -->\n"
    assert (tmp_path / "toy.svg").read_text() == "<svg/>"
    document.write_text(first + "\nAfter\n")
    table.put_into(document, Whole(tmp_path / "sweep", "| two |\n"))
    assert document.read_text() == first.replace("one", "two") + "\nAfter\n"


@pytest.mark.parametrize("text", [None, "<!-- toy -->", "<!-- /toy --> <!-- toy -->", "<!-- toy -->\n<!-- toy -->"])
def test_a_document_without_a_right_place_is_left_alone(tmp_path, text):
    document = tmp_path / "README.md"
    if text is not None:
        document.write_text(text)
    with pytest.raises(InputError, match=r"there is no file|must hold <!-- toy -->"):
        table.put_into(document, Whole(tmp_path, "| one |\n"))
    assert document.exists() == (text is not None)


def test_a_part_of_a_sweep_goes_into_no_document(climbed, tmp_path):
    document = tmp_path / "README.md"
    document.write_text("")
    with pytest.raises(InputError, match=r"1 runs are missing, first runs/\S*icl_scale"):
        table.put_into(document, climbed[0])
    assert document.read_text() == ""
