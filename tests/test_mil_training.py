"""Heads on bags are trained by the project's loop: bags of any size from disk, resumption, and what is refused."""

import jax
import numpy as np
import pytest

from mmkd_jax.data.bags import Bags
from mmkd_jax.tasks import mil as tasks
from mmkd_jax.train import heads, metrics

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
