"""Heads on bags are trained by the project's loop: bags of any size from disk, resumption, and what is refused."""

import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from mmkd_jax import io
from mmkd_jax.data.bags import Bags
from mmkd_jax.errors import InputError
from mmkd_jax.evals import survival_hazards, survival_metrics
from mmkd_jax.evals.survival_curves import Outcomes
from mmkd_jax.models import mil
from mmkd_jax.tasks import mil as tasks
from mmkd_jax.train import heads, metrics, optim

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTH = 8
SPEC = tasks.MilSpec("classes", WIDTH, 2, hidden=16, attention=8, dropout=0.1)


def drawn(n: int, seed: int = 0):
    """Bags of 20 to 60 patches, of which one to three are marked where the label is 1; marks `[patches]` by bag."""
    rng = np.random.default_rng(seed)
    label, bags, marks = rng.integers(0, 2, n), [], []
    for one in label:
        x = rng.normal(size=(rng.integers(20, 61), WIDTH)).astype(np.float32)
        marked = np.isin(np.arange(len(x)), rng.choice(len(x), rng.integers(1, 4))) & bool(one)
        x[marked, 0] += 5
        bags.append(x)
        marks.append(marked)
    return bags, label, marks


def stored(folder, bags) -> list:
    """The bags as files, the first of each half apart, so that a bag has two slides."""
    found = []
    for k, x in enumerate(bags):
        cut = len(x) // 2
        for part, rows in enumerate((x[:cut], x[cut:])):
            np.save(folder / f"{k}-{part}.npy", rows.astype(np.float16))
        found.append([folder / f"{k}-{part}.npy" for part in (0, 1)])
    return found


def config(steps: int = 120, **more):
    return heads.config("head", batch=16, steps=steps, lr=1e-2, **more)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, quick_compilation):
    """A trained head, the bags, their labels and marks."""
    root = tmp_path_factory.mktemp("mil")
    x, label, marks = drawn(160)
    bags = Bags(stored(root, x))
    targets = {"label": label.astype(np.int32), "weight": np.ones(160, np.float32)}
    params = tasks.train(bags, np.arange(100), targets, SPEC, config(keep=2, save_every=60), root / "run")
    return params, bags, label, marks, root / "run", targets


def test_the_loop_trains_a_head_that_finds_the_patches(learned):
    params, bags, label, marks, run, _ = learned
    assert len(params) == 2  # checkpoints in the middle and at the end
    outputs, attention = tasks.predict(params[-1], bags, range(100, 160))
    assert (outputs.argmax(1) == label[100:]).mean() > 0.9
    scores = [a[m].min() > np.quantile(a[~m], 0.9) for a, m in zip(attention, marks[100:]) if m.any()]
    assert np.mean(scores) > 0.9
    assert all(abs(one.sum() - 1) < 1e-5 for one in attention)
    losses = [line["loss"] for line in metrics.read(run)]
    assert losses[-1] < 0.5 * losses[0]


def test_statistics_of_features_are_not_trained(learned):
    params, bags, *_ = learned
    mean, variance = bags.spread(range(100))
    np.testing.assert_array_equal(params[-1]["norm"]["mean"], mean)
    np.testing.assert_array_equal(params[-1]["norm"]["variance"], variance)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params[0], params[1])
    assert all(change > 0 for name, layer in moved.items() if name != "norm" for change in layer.values())


@pytest.mark.full
def test_going_on_gives_the_same_bits(learned, tmp_path):
    """A run whose last checkpoint is lost goes on from the one before; other bags in its folder are refused."""
    _, bags, _, _, _, targets = learned
    ask = (targets, SPEC, config(6, save_every=3, keep=3), tmp_path / "run")
    whole = tasks.train(bags, np.arange(40), *ask)
    newest = io.as_path(tmp_path / "run" / "checkpoints" / "6")
    assert newest.is_dir()
    newest.rmtree()
    again = tasks.train(bags, np.arange(40), *ask)
    assert jax.tree.structure(whole) == jax.tree.structure(again)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(again)):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(InputError, match="holds a run with another data"):
        tasks.train(bags, np.arange(1, 41), *ask)


