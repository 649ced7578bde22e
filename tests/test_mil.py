"""Gated attention over bags: torch on the same weights, exact whatever the chunks, bounded memory; hazards."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmkd_jax.errors import InputError
from mmkd_jax.evals import survival_hazards
from mmkd_jax.models import mil

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTH, HIDDEN, GATES, OUTPUTS = 12, 16, 8, 4


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(lambda: mil.init(jax.random.key(0), WIDTH, OUTPUTS, HIDDEN, GATES))
    return like(shapes, np.random.default_rng(0))


def like(tree, rng):
    """Normal numbers in the shapes of a tree."""
    return jax.tree.map(lambda v: (0.4 * rng.normal(size=v.shape)).astype(np.float32), tree)


def bags(sizes=(7, 30, 1, 64), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bags padded with large numbers, which must not show."""
    mask = np.arange(max(sizes)) < np.array(sizes)[:, None]
    x = np.random.default_rng(seed).normal(size=(*mask.shape, WIDTH)).astype(np.float32)
    return np.where(mask[..., None], x, 1e4).astype(np.float32), mask


def pieces(x: np.ndarray, size: int) -> list[np.ndarray]:
    return [x[k : k + size] for k in range(0, len(x), size)]


def test_equals_torch_on_the_same_weights(params):
    """Outputs, attention and the gradient of every weight."""
    torch = pytest.importorskip("torch")
    x, mask = bags()
    layers = {name: torch.nn.Linear(*one["kernel"].shape) for name, one in params.items()}
    for name, layer in layers.items():
        layer.weight.data = torch.tensor(np.array(params[name]["kernel"]).T.copy())
        layer.bias.data = torch.tensor(np.array(params[name]["bias"]))
    out, weights = mil.apply(params, x, mask)
    target = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
    gradient = jax.grad(lambda p: (mil.apply(p, x, mask)[0] * target).sum())(params)
    expected = []
    for one, there, row in zip(x, mask, weights):
        h = torch.relu(layers["embed"](torch.tensor(one[there])))
        score = layers["score"](torch.tanh(layers["tanh"](h)) * torch.sigmoid(layers["sigmoid"](h)))
        attention = torch.softmax(score[:, 0], 0)
        np.testing.assert_allclose(row[: there.sum()], attention.detach().numpy(), atol=1e-6)
        assert not np.asarray(row[there.sum() :]).any()
        expected.append(layers["head"](attention @ h))
    expected = torch.stack(expected)
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-5)
    (expected * torch.tensor(target)).sum().backward()
    for name, layer in layers.items():
        np.testing.assert_allclose(gradient[name]["kernel"], layer.weight.grad.numpy().T, atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(gradient[name]["bias"], layer.bias.grad.numpy(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 64, 1000])
def test_the_size_of_chunks_does_not_matter(params, chunk):
    x, mask = bags()
    loss = lambda p, size: jnp.square(mil.apply(p, x, mask, chunk=size)[0]).sum()  # noqa: E731
    whole, parts = (mil.apply(params, x, mask, chunk=size) for size in (64, chunk))
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(parts[1], whole[1], atol=1e-6)
    for a, b in zip(*(jax.tree.leaves(jax.grad(loss)(params, size)) for size in (64, chunk))):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_scores_of_any_size(params):
    """Softmax over chunks neither overflows nor loses what a later chunk outweighs."""
    large = params | {"score": jax.tree.map(lambda v: 300 * v, params["score"])}
    x, mask = bags()
    for chunk in (3, 64):
        out, weights = mil.apply(large, x, mask, chunk=chunk)
        assert np.isfinite(out).all()
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert np.isfinite(mil.apply(params, x, np.zeros_like(mask))[0]).all()  # a bag without patches is no NaN


@pytest.mark.parametrize("size", [4, 64])
def test_streamed_from_the_host(params, size):
    """Outputs, attention and gradients of a bag in pieces, of which the last is short, equal those of the whole."""
    x = bags((30,))[0][0]
    out, weights = mil.pool(params, pieces(x, size), chunk=size)
    whole, attention = mil.apply(params, x[None], np.ones((1, 30), bool))
    np.testing.assert_allclose(out, whole[0], atol=1e-5)
    np.testing.assert_allclose(weights, attention[0], atol=1e-6)
    loss = lambda out: jax.nn.logsumexp(out) - out[2]  # noqa: E731
    value, found = mil.gradient(params, lambda: pieces(x, size), loss, chunk=size)
    expected, wanted = jax.value_and_grad(lambda p: loss(mil.apply(p, x[None], np.ones((1, 30), bool))[0][0]))(params)
    np.testing.assert_allclose(value, expected, atol=1e-5)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_dropout_is_the_same_in_both_passes(params):
    """The gradient of a streamed bag is that of one function: checked by differences along a direction."""
    x, key = bags((30,))[0][0], jax.random.key(3)
    run = lambda p: mil.gradient(p, lambda: pieces(x, 8), lambda out: out[0], chunk=8, key=key, dropout=0.5)  # noqa: E731
    value, found = run(params)
    assert abs(value - run(params)[0]) == 0
    assert abs(value - mil.gradient(params, lambda: pieces(x, 8), lambda out: out[0], chunk=8)[0]) > 1e-3
    way = like(params, np.random.default_rng(9))
    moved = [run(jax.tree.map(lambda v, d: v + s * 2e-3 * d, params, way))[0] for s in (1, -1)]  # noqa: B023
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(way)))
    np.testing.assert_allclose((moved[0] - moved[1]) / 4e-3, slope, rtol=0.02, atol=1e-2)


