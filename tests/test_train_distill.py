"""Stage 2 through the loop: from a stage-1 checkpoint, stopped and taken up, on any devices, and what it refuses."""

import dataclasses
import json
import os
import shutil

import data_fixtures as toy
import jax
import numpy as np
import pytest
import train_fixtures as tiny

import mmkd_jax
from mmkd_jax import cli, io
from mmkd_jax import config as configs
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.selection import Selection
from mmkd_jax.errors import InputError
from mmkd_jax.models import heads
from mmkd_jax.tasks import maps
from mmkd_jax.tasks.base import Features
from mmkd_jax.tasks.distill import RELEASED_ICL_SCALE, Recipe
from mmkd_jax.train import checkpoint, loop, optim, setup, sharding

SMALL = ("--config.model.image.layers=1", "--config.model.text.layers=1")  # half the time to compile
pytestmark = pytest.mark.usefixtures("quick_compilation")
RECIPES = {
    "public": {"loss/feature", "loss/icl"},
    "mean": {"loss/feature", "loss/icl"},
    "plus": {"loss/feature", "loss/affinity"},
}


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """A checkpoint of stage 1."""
    return tiny.untrained(tiny.stage1("--config.seed=5", *SMALL), tmp_path_factory.mktemp("run") / "stage1")


@pytest.fixture(scope="module")
def make_config(stage1):
    def make(recipe, *more):
        routing = [f"--config.routing={tiny.world() / 'routing.json'}"] if recipe == "plus" else []
        return tiny.stage2(recipe, f"--config.init={stage1}", *routing, *SMALL, *more)

    return make


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    """A function: the folder of an undisturbed run of a recipe, and the parameters that it began with."""
    made = {}

    def run(recipe):
        if recipe not in made:
            began = []
            real = loop.first_state

            def start(*args):
                state = real(*args)
                began.append(named(state.params))
                return state

            loop.first_state = start
            try:
                folder = loop.run(make_config(recipe), tmp_path_factory.mktemp("run") / recipe)
            finally:
                loop.first_state = real
            made[recipe] = folder, began[0]
        return made[recipe]

    return run


def stored(name: str) -> FeatureSet:
    """The features of a teacher."""
    return FeatureSet.open(tiny.world() / "features" / name, tiny.pairs())


def named(params):
    return {optim.path_of(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


def parameters(config, workdir):
    """All parameters of a run's last checkpoint, heads and scales too."""
    like = jax.eval_shape(lambda: setup.build(config).task.init(jax.random.key(0)))[0]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    return named(checkpoint.load_params(workdir, like))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_starts_from_the_towers_of_stage_1_and_trains(finished, make_config, stage1, recipe):
    folder, began = finished(recipe)
    config = make_config(recipe)
    towers = named(mmkd_jax.load(stage1).params)
    fresh = {"public": {}, "mean": {"icl_scale": np.float32(RELEASED_ICL_SCALE)}}
    fresh["plus"] = {"heads": heads.init(jax.random.key(config.seed), {"alpha": 6, "beta": 10}, config.model.embed)}
    expected = {**towers, **named(fresh[recipe])}
    assert began.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(began[name], value, err_msg=name)
    assert len(expected) - len(towers) == {"public": 0, "mean": 1, "plus": 8}[recipe]
    lines = tiny.losses(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert RECIPES[recipe] | {"loss/task", "logit_scale", "grad_norm"} < set(line)
        assert all(np.isfinite(value) for value in line.values())
    ended = parameters(config, folder)
    for name in began:
        assert np.any(ended[name] != began[name]), f"{name} did not change"
    assert io.read_json(folder / "provenance.json")["data"]["features"].keys() == {"alpha", "beta"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_and_started_again_it_ends_the_same(finished, make_config, tmp_path, monkeypatch, recipe):
    """Stopped between the third step and its checkpoint: it goes on from the second, and stage 1 is not read again."""
    whole, _ = finished(recipe)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "4")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    assert checkpoint.find(run).name == "2"
    monkeypatch.setattr(checkpoint, "load_params", lambda *args: pytest.fail("started from stage 1"))
    loop.run(make_config(recipe), run)
    monkeypatch.undo()
    assert tiny.losses(run) == tiny.losses(whole)
    mine, theirs = parameters(make_config(recipe), run), parameters(make_config(recipe), whole)
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_recipes_differ(finished):
    """Same start, same batches: the task loss of the first step is the same, and what is added is not."""
    first = {recipe: tiny.losses(finished(recipe)[0])[0] for recipe in RECIPES}
    assert len({line["loss/task"] for line in first.values()}) == 1
    assert len({line["loss/feature"] for line in first.values()}) == 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_device_and_eight_give_the_same_draw_and_loss(make_config, recipe):
    """The global batch is divided over the devices; the draw of teachers and what a row is compared with are not."""
    job = setup.build(make_config(recipe, "--config.batch=16"))
    params = {"logit_scale": np.float32(2.5), "icl_scale": np.float32(1.5)}
    params["heads"] = heads.init(jax.random.key(0), {"alpha": 6, "beta": 10}, 32)
    rng = np.random.default_rng(0)
    made = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 16, 32)).astype(np.float32)]
    batch = {k: v for k, v in job.batches.batch(0).items() if k in ("modality", "targets")}

    @jax.jit
    def objective(params, features, batch, step):
        def loss(features):
            value, reports, _ = job.task.objective(params, features, batch, step)
            return value, reports

        return jax.value_and_grad(loss, has_aux=True)(features)

    found = {}
    for count in (1, 8):
        mesh = sharding.make_mesh({"data": -1}, jax.devices()[:count])
        divided = sharding.global_batch((Features(*made), batch), mesh)
        everywhere = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        (value, reports), gradients = objective(everywhere, *divided, np.int32(3))
        assert len(divided[0].image.sharding.device_set) == count
        found[count] = [value, *(reports[name] for name in sorted(reports)), *gradients[:2]]
    for one, eight in zip(found[1], found[8], strict=True):
        np.testing.assert_allclose(one, eight, rtol=2e-5, atol=2e-5 * np.abs(one).max())
    if recipe == "public":
        (_, reports), _ = objective(everywhere, *divided, np.int32(4))
        assert abs(reports["loss/feature"] / found[8][1] - 1) > 1e-3  # another draw would be seen


