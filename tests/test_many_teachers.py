"""Many toy teachers and a student with a real encoder: what it has learned, on pictures and captions held out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmkd_jax.batch import TextBatch
from mmkd_jax.models import heads
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower
from mmkd_jax.tasks import distill, targets
from mmkd_jax.train import state as states

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]
FACTORS, LEVELS, SIZE = 6, 24, 16
WIDTHS = {"alpha": 24, "beta": 32, "gamma": 40, "delta": 48, "epsilon": 56}  # five teachers
TRAIN, HELD_OUT, BATCH, STEPS, EMBED = 8192, 2000, 128, 2500, 64
TOWERS = ("image", "text")


@functools.cache
def world():
    """Hidden factors float32 `[n, FACTORS]` and how they look: uint8 pictures, and captions of a word a factor."""
    rng = np.random.default_rng(0)
    hidden = rng.integers(0, LEVELS, (TRAIN + HELD_OUT, FACTORS))
    factors = (2 * hidden / (LEVELS - 1) - 1).astype(np.float32)
    patterns = rng.normal(size=(FACTORS, SIZE, SIZE, 3))
    pictures = np.clip(127 + 30 * np.einsum("nf,fhwc->nhwc", factors, patterns), 0, 255).astype(np.uint8)
    words = 2 + hidden + LEVELS * np.arange(FACTORS)
    ids = np.concatenate([np.ones((len(words), 1), int), words], axis=1).astype(np.int32)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return factors, pictures, TextBatch(ids, np.ones_like(ids), positions, np.zeros_like(ids))


@functools.cache
def stored() -> dict[str, dict[str, np.ndarray]]:
    """What each teacher says: unit features of its own random view of the factors, the text's a little apart."""
    factors = world()[0]
    found = {}
    for seed, (name, width) in enumerate(WIDTHS.items()):
        rng = np.random.default_rng(100 + seed)
        seen = factors * rng.uniform(0.2, 1.5, FACTORS)  # teachers do not care for the same
        matrix, lean = rng.normal(size=(FACTORS, width)), 0.7 * rng.normal(size=width)
        features = np.tanh(0.6 * seen @ matrix + lean)
        apart = np.tanh(0.6 * seen @ matrix + lean + 0.15 * rng.normal(size=width))
        found[name] = {t: unit(x) for t, x in zip(TOWERS, (features, apart), strict=True)}
    return found


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def make_task(recipe) -> distill.DistillTask:
    spec = ModelSpec(
        image=ImageTower(width=64, layers=2, heads=2, patch=8, image_size=SIZE, mlp_width=128),
        text=TextTower(
            width=64, layers=2, heads=2, mlp_width=128, vocab_size=2 + FACTORS * LEVELS, positions=8,
            context=FACTORS + 1, dropout=0.0,
        ),
        embed=EMBED,
        preprocess=Preprocess(size=SIZE),
    )  # fmt: skip
    teachers = [
        targets.TeacherTarget(name, width, "native", 20.0, *(stored()[name][t][:TRAIN].mean(axis=0) for t in TOWERS))
        for name, width in WIDTHS.items()
    ]
    return distill.DistillTask(spec, teachers, recipe, np.ones((1, len(WIDTHS)), np.float32), seed=0)


def batch_of(rows):
    _, pictures, texts = world()
    told = {
        name: {t: of[t][rows] for t in TOWERS} | {"present": np.ones(len(rows), bool)} for name, of in stored().items()
    }
    zeros = np.zeros(len(rows), np.int32)
    return {"image": pictures[rows], "text": TextBatch(*(x[rows] for x in texts)), "modality": zeros, "targets": told}


@functools.cache
def held_out(recipe):
    """Parameters after training, and the student's features of the held-out rows, float32 `[2000, EMBED]` by tower."""
    task = make_task(recipe)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, STEPS)))
    state = jax.jit(lambda: states.init_state(task, transform, 0))()
    step = jax.jit(states.make_step(task, transform, 0), donate_argnums=0)
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        state, _ = step(state, batch_of(rng.choice(TRAIN, BATCH, replace=False)))
    rows = np.arange(TRAIN, TRAIN + HELD_OUT)
    features = jax.jit(lambda params, batch: task.encode(params, {}, batch, jax.random.key(0), jnp.int32(0)))(
        state.params, batch_of(rows)
    )
    return state.params, {t: np.asarray(getattr(features, t)) for t in TOWERS}


def similarities(x) -> np.ndarray:
    """Cosines of all pairs of different rows."""
    x = unit(np.asarray(x))
    return (x @ x.T)[np.triu_indices(len(x), 1)]


def correlation(a, b) -> float:
    return float(np.corrcoef(a, b)[0, 1])


@pytest.mark.parametrize("tower", TOWERS)
def test_mean_reaches_what_its_targets_know_of_all_teachers(tower):
    """Correlation with the mean of the teachers' similarity matrices: that of the mean targets less 0.02 at most."""
    rows = slice(TRAIN, None)
    of_teachers = np.mean([similarities(of[tower][rows]) for of in stored().values()], axis=0)
    goal = sum(of[tower][rows] @ np.asarray(targets.seeded_map(n, WIDTHS[n], EMBED)) for n, of in stored().items())
    best = correlation(similarities(goal), of_teachers)
    student = held_out(distill.Recipe(target="mean", task_weight=0.0, icl_weight=0.0))[1][tower]
    assert correlation(similarities(student), of_teachers) > best - 0.02
    untrained = make_task(distill.Recipe(target="mean"))
    params = untrained.init(jax.random.key(0))[0]
    features = untrained.encode(
        params, {}, batch_of(np.arange(TRAIN, TRAIN + HELD_OUT)), jax.random.key(0), jnp.int32(0)
    )
    assert correlation(similarities(getattr(features, tower)), of_teachers) < best - 0.2  # what no training gives


@pytest.mark.parametrize("name", WIDTHS)
def test_each_head_has_the_geometry_of_its_teacher(name):
    """Correlation of the held-out similarity matrices above 0.95, and with its own teacher above any other's."""
    recipe = distill.Recipe(target="heads", task_weight=0.0, feature_weight=1.0, icl_weight=0.0)
    params, features = held_out(recipe)
    for tower in TOWERS:
        said = similarities(heads.apply(params["heads"][name][tower], jnp.asarray(features[tower])))
        found = {other: correlation(said, similarities(of[tower][TRAIN:])) for other, of in stored().items()}
        assert found[name] > 0.95
        assert max(found, key=found.get) == name
