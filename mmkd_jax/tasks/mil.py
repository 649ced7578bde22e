"""Gated-attention heads on bags of features, trained by the project's loop: classes, or discrete-time hazards.

A step takes whole bags, filled up to one of few sizes, so that programs are few; the attention works on a chunk of
patches at a time (`models.mil`), so that memory is that of the batch and of one chunk's activations. Features are
scaled by mean and variance of the training bags, which the parameters hold.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mmkd_jax import io
from mmkd_jax.data.bags import Bags
from mmkd_jax.data.order import Order
from mmkd_jax.errors import InputError
from mmkd_jax.evals import survival_hazards
from mmkd_jax.models import mil
from mmkd_jax.tasks.base import Batch, Params
from mmkd_jax.train import checkpoint, loop
from mmkd_jax.train.setup import Job

TARGETS = {"classes": ("label", "weight"), "hazards": ("bin", "event")}
SMALLEST = 64  # patches that a bag is filled up to


@dataclasses.dataclass(frozen=True)
class MilSpec:
    """What a head is.

    Attributes:
      kind: `classes` (targets `label` int32 `[n]` and `weight` float32 `[n]`) or `hazards` (`bin` int32 and `event`
        bool `[n]`, see `evals.survival_hazards`).
      width: of a patch's features.
      outputs: number of classes, or of bins of time.
      hidden, attention: widths of the layers, see `models.mil.init`.
      dropout: share of hidden features that training leaves out.
      alpha: of hazards, how much less the censored count, 0 to 1.
    """

    kind: str
    width: int
    outputs: int
    hidden: int = 128
    attention: int = 64
    dropout: float = 0.25
    alpha: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-like record."""
        return {"head": "gated_attention", **dataclasses.asdict(self)}


class MilTask:
    """The task of `mmkd_jax.tasks.base` whose features are a bag's outputs, float32 `[bags, outputs]`.

    Args:
      spec: of the head.
      mean, variance: float32 `[width]` of the training bags' features.
    """

    micro_batches = 1

    def __init__(self, spec: MilSpec, mean: np.ndarray, variance: np.ndarray):
        self.spec, self._norm = spec, {"mean": mean, "variance": variance}

    @property
    def model(self) -> "MilTask":
        """The head is all that there is."""
        return self

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        """Fresh parameters of `models.mil.init`, and `norm` with the training features' mean and variance."""
        s = self.spec
        fresh = mil.init(key, s.width, s.outputs, s.hidden, s.attention)
        return fresh | {"norm": jax.tree.map(jnp.asarray, self._norm)}, {}

    def encode(self, params: Params, extra: Any, batch: Batch, key: jax.Array, step: jax.Array) -> jax.Array:
        """Outputs of bags `bag` `[bags, patches, width]`, of which `size` int32 `[bags]` patches count."""
        mask = jnp.arange(batch["bag"].shape[1]) < batch["size"][:, None]
        return mil.apply(scaled(params), batch["bag"], mask, key=key, dropout=self.spec.dropout)[0]

    def objective(
        self, params: Params, features: jax.Array, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], dict]:
        """Cross-entropy weighted by `weight`, or the likelihood of the hazards."""
        if self.spec.kind == "hazards":
            told = survival_hazards.negative_log_likelihood(features, batch["bin"], batch["event"], self.spec.alpha)
            return told.mean(), {}, {}
        found = optax.softmax_cross_entropy_with_integer_labels(features, batch["label"])
        right = (features.argmax(axis=-1) == batch["label"]).mean()
        return (found * batch["weight"]).sum() / batch["weight"].sum(), {"accuracy": right}, {}

    def lr_scale(self, path: str) -> float:
        """Statistics of features are no weights."""
        return 0.0 if path.startswith("norm/") else 1.0

    def encoders(self, params: Params) -> Params:
        """All of it."""
        return params


