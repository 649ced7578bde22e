"""Where a run begins: the first train state."""

from typing import Any

import jax
from ml_collections import ConfigDict

from mmkd_jax.train import checkpoint, setup, sharding
from mmkd_jax.train.state import TrainState, init_state


def first_state(
    config: ConfigDict, mesh: Any, job: setup.Job, transform: Any, saver: checkpoint.Checkpoints
) -> TrainState:
    """The first state: this run's own checkpoint, else the parameters of `config.init`, else fresh ones."""

    def init():
        return init_state(job.task, transform, config.seed)

    shapes = jax.eval_shape(init)
    placement = sharding.shardings(shapes, config.sharding, mesh)
    latest = saver.latest()
    if latest is not None:
        like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, placement)
        return saver.restore(latest, like)[0]
    state = jax.jit(init, out_shardings=placement)()
    if config.init:
        # The student's own towers; what a recipe adds (heads, its scale) starts fresh.
        own = job.task.encoders(state.params)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), own)
        state = state.replace(params={**state.params, **checkpoint.load_params(config.init, like)})
    return state
