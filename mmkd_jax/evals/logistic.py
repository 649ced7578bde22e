"""Multinomial logistic regression to float64's limits: L-BFGS with a dense preconditioner, warm-started along C.

The objective is scikit-learn's: 0.5 |W|^2 + C * sum of losses, intercept free; of two classes the penalty is on the one
difference of their weights, as there. It is minimised as a mean: losses / n + |W|^2 / (2 C n).

L-BFGS starts each product from the inverse of one matrix for all classes: the features' Gram matrix, each row weighted
by how undecided it is, plus the penalty. It is exact for two classes; for more, correlated features and rows that are
decided, which at large C cost thousands of iterations without it, cost tens. It is computed anew every `RENEW`
iterations. A line search moves along a direction whose logits are known, so that an iteration has two products with the
features, whatever it tries (Nocedal and Wright, Numerical Optimization, 2006, 7.2 and 3.5). Rows no more than features
are first rotated onto their principal axes, as many as rows, which leaves the penalty as it is.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

HISTORY, RENEW = 24, 25  # pairs that L-BFGS remembers; iterations between preconditioners
TOLERANCE = 1e-9  # of the gradient's norm, and of the gap to the optimum relative to the objective
MOST = 2000  # iterations for one C
_TRIALS, _FLAT = 25, 0.2  # a line search ends where the slope is this part of the first one


@dataclasses.dataclass(frozen=True)
class Model:
    """A fitted classifier of raw features.

    Attributes:
      classes: the class indices that have training rows, int64 `[k]`, ascending.
      weights: float64 `[width, k]`, of zero sum over classes.
      intercept: float64 `[k]`, of zero sum.
      strength: its C.
      iterations: how many it took from where it started.
      slope: norm of the gradient of the mean objective.
    """

    classes: np.ndarray
    weights: np.ndarray
    intercept: np.ndarray
    strength: float
    iterations: int
    slope: float

    def probabilities(self, features, classes: int) -> np.ndarray:
        """Float64 `[m, classes]` of features `[m, width]`; a class without training rows gets 0."""
        logits = np.asarray(features, np.float64) @ self.weights + self.intercept
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        found = np.zeros((len(odds), classes))
        found[:, self.classes] = odds / odds.sum(axis=1, keepdims=True)
        return found


def path(features, labels, strengths: Sequence[float], tolerance: float = TOLERANCE) -> Iterator[Model]:
    """Fits one C after the other, each from the solution before it: give them in ascending order.

    Args:
      features: `[n, width]`, standardised as the caller wishes.
      labels: int `[n]`, of at least two classes.
      strengths: values of C.
      tolerance: see `TOLERANCE`.
    """
    features = np.asarray(features, np.float64)
    classes, index = np.unique(labels, return_inverse=True)
    problem = _Problem.of(features, index, len(classes))
    solution = np.zeros((problem.features.shape[1] + 1, len(classes)))
    for strength in strengths:
        # two classes: half the squared difference of two opposite columns is the whole square of both
        penalty = (2.0 if len(classes) == 2 else 1.0) / (strength * len(features))
        with jax.enable_x64(True), jax.default_device(_device()):
            solution, iterations, slope = _solve(*problem.arrays, penalty, solution, tolerance)
        weights, intercept = problem.raw(np.asarray(solution))
        yield Model(classes, weights, intercept, float(strength), int(iterations), float(slope))


def _device():
    """The default device where it has float64, a CPU otherwise (TPUs emulate it slowly)."""
    return jax.local_devices(backend=None if jax.default_backend() in ("cpu", "gpu") else "cpu")[0]


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Centred training rows, filled up to a size that few programs serve.

    `features` float64 `[rows, axes]`; `truth` one-hot `[rows, classes]`, empty rows for filling; `share` `[rows]`, one
    over the number of rows, 0 for filling; `mean` `[width]`; `axes` `[width, k]` where the rows were rotated, or None.
    """

    features: np.ndarray
    truth: np.ndarray
    share: np.ndarray
    mean: np.ndarray
    axes: np.ndarray | None

    @classmethod
    def of(cls, features: np.ndarray, index: np.ndarray, classes: int) -> "_Problem":
        (n, width), mean = features.shape, features.mean(axis=0)
        features, axes, columns = features - mean, None, width
        if n <= width:
            axes = np.linalg.svd(features, full_matrices=False)[2].T
            features, columns = features @ axes, min(_size(n), width)
        rows = _size(n)
        filled, truth, share = np.zeros((rows, columns)), np.zeros((rows, classes)), np.zeros(rows)
        filled[:n, : features.shape[1]] = features
        truth[np.arange(n), index] = 1
        share[:n] = 1 / n
        return cls(filled, truth, share, mean, axes)

    @functools.cached_property
    def arrays(self) -> tuple:
        """What `_solve` takes, on its device."""
        with jax.enable_x64(True), jax.default_device(_device()):
            turned = np.ascontiguousarray(self.features.T)  # its products are faster than those of a transposed view
            return tuple(map(jnp.asarray, (self.features, turned, self.truth, self.share)))

    def raw(self, solution: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights and intercept for features as they were given."""
        weights = solution[:-1] if self.axes is None else self.axes @ solution[: self.axes.shape[1]]
        return weights, solution[-1] - self.mean @ weights


def _size(n: int) -> int:
    """`n` rounded up: to whole 128s up to 1024, then to whole 1024s."""
    step = 128 if n <= 1024 else 1024
    return -(-n // step) * step


@jax.jit
def _solve(features, turned, truth, share, penalty, start, tolerance):
    """The solution float64 `[axes + 1, classes]` (intercept last), iterations and the gradient's norm."""
    penalties = jnp.full((len(start), 1), penalty).at[-1].set(0)

    def logits(weights):
        return features @ weights[:-1] + weights[-1]

    def measure(weights, scores):
        """Mean objective and gradient."""
        top = scores.max(axis=1, keepdims=True)
        odds = jnp.exp(scores - top)
        total = odds.sum(axis=1, keepdims=True)
        own = jnp.sum(truth * (scores - top), axis=1)
        value = share @ (jnp.log(total[:, 0]) - own) + 0.5 * jnp.sum(penalties * weights**2)
        wrong = (odds / total - truth) * share[:, None]
        return value, jnp.concatenate([turned @ wrong, wrong.sum(axis=0)[None]]) + penalties * weights

    def going_on(state):
        slope = jnp.sqrt(jnp.sum(state["gradient"] ** 2))
        near = (slope <= tolerance) & (slope**2 <= 2 * penalty * tolerance * state["value"])
        return ~near & (state["step"] < MOST) & state["moving"]

    def iterate(state):
        inverse = jax.lax.cond(
            state["step"] % RENEW == 0,
            lambda: _preconditioner(features, turned, state["scores"], share, penalty),
            lambda: state["inverse"],
        )
        direction = -_direction(state["gradient"], state["moves"], state["turns"], inverse, state["step"])
        along = logits(direction)
        length = _line_search(state, direction, along, truth, share, penalties)
        move = length * direction
        weights, scores = state["weights"] + move, state["scores"] + length * along
        value, gradient = measure(weights, scores)
        place = state["step"] % HISTORY
        return {
            "step": state["step"] + 1,
            "weights": weights,
            "scores": scores,
            "value": value,
            "gradient": gradient,
            "moves": state["moves"].at[place].set(move),
            "turns": state["turns"].at[place].set(gradient - state["gradient"]),
            "inverse": inverse,
            "moving": (length > 0) & jnp.any(move != 0),
        }

    scores = logits(start)
    value, gradient = measure(start, scores)
    state = {"step": 0, "weights": start, "scores": scores, "value": value, "gradient": gradient, "moving": True}
    state["moves"] = state["turns"] = jnp.zeros((HISTORY, *start.shape))
    state["inverse"] = jnp.zeros((len(start), len(start)))
    state = jax.lax.while_loop(going_on, iterate, state)
    return state["weights"], state["step"], jnp.sqrt(jnp.sum(state["gradient"] ** 2))


def _preconditioner(features, turned, scores, share, penalty):
    """Inverse of the Hessian's mean over the classes, float64 `[axes + 1, axes + 1]`."""
    chance = jax.nn.softmax(scores, axis=1)
    weight = share * (1 - jnp.sum(chance**2, axis=1)) / (scores.shape[1] - 1)
    weighted = features * weight[:, None]
    side = weighted.sum(axis=0)[:, None]
    corner = weight.sum()[None, None]
    mean = jnp.block([[turned @ weighted + penalty * jnp.eye(len(turned)), side], [side.T, corner * (1 + 1e-6)]])
    inverse = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(mean), jnp.eye(len(mean)))
    return (inverse + inverse.T) / 2


