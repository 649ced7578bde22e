"""Where a run begins: the order of the sources, what may start fresh, other meshes, other data, no empty folders."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures as tiny
from test_placement import quiet_step

from mmkd_jax import cli, io
from mmkd_jax import config as configs
from mmkd_jax.errors import InputError
from mmkd_jax.models import state_dict, weights
from mmkd_jax.train import checkpoint, checkpoint_tools, folder, loop, optim, setup, sharding, start
from mmkd_jax.train import state as states

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = ("--config.model.image.layers=1", "--config.model.text.layers=1")


def flat(params):
    return {optim.path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def first(config, workdir, job=None, devices=1, sizes=None):
    """The first state of a run of `config` in `workdir`, and what it takes to go on from it."""
    mesh = sharding.make_mesh(sizes or {"data": -1}, jax.devices()[:devices])
    job = job or setup.build(config)
    transform = optim.optimizer(config.optimizer, job.steps, job.task.lr_scale)
    saver = checkpoint.Checkpoints(workdir)
    try:
        return start.first_state(config, mesh, job, transform, saver), mesh, job, transform
    finally:
        saver.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint of seed 1, one of seed 2, and weights files of the towers of seed 3; and what they hold."""
    root = tmp_path_factory.mktemp("sources")
    job = setup.build(tiny.stage1(*SMALL))
    held = {seed: flat(job.task.init(jax.random.key(seed))[0]) for seed in range(4)}
    for seed in (1, 2):
        saver = checkpoint.Checkpoints(root / f"seed{seed}")
        config = tiny.stage1(*SMALL)
        transform = optim.optimizer(config.optimizer, job.steps, job.task.lr_scale)
        state = states.init_state(job.task, transform, seed)
        trained = jax.tree.map(jnp.ones_like, state.opt_state)
        state = state.replace(step=jnp.asarray(3, jnp.int32), opt_state=trained)
        meta = checkpoint.describe(job.task.model.spec, job.tokenizer.files(), {}, io.json_form(job.identity))
        saver.save(3, state, meta)
        saver.close()
    params = jax.tree.map(np.asarray, job.task.init(jax.random.key(3))[0])
    weights.write_tensors(io.as_path(root / "seed3.safetensors"), state_dict.from_params(job.task.model.spec, params))
    return root, held


def came_from(state, held):
    """The seed that each group of parameters came from."""
    found = {}
    for name, value in flat(state.params).items():
        seeds = {seed for seed, params in held.items() if np.array_equal(params[name], value)}
        group = name.split("/")[0]
        found[group] = found.get(group, seeds) & seeds
    return {group: min(seeds) for group, seeds in found.items()}


@pytest.mark.parametrize(
    ("own", "named", "image", "text", "expected"),
    [
        (0, 0, 0, 0, {"image": 0, "text": 0}),
        (0, 0, 1, 0, {"image": 3, "text": 0}),
        (0, 0, 1, 1, {"image": 3, "text": 3}),
        (0, 1, 0, 0, {"image": 2, "text": 2}),
        (0, 1, 1, 1, {"image": 2, "text": 2}),
        (1, 0, 1, 0, {"image": 1, "text": 1}),
        (1, 1, 1, 1, {"image": 1, "text": 1}),
    ],
)
def test_own_checkpoint_then_the_named_one_then_weights_then_scratch(
    tmp_path, sources, own, named, image, text, expected
):
    root, held = sources
    more = [f"--config.init={root / 'seed2'}"] if named else []
    more += [f"--config.towers.{t}={root / 'seed3.safetensors'}" for t, on in (("image", image), ("text", text)) if on]
    config = tiny.stage1(*SMALL, *more)
    state = first(config, root / "seed1" if own else tmp_path)[0]
    assert {group: seed for group, seed in came_from(state, held).items() if group != "logit_scale"} == expected
    assert int(state.step) == (3 if own else 0)
    for leaf in jax.tree.leaves(state.opt_state):  # only its own checkpoint brings an optimiser's state
        np.testing.assert_array_equal(leaf, own)


