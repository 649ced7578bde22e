"""Gated-attention pooling of bags of features: one output from any number of patches, slices or tiles.

Ilse, Tomczak, Welling: "Attention-based Deep Multiple Instance Learning", ICML 2018. A patch x becomes
h = relu(embed x) with the score w . (tanh(V h) * sigmoid(U h)); the bag is the mean of h weighted by the softmax of
the scores, and the head makes the outputs of it.

The softmax is exact whatever the size of the bag: chunks of patches are added to a running maximum, sum of weights and
weighted sum. A bag that does not fit on the device, or in memory, comes as chunks from the host (`pool`,
`gradient`); then memory is that of one chunk, and all shapes are static.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmkd_jax.errors import InputError

CHUNK = 4096  # patches worked on at a time
Params = dict[str, Any]


class Pool(NamedTuple):
    """What is known of bags after some chunks: highest score `[...]`, sum of weights `[...]`, sum of h `[..., hidden]`.

    Weights are exp(score - highest score).
    """

    top: jax.Array
    weight: jax.Array
    total: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The pooled features `[..., hidden]`; zero for a bag without patches."""
        return self.total / jnp.maximum(self.weight, 1e-30)[..., None]


def init(key: jax.Array, width: int, outputs: int, hidden: int = 256, attention: int = 128) -> Params:
    """Fresh parameters, float32: `embed`, `tanh`, `sigmoid`, `score` and `head`, each `kernel [in, out]` and `bias`.

    Args:
      key: of the run.
      width: of a patch's features.
      outputs: number of classes or of bins of time.
      hidden: width of h.
      attention: width of the two gates.
    """
    shapes = {"embed": (width, hidden), "tanh": (hidden, attention), "sigmoid": (hidden, attention),
              "score": (attention, 1), "head": (hidden, outputs)}  # fmt: skip
    kernel = jax.nn.initializers.lecun_normal()
    return {
        name: {"kernel": kernel(one, shape, jnp.float32), "bias": jnp.zeros(shape[1])}
        for (name, shape), one in zip(shapes.items(), jax.random.split(key, len(shapes)))
    }