def test_memory_is_that_of_a_chunk():
    """Temporary memory of a training step, as the compiler plans it, by number of patches."""
    params = mil.init(jax.random.key(0), 64, 2, 128, 64)

    def temporary(patches: int, chunk: int) -> int:
        x, mask = (jax.ShapeDtypeStruct((1, patches, *more), kind) for more, kind in (((64,), jnp.float32), ((), bool)))
        step = jax.jit(jax.grad(lambda p, x, mask: mil.apply(p, x, mask, chunk=chunk)[0].sum()))
        return step.lower(params, x, mask).compile().memory_analysis().temp_size_in_bytes - x.size * 4

    chunked, whole = ([temporary(n, chunk or n) for n in (8192, 16384)] for chunk in (256, 0))
    assert chunked[1] - chunked[0] < 8192 * 64 * 4 * 1.5  # what grows is about the padded copy of the bag itself
    assert whole[1] - whole[0] > 3 * (chunked[1] - chunked[0])


def test_attention_finds_the_patches_that_decide():
    """Bags of 20 to 60 patches, positive by one to three marked ones: learned, and these attended to."""
    rng = np.random.default_rng(0)

    def drawn(n: int):
        sizes = rng.integers(20, 61, n)
        mask = np.arange(60) < sizes[:, None]
        x, label = rng.normal(size=(n, 60, WIDTH)).astype(np.float32), rng.integers(0, 2, n)
        marked = (np.arange(60) < rng.integers(1, 4, n)[:, None]) & (label == 1)[:, None]
        x[marked, 0] += 5
        return x, mask, label, marked

    params = mil.init(jax.random.key(1), WIDTH, 2, HIDDEN, GATES)
    optimiser = optax.adam(1e-2)
    state = optimiser.init(params)

    @jax.jit
    def step(params, state, x, mask, label):
        def loss(p):
            return optax.softmax_cross_entropy_with_integer_labels(mil.apply(p, x, mask)[0], label).mean()

        updates, state = optimiser.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for _ in range(150):
        params, state = step(params, state, *drawn(32)[:3])
    x, mask, label, marked = drawn(200)
    out, weights = mil.apply(params, x, mask)
    assert (np.argmax(out, axis=1) == label).mean() > 0.95
    inside = mask & (label == 1)[:, None]
    ours, others = np.asarray(weights)[inside & marked], np.asarray(weights)[inside & ~marked]
    assert (ours[:, None] > others).mean() > 0.95  # AUC of attention for the marked patches


def plain(logits, k, event, alpha) -> float:
    """The likelihood by its definition, hazard by hazard."""
    hazards = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    past = [np.prod(1 - hazards[: j + 1]) for j in range(len(hazards))]
    if event:
        return -np.log((past[k - 1] if k else 1) * hazards[k])
    return -(1 - alpha) * np.log(past[k])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_hazards(alpha):
    """First and last bin, seen and censored; equals the definition, and stays finite where that is infinite."""
    logits = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32) * 3
    bins, event = (np.array(v) for v in zip(*itertools.product(range(4), (True, False))))
    found = survival_hazards.negative_log_likelihood(logits, bins, event, alpha)
    expected = [plain(*one, alpha) for one in zip(logits, bins, event)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert np.isfinite(survival_hazards.negative_log_likelihood(logits * 100, bins, event, alpha)).all()
    if alpha == 1:
        assert not np.asarray(found)[~event].any()  # all censored: nothing to learn


def test_likelihoods_are_a_distribution():
    """What may be seen, an event in any bin or none, has probability one; risk falls with survival."""
    logits = jnp.array([0.3, -1.2, 0.7, -0.1])
    seen = [survival_hazards.negative_log_likelihood(logits, jnp.array(k), jnp.array(True)) for k in range(4)]
    none = survival_hazards.survival(logits)[-1]
    np.testing.assert_allclose(sum(np.exp(-np.array(seen))) + none, 1, atol=1e-6)
    assert survival_hazards.risk(logits + 1) > survival_hazards.risk(logits)
    np.testing.assert_allclose(survival_hazards.risk(logits), -survival_hazards.survival(logits).sum(), atol=1e-6)


def test_bags_that_cannot_be(params):
    with pytest.raises(InputError, match="no patches"):
        mil.pool(params, [])
    with pytest.raises(InputError, match="larger than the chunk of 4"):
        mil.pool(params, [np.zeros((5, WIDTH))], chunk=4)