def test_the_shipped_config_has_the_released_numbers():
    """MMKD-CLIP's run_configs_400m.py, class b16_kd, and its KDClipLoss."""
    config = configs.load(str(tiny.CONFIGS / "stage2_mmkd.py"))
    assert dict(config.recipe) == dataclasses.asdict(Recipe())
    assert (config.recipe.target, config.recipe.feature_weight, config.recipe.icl_weight) == ("random", 50.0, 1.0)
    assert config.recipe.icl_trained is False
    assert round(RELEASED_ICL_SCALE, 3) == 2.659
    assert (config.optimizer.lr, config.optimizer.warmup, config.optimizer.clip) == (1e-6, 2000, 0.0)
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.epsilon) == (0.9, 0.98, 1e-6)
    assert (config.optimizer.decay, config.epochs, config.model.text.dropout) == (0.2, 20, 0.1)
    mean = configs.load(str(tiny.CONFIGS / "stage2_mmkd.py:recipe=mean")).recipe
    assert (mean.target, mean.icl_trained) == ("mean", True)


# --- wrong input ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """Places that are wrong in one way each."""
    root = tmp_path_factory.mktemp("wrong")
    toy.make_pairs(root / "other_pairs", 41)
    projected = {"teacher": "gamma", "width": 6, "space": "projected", "policy": tiny.POLICY}
    toy.make_features(root / "projected" / "gamma", tiny.pairs(), **projected)
    more_views = {"teacher": "beta", "views": 3, "policy": tiny.POLICY}
    toy.make_features(root / "views" / "beta", tiny.pairs(), **more_views)
    shutil.copytree(tiny.world() / "features" / "alpha", root / "views" / "alpha")
    shutil.copytree(tiny.world() / "features" / "alpha", root / "renamed" / "delta")
    for folder, names in (("maps", ("alpha", "beta")), ("exchanged", ("beta", "alpha"))):
        for name, other in zip(("alpha", "beta"), names):
            maps.fit("identity", stored(other)).save(root / folder / f"{name}.npz")
    (root / "empty").mkdir()
    (root / "stranger.json").write_text(json.dumps({"weights": {"ct": {"alhpa": 1.0}}}))
    (root / "nothing.json").write_text(json.dumps({"weights": {m: {"alpha": 0} for m in toy.MODALITIES}}))
    (root / "elsewhere.json").write_text(json.dumps({"weights": {"ct scan": {"alpha": 1.0}}}))
    (root / "other.json").write_text(json.dumps({"ct": {"alpha": 1.0}}))
    return root