def _direction(gradient, moves, turns, inverse, step):
    """L-BFGS's product of the inverse Hessian and the gradient, of zero sum over classes as the solution is."""
    products = jnp.sum(moves * turns, axis=(1, 2))
    curved = products > 0
    factor_of = jnp.where(curved, 1 / jnp.where(curved, products, 1), 0)
    filled = jnp.minimum(step, HISTORY)

    def back(k, carry):
        found, factors = carry
        place = (step - 1 - k) % HISTORY
        factor = factor_of[place] * jnp.sum(moves[place] * found)
        return found - factor * turns[place], factors.at[place].set(factor)

    def forth(k, found):
        place = (step - filled + k) % HISTORY
        return found + moves[place] * (factors[place] - factor_of[place] * jnp.sum(turns[place] * found))

    found, factors = jax.lax.fori_loop(0, filled, back, (gradient, jnp.zeros(HISTORY)))
    last = (step - 1) % HISTORY
    turned = jnp.sum(turns[last] * (inverse @ turns[last]))
    found = inverse @ found * jnp.where(curved[last], products[last] / jnp.where(turned > 0, turned, 1), 1)
    found = jax.lax.fori_loop(0, filled, forth, found)
    return found - found.mean(axis=1, keepdims=True)


def _line_search(state, direction, along, truth, share, penalties):
    """Length at which the convex objective is nearly flat along `direction`: Newton's steps within a bracket."""
    linear = jnp.sum(penalties * state["weights"] * direction)
    square = jnp.sum(penalties * direction**2)
    first = jnp.sum(state["gradient"] * direction)

    def slope_and_curvature(length):
        chance = jax.nn.softmax(state["scores"] + length * along, axis=1)
        mean = jnp.sum(chance * along, axis=1)
        slope = share @ (mean - jnp.sum(truth * along, axis=1)) + linear + length * square
        return slope, share @ (jnp.sum(chance * along**2, axis=1) - mean**2) + square

    def going_on(search):
        return (jnp.abs(search["slope"]) > _FLAT * jnp.abs(first)) & (search["trial"] < _TRIALS)

    def improve(search):
        length = search["length"]
        low = jnp.where(search["slope"] < 0, length, search["low"])
        high = jnp.where(search["slope"] < 0, search["high"], length)
        newton = length - search["slope"] / jnp.maximum(search["curvature"], 1e-300)
        widest = jnp.where(jnp.isinf(high), 10 * length, high)
        middle = jnp.where(jnp.isinf(high), 10 * length, 0.5 * (low + high))
        length = jnp.where((newton > low) & (newton < widest), newton, middle)
        slope, curvature = slope_and_curvature(length)
        found = {"length": length, "slope": slope, "curvature": curvature, "low": low, "high": high}
        return {**found, "trial": search["trial"] + 1}

    slope, curvature = slope_and_curvature(1.0)
    search = {"length": 1.0, "slope": slope, "curvature": curvature, "low": 0.0, "high": jnp.inf, "trial": 0}
    found = jax.lax.while_loop(going_on, improve, search)
    return jnp.where(first < 0, found["length"], 0.0)