def apply(
    params: Params,
    x: jax.Array,
    mask: jax.Array,
    *,
    chunk: int = CHUNK,
    key: jax.Array | None = None,
    dropout: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Outputs of bags and the attention on their patches.

    Activations are kept for one chunk only and computed anew for the gradient.

    Args:
      params: of `init`.
      x: float `[bags, patches, width]`.
      mask: bool `[bags, patches]`, false for padding.
      chunk: patches of a bag worked on at a time.
      key, dropout: of training; shares of h are dropped where a key is given.

    Returns:
      float32 `[bags, outputs]`, and `[bags, patches]` that sums to 1 over a bag's patches.
    """
    bags, patches, width = x.shape
    chunk = min(chunk, patches)
    pieces = -(-patches // chunk)
    room = pieces * chunk - patches
    x = jnp.pad(x, ((0, 0), (0, room), (0, 0))).reshape(bags, pieces, chunk, width).swapaxes(0, 1)
    mask = jnp.pad(mask, ((0, 0), (0, room))).reshape(bags, pieces, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def step(state: Pool, piece):
        number, inside, there = piece
        h, score = _patches(params, inside, _folded(key, number), dropout)
        return _add(state, h, score, there), score

    state, scores = jax.lax.scan(step, _empty(params, (bags,)), (jnp.arange(pieces), x, mask))
    scores = jnp.where(mask, scores, -jnp.inf).swapaxes(0, 1).reshape(bags, -1)[:, :patches]
    weights = jnp.exp(scores - state.top[:, None]) / jnp.maximum(state.weight, 1e-30)[:, None]
    return _linear(params["head"], state.mean), weights


def pool(params: Params, chunks: Iterable[np.ndarray], *, chunk: int = CHUNK) -> tuple[np.ndarray, np.ndarray]:
    """Outputs `[outputs]` and attention `[patches]` of one bag that comes in pieces.

    Args:
      params: of `init`.
      chunks: float `[up to chunk, width]`, one after the other.
      chunk: static size to which pieces are padded.

    Raises:
      InputError: no patches, or a piece is larger than `chunk`.
    """
    state, scores = _pooled(params, chunks, chunk, None, 0.0)
    weights = np.exp(np.concatenate(scores) - np.asarray(state.top)) / np.asarray(state.weight)
    return np.asarray(_linear(params["head"], state.mean)), weights


def gradient(
    params: Params,
    chunks: Callable[[], Iterable[np.ndarray]],
    loss: Callable[[jax.Array], jax.Array],
    *,
    chunk: int = CHUNK,
    key: jax.Array | None = None,
    dropout: float = 0.0,
) -> tuple[jax.Array, Params]:
    """Value of the loss of one bag and its gradient by the parameters, with one chunk in memory at a time.

    The bag is read twice: for its mean, and for the gradient, which is a sum over patches once mean and weights are
    known: a patch of weight a moves the mean by a dh + a (h - mean) dscore.

    Args:
      params: of `init`.
      chunks: gives the bag's pieces anew, float `[up to chunk, width]`.
      loss: of outputs `[outputs]`.
      chunk: static size to which pieces are padded.
      key, dropout: as in `apply`.

    Raises:
      InputError: no patches, or a piece is larger than `chunk`.
    """
    state, _ = _pooled(params, chunks(), chunk, key, dropout)
    value, (head, slope) = jax.value_and_grad(lambda head, mean: loss(_linear(head, mean)), argnums=(0, 1))(
        params["head"], state.mean
    )
    body = {name: one for name, one in params.items() if name != "head"}
    found = jax.tree.map(jnp.zeros_like, body)
    for number, (x, mask) in enumerate(_padded(chunks(), chunk)):
        found = _add_gradient(found, body, x, mask, state, slope, _folded(key, number), dropout)
    return value, found | {"head": head}


@functools.partial(jax.jit, static_argnames="dropout", donate_argnums=0)
def _add_gradient(found: Params, body: Params, x, mask, state: Pool, slope, key, dropout: float) -> Params:
    def surrogate(body: Params) -> jax.Array:
        """Has the gradient of loss(mean) at these parameters."""
        h, score = _patches(body, x, key, dropout)
        weights = jax.lax.stop_gradient(jnp.where(mask, jnp.exp(score - state.top) / state.weight, 0))
        return (weights * (h @ slope + jax.lax.stop_gradient((h - state.mean) @ slope) * score)).sum()

    return jax.tree.map(jnp.add, found, jax.grad(surrogate)(body))


def _pooled(params: Params, chunks, chunk: int, key, dropout: float) -> tuple[Pool, list[np.ndarray]]:
    """State after all pieces, and their scores."""
    state, scores = _empty(params, ()), []
    for number, (x, mask) in enumerate(_padded(chunks, chunk)):
        state, score = _step(params, state, x, mask, _folded(key, number), dropout)
        scores.append(np.asarray(score)[: int(mask.sum())])
    if not scores:
        raise InputError("a bag has no patches; leave it out")
    return state, scores


@functools.partial(jax.jit, static_argnames="dropout")
def _step(params: Params, state: Pool, x, mask, key, dropout: float) -> tuple[Pool, jax.Array]:
    h, score = _patches(params, x, key, dropout)
    return _add(state, h, score, mask), score


def _padded(chunks: Iterable[np.ndarray], size: int):
    for piece in chunks:
        if len(piece) > size:
            raise InputError(f"a piece of {len(piece)} patches is larger than the chunk of {size}; give smaller pieces")
        if len(piece):
            x = np.zeros((size, piece.shape[1]), np.float32)
            x[: len(piece)] = piece
            yield x, np.arange(size) < len(piece)


def _patches(params: Params, x: jax.Array, key, dropout: float) -> tuple[jax.Array, jax.Array]:
    """h `[..., patches, hidden]` and scores `[..., patches]`."""
    h = jax.nn.relu(_linear(params["embed"], x.astype(jnp.float32)))
    if key is not None and dropout:
        h = jnp.where(jax.random.bernoulli(key, 1 - dropout, h.shape), h / (1 - dropout), 0)
    gates = jnp.tanh(_linear(params["tanh"], h)) * jax.nn.sigmoid(_linear(params["sigmoid"], h))
    return h, _linear(params["score"], gates)[..., 0]


def _add(state: Pool, h: jax.Array, score: jax.Array, mask: jax.Array) -> Pool:
    """The state with a chunk's patches in it."""
    # The softmax does not depend on what is subtracted, so that no gradient needs to go through the maximum.
    seen = jax.lax.stop_gradient(jnp.where(mask, score, -jnp.inf).max(axis=-1))
    top = jnp.maximum(state.top, jnp.maximum(seen, _LOWEST))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, score, _LOWEST) - top[..., None]), 0)
    kept = jnp.exp(state.top - top)
    total = state.total * kept[..., None] + (weights[..., None] * h).sum(axis=-2)
    return Pool(top, state.weight * kept + weights.sum(axis=-1), total)


_LOWEST = -1e30  # below any score, and finite, so that differences are


def _empty(params: Params, shape: tuple[int, ...]) -> Pool:
    hidden = params["embed"]["bias"].shape[0]
    return Pool(jnp.full(shape, _LOWEST, jnp.float32), jnp.zeros(shape), jnp.zeros((*shape, hidden)))


def _linear(layer: Params, x: jax.Array) -> jax.Array:
    return jnp.matmul(x, layer["kernel"], precision=jax.lax.Precision.HIGHEST) + layer["bias"]


def _folded(key: jax.Array | None, number) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, number)