@pytest.mark.parametrize(
    ("recipe", "override", "says"),
    [
        ("public", "--config.data.pairs={wrong}/other_pairs", "are features of another set of pairs"),
        ("public", "--config.features={wrong}/projected", "projected features of gamma are 6 wide, the student 32"),
        ("mean", "--config.features={wrong}/projected", "projected features of gamma are 6 wide, the student 32"),
        ("public", "--config.features={wrong}/views", "different numbers of views"),
        ("public", "--config.features={wrong}/renamed", "holds the features of teacher 'alpha'"),
        ("public", "--config.features={wrong}/empty", "holds no feature set"),
        ("public", "--config.features={wrong}/nowhere", "holds no feature set"),
        ("public", "--config.features=", "stage 2 needs the teachers' features"),
        ("public", "--config.teachers=('alhpa',)", "did you mean 'alpha'"),
        ("public", "--config.data.views.seed=1", "have the view policy"),
        ("plus", "--config.routing={wrong}/stranger.json", "names teacher 'alhpa'"),
        ("plus", "--config.routing={wrong}/nothing.json", "no teacher"),
        ("plus", "--config.routing={wrong}/elsewhere.json", "none of the pairs' modalities"),
        ("plus", "--config.routing={wrong}/other.json", "is no routing table"),
        ("plus", "--config.routing={wrong}/nowhere.json", "does not exist"),
        ("public", "--config.maps={wrong}/nowhere", "it should hold the target map"),
        ("public", "--config.maps={wrong}/maps", "targets of alpha are 6 wide, the student 32"),
        ("plus", "--config.maps={wrong}/exchanged", "maps 10-wide features of beta"),
        ("plus", "--config.recipe.head=cnn", "recipe head 'cnn'"),
        ("public", "--config.recipe.target=randm", "did you mean 'random'"),
        ("pubic", "--config.seed=0", "did you mean 'public'"),
        ("public", "--config.init={wrong}", "holds no checkpoint"),
        ("public", "--config.model.image.layers=3", "the model wants"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_run(stage1, wrong, tmp_path, capsys, recipe, override, says):
    command = ["train", "--config", f"{tiny.CONFIGS}/stage2_mmkd.py:smoke,recipe={recipe}"]
    command += ["--workdir", str(tmp_path / "run"), f"--config.features={tiny.world() / 'features'}"]
    command += [f"--config.init={stage1}", *tiny.overrides(), *SMALL, override.format(wrong=wrong)]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    left = os.listdir(tmp_path / "run") if (tmp_path / "run").exists() else []
    assert set(left) <= {"checkpoints"}
    assert not left or not os.listdir(tmp_path / "run" / "checkpoints")


def test_a_corrected_command_goes_on_in_the_same_folder(make_config, wrong, tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        loop.run(make_config("public", f"--config.init={wrong}"), tmp_path / "run")
    loop.run(make_config("public"), tmp_path / "run")
    assert len(tiny.losses(tmp_path / "run")) == 4


def test_a_run_is_not_continued_with_another_routing_table_under_the_same_name(make_config, tmp_path):
    table = {"weights": {modality: {"alpha": 1.0} for modality in toy.MODALITIES}}
    path = tmp_path / "routing.json"
    path.write_text(json.dumps(table))
    config = make_config("plus", f"--config.routing={path}")
    loop.run(config, tmp_path / "run")
    path.write_text(json.dumps({**table, "note": "weights are the same"}))
    loop.run(config, tmp_path / "run")
    path.write_text(json.dumps({"weights": {modality: {"beta": 1.0} for modality in toy.MODALITIES}}))
    with pytest.raises(InputError, match=r"another data\.routing"):
        loop.run(config, tmp_path / "run")


def test_target_maps_and_the_selection_are_part_of_a_runs_identity(make_config, tmp_path):
    """By what they do and not by their path: a run is refused by its identity, as the test above shows."""
    for name in ("alpha", "beta"):
        maps.fit("centre", stored(name)).save(tmp_path / "maps" / f"{name}.npz")
    kept = Selection(np.ones((len(tiny.pairs()), 2), bool), ("alpha", "beta"), tiny.pairs().hash)
    kept.save(tmp_path / "kept.npz")
    config = make_config("plus", f"--config.maps={tmp_path / 'maps'}", f"--config.selection={tmp_path / 'kept.npz'}")
    before = setup.build(config).identity
    assert setup.build(config).identity == before
    assert before["selection"] == kept.hash
    maps.fit("whiten", stored("beta")).save(tmp_path / "maps" / "beta.npz")
    other = setup.build(config).identity
    assert other["maps"]["beta"] != before["maps"]["beta"]
    assert {**other, "maps": before["maps"]} == before
    assert "maps" not in setup.build(make_config("plus")).identity
