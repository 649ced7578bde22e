"""A run saved on one number of processes and devices goes on on any other; several go back and evaluate as one."""

import os
import pathlib
import shutil

import data_fixtures as toy
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import train_fixtures as tiny
from jax.sharding import Mesh
from test_stability import BACK
from test_start import CHANGE, LOSS, SMALL, apart
from test_train import assert_same

from mmkd_jax import api, io
from mmkd_jax.data.batches import Batches
from mmkd_jax.errors import InputError
from mmkd_jax.evals import results
from mmkd_jax.train import checkpoint_tools, loop, rollback

pytestmark = pytest.mark.usefixtures("quick_compilation")
CHANGES = (
    *SMALL,
    *("--config.batch=8", "--config.optimizer.warmup=0", "--config.unsharded=1.0"),
    *("--config.steps=6", "--config.save_every=2", "--config.keep=2", "--config.save_minutes=1e-5"),
    "--config.best=min:loss",
)
PROGRAM = """
import os, sys
import disturbed
from mmkd_jax import cli
from mmkd_jax.data.batches import Batches
from mmkd_jax.evals.features import Features

if poison := os.environ.get("POISON"):
    bad, left_out = ([int(number) for number in part.split(",") if number] for part in poison.split("/"))
    disturbed.Disturbed.how = "poisoned"
    Batches.batch = disturbed.poisoning(Batches.batch, bad, left_out)
encoded = Features._encoded
Features._encoded = lambda self, keys, *rest: print("encodes", len(keys), file=sys.stderr) or encoded(self, keys, *rest)
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module", autouse=True)
def nothing_stays():
    yield
    processes.kill_all()


def launch(verb, *words, count, devices, **environ):
    environ = {
        "PYTHONPATH": os.fspath(pathlib.Path(__file__).parent),
        "JAX_COMPILATION_CACHE_DIR": str(tiny.world() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **environ,
    }
    return processes.together(["-c", PROGRAM, verb, *map(str, words)], count, devices, **environ)


def train(workdir, *changes, count, devices, mesh=(-1, 1), **environ):
    """Trains to the end; what each process said."""
    sizes = (f"--config.mesh.data={mesh[0]}", f"--config.mesh.fsdp={mesh[1]}")
    words = [
        "--config",
        f"{tiny.CONFIGS}/stage1_clip.py:smoke",
        "--workdir",
        workdir,
        *tiny.overrides(*changes, *sizes),
    ]
    return processes.succeed(launch("train", *words, count=count, devices=devices, **environ))


def steps_saved(run):
    return sorted(int(path.parent.name) for path in run.glob("checkpoints/*/commit_success.txt"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run on a (4, 2) mesh over two processes; and a copy of it that ends after step 4."""
    root = tmp_path_factory.mktemp("saved")
    train(root / "whole", *CHANGES, count=2, devices=4, mesh=(4, 2))
    shutil.copytree(root / "whole", root / "half")
    for step in steps_saved(root / "half"):
        if step > 4:
            shutil.rmtree(root / "half" / "checkpoints" / str(step))
    return root


def went_on(run, whole, start):
    """How far losses (relative) and parameters (of their change) of a run are from those of the whole one."""
    mine, theirs = ([line["loss"] for line in tiny.losses(one) if line["step"] > 4] for one in (run, whole))
    assert len(mine) == len(theirs) == 2
    params = [checkpoint_tools.parameters(one) for one in (whole, run, start)]
    return np.abs(np.array(mine) / theirs - 1).max(), apart(*params)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_several_processes_keep_what_should_stay(saved):
    """A temporary one after each step, two regular ones, the best."""
    losses = {line["step"]: line["loss"] for line in tiny.losses(saved / "whole")}
    assert steps_saved(saved / "whole") == sorted({4, 6, min(losses, key=losses.get)})
    assert (saved / "whole" / "sharding.txt").read_text().startswith("mesh: data 4, fsdp 2, tensor 1\n")
    assert steps_saved(saved / "half")[-1] == 4


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("count", "devices", "mesh"), [(1, 8, (8, 1)), (1, 2, (2, 1)), (1, 1, (1, 1)), (4, 2, (2, 4)), (2, 4, (4, 2))]
)
def test_saved_by_two_processes_it_goes_on_anywhere(saved, tmp_path, count, devices, mesh):
    """The tolerance is that of `test_start`: sums in another order. On the same processes and mesh there is none."""
    shutil.copytree(saved / "half", tmp_path / "run")
    said = train(tmp_path / "run", *CHANGES, count=count, devices=devices, mesh=mesh)
    assert all("saving step 5" in text and "saving step 4" not in text for text in said)
    loss, change = went_on(tmp_path / "run", saved / "whole", saved / "half")
    assert loss < (LOSS if count != 2 else 1e-30)
    assert change < (CHANGE if count != 2 else 1e-30)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lost", ["batch", "optimiser"])