def test_what_a_start_lacks_is_fresh_only_by_rule(tmp_path, sources):
    root, held = sources
    name = f"--config.init={root / 'seed2'}"
    config = tiny.stage2("plus", name, f"--config.routing={tiny.world() / 'routing.json'}", *SMALL)
    job = setup.build(config)
    state = first(config, tmp_path / "run", job)[0]
    fresh = flat(job.task.init(jax.random.key(config.seed))[0])
    for path, value in flat(state.params).items():
        wanted = held[2][path] if path in held[2] else fresh[path]
        np.testing.assert_array_equal(value, wanted, err_msg=path)
    assert any(path.startswith("heads/") for path in fresh)
    with config.unlocked():
        config.fresh = ("^icl_scale$",)
    with pytest.raises(InputError, match="has no parameter heads/alpha"):
        first(config, tmp_path / "run", job)
    # A later stage 2 takes the heads along, and only a new teacher's starts fresh.
    saver = checkpoint.Checkpoints(tmp_path / "before")
    other = jax.tree.map(lambda x: x + 1, state)
    saver.save(1, other, checkpoint.describe(job.task.model.spec, job.tokenizer.files(), {}, {}))
    saver.close()
    with config.unlocked():
        config.fresh, config.init = (), str(tmp_path / "before")
    again = first(config, tmp_path / "run", job)[0]
    jax.tree.map(np.testing.assert_array_equal, again.params, other.params)


