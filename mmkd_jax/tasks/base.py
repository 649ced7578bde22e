"""The seam between the loop and whatever is trained."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

from mmkd_jax.models.dual_encoder import DualEncoder

Params = dict[str, Any]
Batch = Mapping[str, Any]


class Features(NamedTuple):
    """Student embeddings of a batch, unit length, float32 `[n, embed]` each; `masked`: of pictures seen in part.

    `between`: similarities of images and texts `[n, n]`, where an objective has several losses that share them.
    """

    image: jax.Array
    text: jax.Array
    masked: jax.Array | None = None
    between: jax.Array | None = None


class Task(Protocol):
    """A training task.

    `encode` is applied to a batch (or to its micro-batches), `objective` to the features of the whole batch, so that
    contrastive losses stay exact however the encoding is split. Every draw comes from `key`, `step` or the batch's
    own row numbers: a step is a pure function of the state and the batch. Of `model` the loop reads `spec`, which a
    checkpoint keeps as `spec.to_dict()`; a head on features has a spec of its own, and features of any form.
    """

    model: DualEncoder
    micro_batches: int  # parts that `encode` is applied to one after another; 1: the whole batch at once

    def init(self, key: jax.Array) -> tuple[Params, Any]:
        """Parameters as a nested dict of float32 arrays, and what else is carried from step to step (or `{}`)."""

    def encode(self, params: Params, extra: Any, batch: Batch, key: jax.Array, step: jax.Array) -> Features:
        """The differentiable part that can run on any slice of the batch."""

    def objective(
        self, params: Params, features: Features, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        """The loss (float32 scalar), scalars to report, and the new `extra`."""

    def lr_scale(self, path: str) -> Any:
        """Factor on the learning rate of the parameter at `path` ("image/norm/scale"); a row a layer if stacked."""

    def encoders(self, params: Params) -> Params:
        """The part of `params` that the dual encoder needs: what is evaluated, loaded and exported."""
