"""Training of a cross-attention head on questions by the project's loop: towers frozen, or trained with it.

Frozen towers' states are computed once, and kept in memory: (patches + 1) x width x 4 bytes for a picture. Closed and
open questions share the head; each is compared with the answers of its own type alone.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mmkd_jax import io, preprocess
from mmkd_jax.batch import TextBatch
from mmkd_jax.data.order import Order
from mmkd_jax.models import fusion
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.models.fusion import FusionSpec
from mmkd_jax.tasks.base import Batch, Params
from mmkd_jax.train import checkpoint, loop
from mmkd_jax.train.setup import Job

TOWERS_RATE = 0.1  # of the learning rate, for towers that are trained


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What a head is given: `pictures` arrays `[pictures, ...]`, `questions` arrays `[q, ...]`, by name.

    `picture_of` int64 `[q]` says which picture each question is about.
    """

    pictures: Mapping[str, np.ndarray]
    questions: Mapping[str, np.ndarray]
    picture_of: np.ndarray

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs of questions, each with its picture."""
        about = {name: one[self.picture_of[rows]] for name, one in self.pictures.items()}
        return about | {name: one[rows] for name, one in self.questions.items()}


class FusionTask:
    """The task of `mmkd_jax.tasks.base` whose features are scores of answers, float32 `[n, answers]`.

    Args:
      spec: of the head.
      allowed: bool `[2, answers]`, what open (0) and closed (1) questions can be answered.
      towers: the model whose towers are trained with the head; None where they are frozen.
      blind: whether it is given the question alone: one patch of zeros stands in the place of the picture.
    """

    micro_batches = 1

    def __init__(
        self, spec: FusionSpec, allowed: np.ndarray, towers: DualEncoder | None = None, *, blind: bool = False
    ):
        self.spec, self._allowed, self._towers, self._blind = spec, np.asarray(allowed), towers, blind

    @property
    def model(self) -> "FusionTask":
        """The head is all that a checkpoint is described by."""
        return self

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        """`fusion`, and where the towers are trained, zeros for `image` and `text`, which the run is given."""
        shapes = {} if self._towers is None else {name: self._towers.shapes()[name] for name in ("image", "text")}
        towers = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return {"fusion": fusion.init(self.spec, key), **towers}, {}

    def encode(self, params: Params, extra: Any, batch: Batch, key: jax.Array, step: jax.Array) -> jax.Array:
        """Scores of the answers that a question's type allows; dropout keyed by `key`."""
        return self.scores(params, batch, key)

    def scores(self, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """As `encode`; without dropout if there is no key."""
        head, tower = (None, None) if key is None else jax.random.split(key)
        if self._towers is None:
            words, mask = batch["words"], batch["mask"]
        else:
            text = TextBatch(*(batch[name] for name in TextBatch._fields))
            words, mask = fusion.words_of(self._towers, params, text, tower), text.mask
        patches = self._patches(params, batch, len(words))
        found = fusion.apply(self.spec, params["fusion"], patches, words, mask, head)
        return jnp.where(jnp.asarray(self._allowed)[batch["closed"].astype(jnp.int32)], found, -1e9)

    def _patches(self, params: Params, batch: Batch, count: int) -> jax.Array:
        if self._blind:
            return jnp.zeros((count, 1, self.spec.patch_width), jnp.float32)
        if self._towers is None:
            return batch["patches"]
        image = jax.lax.optimization_barrier(preprocess.normalise(batch["image"], self._towers.spec.preprocess))
        return fusion.patches_of(self._towers, params, image)

    def objective(
        self, params: Params, features: jax.Array, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], dict]:
        """Cross-entropy of the answers."""
        loss = optax.softmax_cross_entropy_with_integer_labels(features, batch["answer"]).mean()
        return loss, {"accuracy": (features.argmax(axis=-1) == batch["answer"]).mean()}, {}

    def lr_scale(self, path: str) -> float:
        """Towers learn at a tenth of the head's rate."""
        return 1.0 if path.startswith("fusion/") else TOWERS_RATE

    def encoders(self, params: Params) -> Params:
        """All of it."""
        return params


class QuestionBatches:
    """Batches of questions as a function of the step; the order is a shuffle each epoch.

    Args:
      inputs: of all questions.
      targets: `closed` bool and `answer` int32, `[q]`.
      batch: questions of the global batch.
      seed: of the order.
      process: (index, count) of the processes.
    """

    def __init__(self, inputs: Inputs, targets: Mapping[str, np.ndarray], batch: int, seed: int, process=(0, 1)):
        count = len(inputs.picture_of)
        self._inputs, self._targets, self._batch = inputs, targets, batch
        self._order, (self._index, self._count) = Order(count, seed, block=1, window=count), process

    def iterate(self, start: int, stop: int, threads: int = 1) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Steps `start` to `stop`, each with the process's part of its batch."""
        for step in range(start, stop):
            rows, _ = self._order.at(np.arange(step * self._batch, (step + 1) * self._batch, dtype=np.int64))
            rows = rows[self._index * len(rows) // self._count : (self._index + 1) * len(rows) // self._count]
            yield step, self._inputs.take(rows) | {name: one[rows] for name, one in self._targets.items()}


def train(
    task: FusionTask, inputs: Inputs, targets: Mapping[str, np.ndarray], config: ConfigDict, workdir: str | os.PathLike,
    identity: Any, towers: Params,
) -> Params:  # fmt: skip
    """Trains a head by `loop.run`, or goes on with it.

    Args:
      task: what is trained.
      inputs, targets: of the training questions, see `QuestionBatches`.
      config: of `train.heads.config`.
      workdir: the run's folder.
      identity: JSON-like record of what the inputs are made of.
      towers: parameters `image` and `text` that training starts from; {} where they are frozen.

    Returns:
      The trained parameters.
    """
    data = {"inputs": identity, "targets": io.hash_of({name: one.tolist() for name, one in targets.items()})}
    fields = (*inputs.pictures, *inputs.questions, *targets)

    def build(config: ConfigDict) -> Job:
        process = (jax.process_index(), jax.process_count())
        batches = QuestionBatches(inputs, targets, config.batch, config.seed, process)
        return Job(task, batches, None, config.steps, data, fields, jax.tree.map(np.asarray, towers))

    folder = loop.run(config, workdir, build) / "checkpoints"
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0))[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    return checkpoint.load_params(folder / str(config.steps), like)


def predict(task: FusionTask, params: Params, inputs: Inputs, closed: np.ndarray, batch: int = 64) -> np.ndarray:
    """Scores of all questions, float32 `[q, answers]`, in batches of one size."""
    scores, parts = jax.jit(task.scores), []
    for start in range(0, len(closed), batch):
        rows = np.minimum(np.arange(start, start + batch), len(closed) - 1)
        parts.append(np.asarray(scores(params, inputs.take(rows) | {"closed": closed[rows]})))
    return np.concatenate(parts)[: len(closed)]