def test_scaling_is_part_of_the_first_layer(learned):
    """Outputs and attention are those of scaled features; a feature that never varied counts nothing."""
    params, bags, *_ = learned
    norm, bare = params[-1]["norm"], {name: one for name, one in params[-1].items() if name != "norm"}
    x = np.concatenate(list(bags.chunks(3))).astype(np.float32)
    direct = mil.apply(bare, ((x - norm["mean"]) / np.sqrt(norm["variance"]))[None], np.ones((1, len(x)), bool))
    outputs, attention = tasks.predict(params[-1], bags, [3])
    np.testing.assert_allclose(outputs, direct[0], atol=1e-4)
    np.testing.assert_allclose(attention[0], direct[1][0], atol=1e-5)
    still = params[-1] | {"norm": norm | {"variance": np.asarray(norm["variance"]) * (np.arange(WIDTH) != 2)}}
    moved = x + 100 * np.eye(1, WIDTH, 2, dtype=np.float32)
    same = [tasks.predict(still, Bags([[one]]), [0])[0] for one in (x, moved)]
    np.testing.assert_array_equal(*same)


def test_a_batch_is_the_bags_and_fits_few_shapes(learned):
    _, bags, label, _, _, targets = learned
    batches = tasks.BagBatches(bags, np.arange(50), targets, batch=16, seed=3)
    one = batches.batch(2)
    assert one["bag"].shape == (16, 64, WIDTH)
    assert one["bag"].dtype == np.float16  # half of what float32 takes, on its way to the device as well
    for row, bag, size, told in zip(one["row"], one["bag"], one["size"], one["label"]):
        assert size == bags.sizes[row]
        assert told == label[row]
        np.testing.assert_array_equal(bag[:size], np.concatenate(list(bags.chunks(int(row), 7))))
        assert not bag[size:].any()
    seen = np.concatenate([batches.batch(step)["row"] for step in range(25)])
    assert np.bincount(seen, minlength=50).tolist() == [8] * 50  # 400 places, each bag once an epoch
    halves = [tasks.BagBatches(bags, np.arange(50), targets, batch=16, seed=3, process=(k, 2)).batch(2) for k in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([half["row"] for half in halves]), one["row"])
    sizes = sorted({tasks.filled_size(n) for n in range(1, 100_001)})
    assert len(sizes) < 25
    assert all(n <= tasks.filled_size(n) <= max(64, 1.5 * n) for n in range(1, 3000))


@pytest.mark.full
def test_hazards_are_learned():
    """Risk depends on the bags' first feature; permuted outcomes give chance."""
    rng = np.random.default_rng(0)
    effect = rng.normal(size=220)
    bags = Bags([[(rng.normal(size=(12, WIDTH)) + e * np.eye(1, WIDTH)).astype(np.float32)] for e in effect])
    time, end = rng.exponential(np.exp(-2 * effect)), rng.exponential(3, 220)
    outcomes = Outcomes(time <= end, np.minimum(time, end) + 1e-3)
    order = rng.permutation(220)
    for known, low, high in ((outcomes, 0.75, 1.0), (outcomes[order], 0.3, 0.65)):
        edges = np.quantile(known.time[:140][known.event[:140]], (0.25, 0.5, 0.75))
        targets = {"bin": np.searchsorted(edges, known.time, side="right").astype(np.int32), "event": known.event}
        spec = tasks.MilSpec("hazards", WIDTH, 4, hidden=16, attention=8, dropout=0.0)
        task = tasks.MilTask(spec, *bags.spread(range(140)))
        batches = tasks.BagBatches(bags, np.arange(140), targets, batch=70, seed=0)
        params = fitted(task, batches, 60)
        risk = np.asarray(survival_hazards.risk(tasks.predict(params, bags, range(140, 220))[0]))
        assert low < survival_metrics.concordance(known[140:], risk) < high