class BagBatches:
    """Batches of bags as a function of the step; the order is a shuffle of `rows` each epoch.

    Args:
      bags: the features.
      rows: bags to train on, int64 `[n]`.
      targets: by name, an entry for each of all bags.
      batch: bags of the global batch.
      seed: of the order.
      process: (index, count); the process's slice of a batch is the index-th of count equal parts.

    Raises:
      InputError: there is nothing to train on, or the batch cannot be divided.
    """

    def __init__(
        self, bags: Bags, rows: np.ndarray, targets: Mapping[str, np.ndarray], *, batch: int, seed: int,
        process: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        index, count = process
        if not len(rows) or batch < 1 or batch % count:
            raise InputError(f"{len(rows)} bags in batches of {batch} cannot be divided among {count} processes")
        self._bags, self._rows, self._targets = bags, np.asarray(rows), dict(targets)
        self._order, self._batch = Order(len(rows), seed, block=1, window=len(rows)), batch
        self._slice = slice(index * (batch // count), (index + 1) * (batch // count))

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """`row` int64 `[b]`, `bag` `[b, patches, width]` as stored, `size` int32 `[b]`, and the targets of the bags."""
        places, _ = self._order.at(np.arange(step * self._batch, (step + 1) * self._batch, dtype=np.int64))
        rows = self._rows[places]
        patches = filled_size(int(self._bags.sizes[rows].max()))  # of the global batch: one shape for all processes
        rows = rows[self._slice]
        bag = np.zeros((len(rows), patches, self._bags.width), self._bags.dtype)
        for out, row in zip(bag, rows):
            self._bags.fill(int(row), out)
        sizes = self._bags.sizes[rows].astype(np.int32)
        return {"row": rows, "bag": bag, "size": sizes, **{name: all[rows] for name, all in self._targets.items()}}

    def iterate(self, start: int, stop: int, threads: int = 1) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Steps `start` to `stop` with their batches, as many made ahead as there are threads."""
        import grain

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        steps = grain.MapDataset.range(start, stop).map(lambda step: (int(step), self.batch(int(step))))
        yield from steps.to_iter_dataset(options)


def filled_size(patches: int) -> int:
    """The size that a bag is filled up to: a power of two, or three quarters of one."""
    power = max(SMALLEST, 1 << max(0, patches - 1).bit_length())
    return power * 3 // 4 if patches <= power * 3 // 4 and power > SMALLEST else power


def scaled(params: Params) -> Params:
    """Parameters of `models.mil` for features as they are stored: scaling is made part of the first layer.

    So no scaled copy of a bag is ever made. A feature that does not vary in training counts nothing.
    """
    norm, layer = jax.lax.stop_gradient(params["norm"]), params["embed"]
    factor = jnp.where(norm["variance"] > 1e-10, jax.lax.rsqrt(jnp.maximum(norm["variance"], 1e-10)), 0.0)
    kernel = factor[:, None] * layer["kernel"]
    shift = jnp.matmul(norm["mean"], kernel, precision=jax.lax.Precision.HIGHEST)
    rest = {name: value for name, value in params.items() if name != "norm"}
    return rest | {"embed": {"kernel": kernel, "bias": layer["bias"] - shift}}


def train(
    bags: Bags, rows: np.ndarray, targets: Mapping[str, np.ndarray], spec: MilSpec, config: ConfigDict,
    workdir: str | os.PathLike,
) -> list[Params]:  # fmt: skip
    """Trains a head by `loop.run`, or goes on with it.

    Args:
      bags: the features.
      rows: bags to train on; the others are not looked at.
      targets: those of `spec.kind`, an entry for each of all bags.
      spec: of the head.
      config: of `heads.config`.
      workdir: the run's folder.

    Returns:
      Parameters of each checkpoint that the run has, the oldest first.
    """
    targets = {name: np.asarray(targets[name]) for name in TARGETS[spec.kind]}
    data = {
        "bags": bags.hash,
        "rows": io.hash_of(np.asarray(rows).tolist()),
        "targets": io.hash_of({name: one[rows].tolist() for name, one in targets.items()}),
    }

    def build(config: ConfigDict) -> Job:
        process = (jax.process_index(), jax.process_count())
        batches = BagBatches(bags, rows, targets, batch=config.batch, seed=config.seed, process=process)
        task = MilTask(spec, *bags.spread(rows))
        return Job(task, batches, None, config.steps, data, ("bag", "size", *TARGETS[spec.kind]))

    folder = loop.run(config, workdir, build) / "checkpoints"
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(lambda: MilTask(spec, *2 * [np.zeros(spec.width, np.float32)]).init(jax.random.key(0))[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    steps = sorted(int(one.name) for one in folder.iterdir() if one.name.isdigit())
    return [checkpoint.load_params(folder / str(step), like) for step in steps]


def predict(params: Params, bags: Bags, rows: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Outputs float32 `[n, outputs]` of the bags in `rows`, and of each the attention on its patches `[patches]`.

    Bags are streamed: memory is that of one chunk.
    """
    params = scaled(params)
    found = [mil.pool(params, bags.chunks(int(row))) for row in rows]
    return np.stack([outputs for outputs, _ in found]), [attention for _, attention in found]