def test_weights_that_do_not_fit_and_files_that_are_not_there_are_refused(tmp_path, sources):
    root, _ = sources
    (tmp_path / "empty").mkdir()
    for override, says in (
        (f"--config.towers.image={tmp_path / 'nothing.bin'}", "nothing.bin does not exist"),
        (f"--config.towers.text={tmp_path / 'empty'}", "holds no weights"),
        (f"--config.towers.text={root / 'seed3.safetensors'} --config.model.text.width=64", "does not fit the text"),
        (f"--config.init={tmp_path}", "holds no checkpoint"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            loop.run(tiny.stage1(*SMALL, *override.split(" ")), tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_another_data_set_than_the_checkpoints_is_refused_unless_told(tmp_path, sources):
    root, _ = sources
    config = tiny.stage1(*SMALL)
    job = setup.build(config)
    job.identity["set"] = "another"
    with pytest.raises(InputError, match=r"checkpoint 3 of this run was trained on another data\.set .*other_set"):
        first(config, root / "seed1", job)
    with config.unlocked():
        config.data.other_set = True
    assert int(first(config, root / "seed1", job)[0].step) == 3


def test_told_so_a_run_goes_on_with_other_data_and_records_both(tmp_path):
    run = tmp_path / "run"
    loop.run(tiny.stage1(*SMALL, "--config.batch=8"), run)
    before = io.read_json(run / "config.json")
    other = ("--config.data.rows=test", *SMALL)
    with pytest.raises(InputError, match=r"another config\.data\.rows .*--config\.data\.other_set goes on"):
        loop.run(tiny.stage1(*other), run)
    with pytest.raises(InputError, match=r"another config\.optimizer\.lr"):  # telling allows other data, nothing else
        loop.run(tiny.stage1(*other, "--config.data.other_set=True", "--config.optimizer.lr=1.0"), run)
    assert io.read_json(run / "config.json") == before
    loop.run(tiny.stage1(*other, "--config.data.other_set=True"), run)  # finished: nothing is left to do
    (run / "checkpoints" / "4" / "commit_success.txt").unlink()
    loop.run(tiny.stage1(*other, "--config.data.other_set=True"), run)
    assert io.read_json(run / "config.json")["config"]["data"]["rows"] == "test"
    made = io.read_json(run / "provenance.json")
    assert made["data"] != made["before"]["data"]
    assert checkpoint.load_meta(run)["data"] == io.json_form(made["data"])


# One value that is not the smoke config's for each field that may change, in the order of `folder.FREE`.
FREE = (
    "name=other", "ema=0.5", "watchdog=1.0", "wandb=x", "log_every=3", "save_every=3", "save_minutes=1.0", "keep=5",
    "best=min:loss", "unsharded=1.0", "remat=full", "accumulate=2", "loss.form=ring", "data.pairs=/moved",
    "data.threads=2", "features=/moved", "routing=/moved", "selection=/moved", "maps=/moved", "tokenizer=/moved",
    "init=/moved", "evaluation.every=2", "evaluation.pairs=/moved", "evaluation.sets=('busi',)",
    "evaluation.tasks=('knn',)", "evaluation.prompts=names", "evaluation.split=val",
    "mesh.data=4", "mesh.fsdp=2", "mesh.tensor=2", "mesh.slices=2", "sharding=(('.*', ()),)",
)  # fmt: skip


def test_a_run_goes_on_with_other_fields_where_they_change_no_result(tmp_path):
    """All fields but a list may not change; and those of the list are there."""
    config = tiny.stage2("plus", *SMALL)
    job = setup.build(config)
    now = folder.record(config, job)
    io.write_json(io.as_path(tmp_path) / folder.CONFIG, now)
    for change in FREE:
        other = tiny.stage2("plus", *SMALL, f"--config.{change}")
        assert folder.record(other, job)["config"] != now["config"], change
        folder.refuse_another(io.as_path(tmp_path), folder.record(other, job))
    changed = {change.partition("=")[0] for change in FREE}
    for name in configs._fields(config):
        other = io.json_form(now)
        *sections, last = name.split(".")
        section = other["config"]
        for part in sections:
            section = section[part]
        section[last] = "another"
        if name in changed or name == "data.other_set":  # which says that other data are wanted
            folder.refuse_another(io.as_path(tmp_path), other)
        else:
            with pytest.raises(InputError, match=f"another config.{name} "):
                folder.refuse_another(io.as_path(tmp_path), other)
    assert "spikes.action" not in changed


def test_a_run_and_what_it_began_with_may_be_moved_but_not_exchanged(tmp_path, sources):
    root, _ = sources
    job, run = setup.build(tiny.stage1(*SMALL)), io.as_path(tmp_path / "run")
    record = lambda init: folder.record(tiny.stage1(*SMALL, f"--config.init={init}"), job)  # noqa: E731
    shutil.copytree(root / "seed1", tmp_path / "moved")
    run.mkdir()
    folder.claim(run, record(root / "seed1"))
    folder.refuse_another(run, record(tmp_path / "moved"))
    folder.claim(run, record("gone"))  # nothing asks for it any more, but it is remembered
    folder.refuse_another(run, record(tmp_path / "moved"))
    for other in (root / "seed2", ""):
        with pytest.raises(InputError, match="another began"):
            folder.refuse_another(run, record(other))


def test_a_run_that_goes_on_otherwise_records_both(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_step", quiet_step)
    loop.run(tiny.stage1(*SMALL, "--config.batch=8"), tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "4" / "commit_success.txt").unlink()
    loop.run(
        tiny.stage1(*SMALL, "--config.watchdog=1.0", "--config.mesh.fsdp=2", "--config.unsharded=1.0"), tmp_path / "run"
    )
    assert io.read_json(tmp_path / "run" / "config.json")["config"]["watchdog"] == 1.0
    assert "before" in io.read_json(tmp_path / "run" / "provenance.json")
    assert (tmp_path / "run" / "sharding.txt").read_text().startswith("mesh: data 4, fsdp 2,")


def test_licences_of_what_a_run_began_with_go_on_with_it(tmp_path, capsys):
    """From a teacher to a student to what starts from that, though the earlier ones are gone; and into the export."""

    def began(folder, *overrides):
        saver = checkpoint.Checkpoints(folder)
        try:
            return start.inherited(tiny.stage1(*SMALL, *overrides), saver)
        finally:
            saver.close()

    job = setup.build(tiny.stage1(*SMALL))
    about = job.task.model.spec, job.tokenizer.files(), {}
    params = {"params": jax.tree.map(np.asarray, job.task.init(jax.random.key(0))[0])}
    terms = {"licences": {"teachers": {"UniMed-CLIP": "cc-by-nc-4.0"}, "data": {"CC0-1.0": 3}}}
    first = {"teacher UniMed-CLIP": "cc-by-nc-4.0", "data under CC0-1.0": "CC0-1.0"}
    assert began(tmp_path / "new") == {}
    assert began(tmp_path / "new", "--config.towers.text=a/bert.bin") == {"starting weights bert.bin": "not stated"}
    for name, meta in (
        ("teacher", checkpoint.describe(*about, terms)),
        ("student", checkpoint.describe(*about, {"licences": {"teachers": {}, "data": {"CC BY 4.0": 1}}}, first)),
    ):
        saver = checkpoint.Checkpoints(tmp_path / name)
        saver.save(0, params, meta)
        saver.close()
    assert began(tmp_path / "new", f"--config.init={tmp_path / 'teacher'}") == first
    assert began(tmp_path / "student", "--config.init=gone") == first  # it goes on: what it began with is not asked for
    both = {**first, "data under CC BY 4.0": "CC BY 4.0"}
    assert began(tmp_path / "new", f"--config.init={tmp_path / 'student'}") == both
    arguments = ["export", "--checkpoint", str(tmp_path / "student"), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--use", "commercial"]) == 2
    assert "teacher UniMed-CLIP (cc-by-nc-4.0) forbids commercial use" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    assert "cc-by-nc-4.0" in (tmp_path / "out" / "README.md").read_text()
    mean = checkpoint_tools.averaged([tmp_path / "student", tmp_path / "teacher"], tmp_path / "mean")
    assert checkpoint.load_meta(mean)["inherited"] == both


def test_a_run_keeps_the_licences_that_it_inherits(tmp_path, sources):
    root, _ = sources
    run = loop.run(tiny.stage1(*SMALL, "--config.steps=1", f"--config.init={root / 'seed1'}"), tmp_path / "run")
    assert checkpoint.load_meta(run)["inherited"] == {"data under CC0": "CC0"}


def test_a_refused_run_leaves_no_folder(tmp_path, capsys):
    command = ["train", "--config", f"{tiny.CONFIGS}/stage1_clip.py:smoke", "--workdir", str(tmp_path / "run")]
    for wrong in ("--config.batch=12", "--config.data.pairs=/nowhere", "--config.mesh.data=3", "--config.best=loss"):
        assert cli.main([*command, *tiny.overrides(*SMALL, wrong)]) == 2
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert cli.main([*command, *tiny.overrides(*SMALL, "--config.batch=12")]) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    capsys.readouterr()


# Another mesh. What may differ is the order in which float32 sums are taken: in products, in the loss over the batch,
# in gradients over devices. Losses of 2 and 3 nats then agree to some units in the last place of float32 (6e-8), 1e-6
# with room; Adam divides by the root of the second moment, and so enlarges what differs where a gradient is nearly
# zero: parameters are compared by the norm of the difference over the norm of what two steps changed, 2e-3.
LOSS, CHANGE = 1e-6, 2e-3
MESHES = {(8, 1): 8, (2, 1): 2, (1, 1): 1}


def go_on(state, mesh, job, transform, config, steps=(2, 3)):
    """Losses of further steps, the parameters after them, and the state."""
    step_fn = jax.jit(
        states.make_step(job.task, transform, config.seed),
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    losses = []
    for step in steps:
        batch = job.batches.batch(step)
        batch = sharding.global_batch({k: batch[k] for k in job.fields if k in batch}, mesh)
        state, reports = step_fn(state, batch)
        losses.append(float(reports["loss"]))
    return np.array(losses), flat(state.params), state


def apart(one, two, start_from):
    """Norm of the difference of two sets of parameters over the norm of what the first changed."""
    norm = lambda x, y: np.sqrt(sum(np.sum(np.square(np.float64(x[k]) - y[k])) for k in x))  # noqa: E731
    return norm(one, two) / norm(one, start_from)


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """A run on a (4, 2) mesh saved after two steps, and how it goes on there."""
    folder = tmp_path_factory.mktemp("divided")
    config = tiny.stage1("--config.batch=8", "--config.optimizer.warmup=0", "--config.unsharded=1.0", *SMALL)
    state, mesh, job, transform = first(config, folder, devices=8, sizes={"data": 4, "fsdp": 2})
    _, _, state = go_on(state, mesh, job, transform, config, (0, 1))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.opt_state))
    saver = checkpoint.Checkpoints(folder)
    meta = checkpoint.describe(job.task.model.spec, job.tokenizer.files(), {}, io.json_form(job.identity))
    saver.save(2, state, meta)
    saver.close()
    saved = flat(state.params)
    return folder, config, saved, go_on(state, mesh, job, transform, config)[:2]


@pytest.mark.parametrize("sizes", MESHES)
def test_a_checkpoint_goes_on_on_another_mesh(divided, sizes):
    folder, config, saved, (losses, params) = divided
    state, mesh, job, transform = first(config, folder, None, MESHES[sizes], {"data": sizes[0], "fsdp": sizes[1]})
    assert int(state.step) == 2
    for name, value in flat(state.params).items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)
    mine, ended, _ = go_on(state, mesh, job, transform, config)
    np.testing.assert_allclose(mine, losses, rtol=LOSS)
    assert apart(params, ended, saved) < CHANGE


def test_a_wrong_batch_or_a_lost_optimiser_state_would_be_seen(divided):
    folder, config, saved, (losses, params) = divided
    state, mesh, job, transform = first(config, folder, None, 1)
    wrong, ended, _ = go_on(state, mesh, job, transform, config, (3, 2))
    assert np.abs(wrong / losses - 1).min() > 10 * LOSS
    assert apart(params, ended, saved) > 10 * CHANGE
    lost = state.replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state))
    after, ended, _ = go_on(lost, mesh, job, transform, config)
    assert np.abs(after / losses - 1).max() > 10 * LOSS
    assert apart(params, ended, saved) > 10 * CHANGE