def fitted(task, batches, steps: int):
    """Adam by hand, as fast as it goes: the loop itself is tested above."""
    params, _ = task.init(jax.random.key(0))
    rule = optax.chain(optax.adam(1e-2), optim.scale_by_path(task.lr_scale))
    state = rule.init(params)

    @jax.jit
    def step(params, state, batch):
        def loss(p):
            return task.objective(p, task.encode(p, {}, batch, None, 0), batch, 0)[0]

        updates, state = rule.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for number in range(steps):
        params, state = step(params, state, batches.batch(number))
    return params


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 4), np.float32), "has no patches"),
        (np.zeros((3, 4), np.float64), "not float16 or float32"),
        (np.zeros(3, np.float32), r"has shape \(3,\)"),
        (np.full((3, 4), np.nan, np.float32), "are not finite"),
        (np.asfortranarray(np.zeros((3, 4), np.float32)), "stored by columns"),
    ],
)
def test_files_that_are_no_bags(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=message):
        Bags([[tmp_path / "x.npy"]]).mean(0)


def test_damaged_and_missing_files(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((30, 4), np.float32))
    np.save(tmp_path / "y.npy", np.ones((30, 5), np.float32))
    with pytest.raises(InputError, match="come from different encoders"):
        Bags([[tmp_path / "x.npy"], [tmp_path / "y.npy"]])
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-16])
    with pytest.raises(InputError, match="cut short"):
        Bags([[tmp_path / "x.npy"]]).mean(0)
    (tmp_path / "x.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match=r"no .npy file"):
        Bags([[tmp_path / "x.npy"]])
    with pytest.raises(InputError, match="there is no file of features"):
        Bags([[tmp_path / "z.npy"]])
    with pytest.raises(InputError, match="a bag has no slides"):
        Bags([[]])


MEMORY = """
import resource, sys
import numpy as np
from mmkd_jax.data.bags import Bags
from mmkd_jax.tasks import mil
from mmkd_jax.train import heads

folder, count, patches, width, steps = sys.argv[1], *map(int, sys.argv[2:])
bags = Bags([[f"{folder}/{k}.npy"] for k in range(count)])
targets = {"bin": np.arange(count, dtype=np.int32) % 4, "event": np.arange(count) % 2 == 0}
spec = mil.MilSpec("hazards", width, 4, 64, 32)
config = heads.config("large", batch=1, steps=steps, lr=1e-3)
config.data.threads = 1
mil.train(bags, np.arange(count), targets, spec, config, f"{folder}/run")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, int(bags.sizes.sum()) * width * 2 >> 20)
"""


def peak(tmp_path, count: int, patches: int, width: int, steps: int) -> tuple[int, int]:
    """MiB that training held at most, and MiB of all bags on disk."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(patches, width)).astype(np.float16)
    for k in range(count):
        np.save(tmp_path / f"{k}.npy", np.roll(x, k, axis=0))
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MEMORY, *map(str, (tmp_path, count, patches, width, steps))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()[-2:]))


@pytest.mark.full
def test_a_bag_of_a_hundred_thousand_patches_trains_in_bounded_memory(tmp_path):
    """98 MiB on disk each; a few are filled up and read ahead, beside what JAX itself takes. 1074 MiB were measured."""
    held, stored = peak(tmp_path, 3, 100_000, 512, 3)
    assert stored > 290
    assert held < 1500


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_a_thousand_patients_of_ten_thousand_patches_stream_from_disk(tmp_path):
    """All patches of all patients are trained on; memory is that of a few bags."""
    held, stored = peak(tmp_path, 1000, 10_000, 128, 1000)
    assert stored > 2400
    assert held < 1200