def test_a_wrong_batch_or_a_lost_optimiser_state_would_be_seen(saved, tmp_path, monkeypatch, lost):
    shutil.copytree(saved / "half", tmp_path / "run")
    if lost == "batch":
        real = Batches.batch
        monkeypatch.setattr(Batches, "batch", lambda this, number: real(this, 9 - number))  # 5 and 4
    else:
        first = loop.first_state
        monkeypatch.setattr(loop, "first_state", lambda *args: without_optimiser(first(*args)))
    loop.run(tiny.stage1(*CHANGES), tmp_path / "run")
    loss, change = went_on(tmp_path / "run", saved / "whole", saved / "half")
    assert loss > 10 * LOSS
    assert change > 10 * CHANGE


def without_optimiser(state):
    return state.replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_two_processes_go_back_together(tmp_path):
    changes = ("--config.task=disturbed.disturbed", *SMALL, *BACK)
    train(tmp_path / "run", *changes, count=2, devices=1, POISON="6,10/")
    train(tmp_path / "told", *changes, count=2, devices=1, POISON="/6,9,10")
    events = rollback.read(io.as_path(tmp_path / "run"))
    assert [(one["step"], one["to"], one["left_out"]) for one in events] == [(7, 6, 1), (10, 8, 2)]
    assert steps_saved(tmp_path / "run") == [2, 4, 6, 8, 10]
    assert_same(tmp_path / "run", tmp_path / "told")


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_two_processes_evaluate_as_one(tmp_path):
    """Each encodes half of the pictures; the numbers are those of one process."""
    scored = tmp_path / "scored"
    toy.make_pairs(scored, rows={"toy.test": [row for row in range(40) if row % 5], "other.val": [0, 5, 10]})
    run = tiny.untrained(tiny.stage1(*SMALL), tmp_path / "run")
    rows, said = {}, {}
    for count in (1, 2):
        out = tmp_path / f"out{count}"
        words = ("--checkpoint", f"student={run}", "--pairs", scored, "--out", out, "--bootstrap", 50)
        said[count] = processes.succeed(launch("eval", *words, count=count, devices=1))
        rows[count] = results.load(out / "results.json")
    assert rows[1] == rows[2]
    assert len(rows[1]) > 4
    names = [path.relative_to(tmp_path / "out1") for path in (tmp_path / "out1").rglob("*.npz")]
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()
    encoded = [
        [int(line.split()[1]) for line in text.splitlines() if "encodes" in line] for text in (*said[1], *said[2])
    ]
    assert encoded[1] == encoded[2] == [(number + 1) // 2 for number in encoded[0]]


# On several devices of one process.


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.untrained(tiny.stage1(*SMALL), tmp_path_factory.mktemp("student") / "run")


def test_eight_devices_encode_as_one(student, monkeypatch):
    pictures = np.random.default_rng(0).integers(0, 256, (21, 32, 32, 3), dtype=np.uint8)
    texts = [f"row {row}, caption 0" for row in range(21)]
    one = api.load(student, batch=12)
    assert api.local_mesh().size == 1
    expected = one.encode_image(pictures), one.encode_text(texts)
    monkeypatch.setattr(api, "local_mesh", lambda: Mesh(np.asarray(jax.local_devices()), ("sample",)))
    many = api.load(student, batch=12)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(many.params))
    for mine, theirs in zip((many.encode_image(pictures), many.encode_text(texts)), expected):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6)  # float32 rounding of unit vectors
        assert np.abs(mine - np.roll(theirs, 1, axis=0)).max() > 1e-4  # another sample's would be seen
    alone = np.concatenate([many.encode_image(pictures[row : row + 1]) for row in (0, 11, 20)])
    np.testing.assert_array_equal(alone, many.encode_image(pictures)[[0, 11, 20]])  # whatever else is in the batch


def test_batches_are_divided_evenly_and_filled_up(monkeypatch):
    monkeypatch.setattr(api, "local_mesh", lambda: Mesh(np.asarray(jax.local_devices()), ("sample",)))
    seen = []

    def encode(x):
        seen.append((x.shape, len(x.sharding.device_set), {shard.data.shape for shard in x.addressable_shards}))
        return x * 2

    inputs = np.arange(40, dtype=np.float32).reshape(20, 2)
    np.testing.assert_array_equal(api.in_batches(encode, inputs, 12), inputs * 2)
    assert seen == [((16, 2), 8, {(2, 2)})] * 2
    weights = api.everywhere({"w": np.ones(3, np.float32)})["w"]
    assert {shard.data.shape for shard in weights.addressable_shards} == {(3,)}
    with pytest.raises(InputError, match="nothing to encode"):
        api.in_batches(encode, inputs[:0], 12)
