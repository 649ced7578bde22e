"""The loop: what a run leaves, that it goes on bit for bit, on any devices, and what it refuses."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import processes
import pytest
import train_fixtures as tiny

import mmkd_jax
from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.train import checkpoint, loop, optim, setup, sharding
from mmkd_jax.train import state as states

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_compilation):
    """An undisturbed run of four steps."""
    return loop.run(tiny.stage1(), tmp_path_factory.mktemp("run") / "stage1")


def parameters(workdir):
    student = mmkd_jax.load(workdir)
    return {optim.path_of(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(student.params)}


def assert_same(first, second):
    assert tiny.losses(first) == tiny.losses(second)
    mine, theirs = parameters(first), parameters(second)
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_a_run_leaves_what_it_should(finished):
    lines = tiny.losses(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert {"config.json", "provenance.json", "tensorboard", "checkpoints"} <= set(os.listdir(finished))
    assert io.read_json(finished / "provenance.json")["data"]["set"] == tiny.pairs().hash
    events = os.listdir(finished / "tensorboard")
    assert events
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = EventAccumulator(str(finished / "tensorboard")).Reload().Tensors("loss")
    np.testing.assert_allclose([event.tensor_proto.float_val[0] for event in written], [x["loss"] for x in lines])


def test_training_changes_every_parameter_that_it_can(finished, tmp_path):
    config = tiny.stage1()
    job = setup.build(config)
    before, _ = job.task.init(jax.random.key(config.seed))
    after = parameters(finished)
    for path, value in jax.tree_util.tree_leaves_with_path(before):
        name = optim.path_of(path)
        assert not np.array_equal(after[name], value), f"{name} did not change"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_stopped_anywhere_and_started_again_it_ends_the_same(finished, tmp_path, monkeypatch, steps):
    real, made = jax.device_get, []

    def fails(x):
        made.append(1)
        if len(made) > steps:
            raise KeyboardInterrupt
        return real(x)

    monkeypatch.setattr(loop.jax, "device_get", fails)
    with pytest.raises(KeyboardInterrupt):
        loop.run(tiny.stage1(), tmp_path / "run")
    monkeypatch.undo()
    loop.run(tiny.stage1(), tmp_path / "run")
    assert_same(tmp_path / "run", finished)


@pytest.mark.full
def test_killed_and_started_again_it_ends_the_same(finished, tmp_path):
    command = [sys.executable, "-m", "mmkd_jax", "train", "--config", f"{tiny.CONFIGS}/stage1_clip.py:smoke"]
    command += ["--workdir", str(tmp_path / "run"), *tiny.overrides()]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert_same(tmp_path / "run", finished)


def test_a_finished_run_is_not_trained_again(finished, monkeypatch):
    monkeypatch.setattr(loop, "_train", lambda *args: pytest.fail("trained again"))
    assert loop.run(tiny.stage1(), finished) == finished


def test_one_device_and_eight_give_the_same_loss_and_gradient():
    config = tiny.stage1("--config.batch=16")
    job = setup.build(config)
    transform = optim.optimizer(config.optimizer, job.steps, job.task.lr_scale)
    batch = {k: v for k, v in job.batches.batch(0).items() if k in job.fields}
    reports = {}
    for count in (1, 8):
        mesh = sharding.make_mesh({"data": -1}, jax.devices()[:count])
        init = lambda: states.init_state(job.task, transform, 0)  # noqa: E731
        placement = sharding.shardings(jax.eval_shape(init), ((".*", ()),), mesh)
        state = jax.jit(init, out_shardings=placement)()
        step = jax.jit(states.make_step(job.task, transform, 0))
        _, reports[count] = step(state, sharding.global_batch(batch, mesh))
    assert len(reports[8]["loss"].sharding.device_set) == 8
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(reports[1][name], reports[8][name], rtol=2e-5)
    other = {k: v for k, v in job.batches.batch(1).items() if k in job.fields}
    _, wrong = step(state, sharding.global_batch(other, mesh))
    assert abs(wrong["loss"] / reports[8]["loss"] - 1) > 2e-4  # the check would see another batch


def test_two_processes_train_as_one(finished, tmp_path):
    command = ["-m", "mmkd_jax", "train", "--config", f"{tiny.CONFIGS}/stage1_clip.py:smoke"]
    command += ["--workdir", str(tmp_path / "run"), *tiny.overrides()]
    try:
        processes.succeed(processes.together(command, 2, 4), timeout=240)
    finally:
        processes.kill_all()
    mine, theirs = tiny.losses(tmp_path / "run"), tiny.losses(finished)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose([a[k] for k in sorted(b)], [b[k] for k in sorted(b)], rtol=1e-4)


def test_not_a_number_stops_the_run_before_it_is_saved(tmp_path):
    config = tiny.stage1("--config.optimizer.lr=1e38", "--config.optimizer.warmup=0", "--config.optimizer.clip=0.0")
    with pytest.raises(InputError, match=r"at step \d.*lower the learning rate"):
        loop.run(config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert all(np.isfinite(line["loss"]) for line in tiny.losses(tmp_path / "run"))
    assert not folder.exists() or not [child for child in folder.iterdir() if child.name.isdigit()]


def test_another_config_or_another_set_is_refused_in_a_runs_folder(finished, tmp_path):
    with pytest.raises(InputError, match=r"another config.optimizer.lr \(0.001, now 0.01\)"):
        loop.run(tiny.stage1("--config.optimizer.lr=0.01"), finished)
    rows = tiny.stage1("--config.data.rows=test")
    with pytest.raises(InputError, match=r"holds a run with another config\.data\.rows"):
        loop.run(rows, finished)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--config.data.pairs=", "no pairs set is given"),
        ("--config.data.pairs=/nowhere", "holds no finished set of pairs"),
        ("--config.data.rows=trian", "did you mean 'train'"),
        ("--config.tokenizer=", "no vocabulary is given"),
        ("--config.tokenizer=/nowhere/vocab.txt", "does not exist; it should be a vocabulary"),
        ("--config.model.text.vocab_size=61", "has 60 tokens, the model 61"),
        ("--config.mesh.data=3", "does not fit 8 devices"),
        ("--config.batch=12", "not a multiple of the 8"),
        ("--config.task=clp", "did you mean 'clip'"),
        ("--config.dtype=float16", "dtype 'float16'"),
        ("--config.init=/nowhere", "holds no checkpoint"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_checkpoint(tmp_path, override, says):
    with pytest.raises(InputError, match=says) as caught:
        loop.run(tiny.stage1(override), tmp_path / "run")
    assert "\n" not in str(caught.value)
    folder = tmp_path / "run" / "checkpoints"
    assert not folder.exists() or not os.listdir(folder)


def test_damaged_data_end_a_run_with_one_line_and_code_2(tmp_path, capsys):
    import shutil

    from mmkd_jax import cli

    def train(name):
        command = ["train", "--config", f"{tiny.CONFIGS}/stage1_clip.py:smoke", "--workdir", str(tmp_path / "run")]
        code = cli.main([*command, *tiny.overrides(f"--config.data.pairs={tmp_path / name}")])
        return code, capsys.readouterr().err.strip().splitlines()[-1]

    for name in ("flipped", "cut", "manifest"):
        shutil.copytree(tiny.world() / "pairs", tmp_path / name)
    for shard in (tmp_path / "flipped").glob("*.tfrecord-*[0-9]"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    shard = next((tmp_path / "cut").glob("*.tfrecord-*[0-9]"))
    shard.write_bytes(shard.read_bytes()[:-5])
    manifest = tmp_path / "manifest" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"rows": 40', '"rows": 41'))
    for name, says in (("flipped", "record"), ("cut", "the manifest says"), ("manifest", "41 rows")):
        code, line = train(name)
        assert (code, line.startswith("mmkd train: "), says in line) == (2, True, True), line
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_half_precision_with_rematerialisation_trains_like_float32(finished, tmp_path):
    config = tiny.stage1("--config.dtype=bfloat16", "--config.remat=full")
    half, whole = tiny.losses(loop.run(config, tmp_path / "run")), tiny.losses(finished)
    np.testing.assert_allclose([x["loss"] for x in half], [x["loss"] for x in whole], rtol=0.02)
    assert half != whole
    assert all(value.dtype == np.float32 for value in parameters(tmp_path / "run").values())


def test_a_misspelt_field_and_an_unwritable_folder_leave_with_code_2(tmp_path, capsys):
    from mmkd_jax import cli

    command = ["train", "--config", f"{tiny.CONFIGS}/stage1_clip.py:smoke", *tiny.overrides()]
    assert cli.main([*command, "--workdir", str(tmp_path / "run"), "--config.optimizer.lrr=1"]) == 2
    (tmp_path / "file").write_text("")
    assert cli.main([*command, "--workdir", str(tmp_path / "file" / "run")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "lr" in lines[0]
    assert "choose a writable folder" in lines[1]
    assert len(lines) == 2
    assert os.listdir(tmp_path) == ["file"]


def test_a_checkpoint_is_all_that_it_takes(finished, tmp_path):
    moved = tmp_path / "elsewhere"
    folder = checkpoint.find(finished)
    import shutil

    shutil.copytree(folder, moved)
    student, again = mmkd_jax.load(finished), mmkd_jax.load(moved)
    picture = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    image, text = again.encode_image(picture), again.encode_text(["row 1, caption 0", "nothing of the kind"])
    np.testing.assert_array_equal(image, student.encode_image(picture))
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, rtol=1e-6)
    alone = np.concatenate([again.encode_image(picture[i : i + 1]) for i in range(3)])
    np.testing.assert_array_equal(alone, image)  # whatever else is in the batch
    odds = again.zero_shot(picture, ["a", "b", "c"])
    np.testing.assert_allclose(odds.sum(axis=1), 1, rtol=1e-6)
    with pytest.raises(InputError, match="holds no checkpoint"):
        mmkd_jax.load(tmp_path / "nothing")
