"""The real training step of a config, lowered for devices that need not be there."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax.batch import TextBatch
from mmkd_jax.specs import ModelSpec
from mmkd_jax.tasks.base import Task
from mmkd_jax.tasks.clip import ClipTask
from mmkd_jax.tasks.distill import DistillTask, Recipe
from mmkd_jax.tasks.targets import TeacherTarget
from mmkd_jax.train import optim, setup, sharding, stability
from mmkd_jax.train.state import init_state, make_step, with_mean

MODALITIES = 8  # that the assumed pairs are of


def lower(config: ConfigDict, devices: Sequence[Any], teachers: Mapping[str, int]) -> jax.stages.Lowered:
    """The step of `config` on `devices`, from shapes alone.

    Args:
      config: of stage 1 or 2; no data is opened.
      devices: of a topology, or fake ones.
      teachers: stage 2: widths of the features that are taken to be stored, by name.

    Raises:
      InputError: mesh, batch, rules and devices do not fit together.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_divides(config.batch, mesh)
    spec = ModelSpec.from_dict(configs.to_dict(config.model))
    task = assumed_task(config, spec, teachers)
    transform = stability.guard(optim.optimizer(config.optimizer, config.steps or 1000, task.lr_scale), config.spikes)
    shapes = jax.eval_shape(lambda: init_state(task, transform, config.seed))
    if config.ema:
        shapes = jax.eval_shape(with_mean, shapes)
    placement = sharding.shardings(shapes, config.sharding, mesh, config.unsharded)
    state = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, placement)
    over = sharding.batch_sharding(mesh)
    batch = batch_shapes(config, spec, teachers)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over), batch)
    step = make_step(task, transform, config.seed, config.ema)
    return sharding.program(step, mesh, placement).lower(state, batch)


def assumed_task(config: ConfigDict, spec: ModelSpec, teachers: Mapping[str, int]) -> Task:
    """The task of `config`, with teachers whose features are in their own space and whose means are arbitrary."""
    student = setup.student(config)
    if config.task != "distill":
        return ClipTask(spec, **student)
    mean = lambda width: np.linspace(-0.1, 0.1, width, dtype=np.float32)  # noqa: E731 (zeros would be folded away)
    assumed = [TeacherTarget(name, n, "native", 100.0, mean(n), mean(n)) for name, n in sorted(teachers.items())]
    routing = np.ones((MODALITIES, len(assumed)), np.float32)
    return DistillTask(spec, assumed, Recipe(**configs.to_dict(config.recipe)), routing, seed=config.seed, **student)


def batch_shapes(config: ConfigDict, spec: ModelSpec, teachers: Mapping[str, int]) -> dict[str, Any]:
    """A global batch as `mmkd_jax.data.batches` makes it, as shapes."""
    n, size = config.batch, spec.image.image_size
    of = jax.ShapeDtypeStruct
    text = of((n, spec.text.context), jnp.int32)
    targets = {
        name: {"image": of((n, w), jnp.float32), "text": of((n, w), jnp.float32), "present": of((n,), jnp.bool_)}
        for name, w in sorted(teachers.items())
    }
    pixels = of((n, size, size, 3), jnp.uint8)
    texts, modality = TextBatch(text, text, text, text), of((n,), jnp.int32)
    return {"image": pixels, "text": texts, "modality": modality, "targets": targets}
