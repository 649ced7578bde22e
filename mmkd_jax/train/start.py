"""Where a run begins. The order of the sources, here and nowhere else:

1. the run's own latest checkpoint: everything, bit for bit;
2. the parameters of the checkpoint that `config.init` names;
3. published weights of the towers, `config.towers.image` and `config.towers.text`;
4. fresh values, a function of the seed.

A parameter comes from the first source that there is. One that a named checkpoint or a weights file lacks may start
fresh only where a pattern of `config.fresh` is found in its name: a new head, a projection that a bare tower has not.
"""

import logging
from typing import Any

import jax
from ml_collections import ConfigDict

from mmkd_jax import io, licences
from mmkd_jax.errors import InputError
from mmkd_jax.models import constraints, towers
from mmkd_jax.train import checkpoint, ema, setup, sharding
from mmkd_jax.train.folder import differences
from mmkd_jax.train.state import AveragedState, TrainState, init_state, with_mean, without_mean

logger = logging.getLogger(__name__)


def first_state(
    config: ConfigDict, mesh: Any, job: setup.Job, transform: Any, saver: checkpoint.Checkpoints
) -> TrainState:
    """The state that the next update starts from, placed on `mesh` by `config.sharding`.

    Raises:
      InputError: the source does not fit the model, is damaged, or is this run's checkpoint with other data.
    """
    averaged = ema.check(config.get("ema", 0.0)) > 0

    def init():
        return init_state(job.task, transform, config.seed)

    shapes = jax.eval_shape(init)
    placement = sharding.shardings(shapes, config.sharding, mesh, config.unsharded)
    latest = saver.latest()
    if latest is not None:
        _refuse_other_data(config, job, saver.meta(latest), latest)
        like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, placement)
        logger.info("goes on from its checkpoint %d", latest)
        if checkpoint.averaged(saver.path(latest)):
            like = AveragedState(like.step, like.params, like.opt_state, like.extra, like.params)
        state = saver.restore(latest, like)[0]
    else:
        state = jax.jit(constraints.under(mesh, init), out_shardings=placement)()
        state = state.replace(params=_merged(state.params, _given(config, job, state.params)))
    if not averaged:
        return without_mean(state)
    return state if isinstance(state, AveragedState) else with_mean(state)


def inherited(config: ConfigDict, saver: checkpoint.Checkpoints) -> dict[str, Any]:
    """Licences of the weights that the run began with, and of all that those were made from: `{what: licence}`.

    Kept in its checkpoints: when it goes on, or is exported, what it began with may be gone.
    """
    latest = saver.latest()
    if latest is not None:
        return saver.meta(latest).get("inherited", {})
    if config.init:
        return licences.of_checkpoint(checkpoint.load_meta(config.init))
    files = [config.towers[tower] for tower in ("image", "text") if config.towers[tower]]
    return {f"starting weights {io.as_path(file).name}": "not stated" for file in files}


def _given(config: ConfigDict, job: setup.Job, params: Any) -> Any:
    """What of `params` does not start fresh."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    if config.init:
        logger.info("starts from checkpoint %s", config.init)
        return checkpoint.load_params(config.init, like, fresh=config.fresh)
    given = {name: _placed(values, like[name]) for name, values in job.given.items()}
    for tower in ("image", "text"):
        if config.towers[tower]:
            logger.info("%s tower starts from %s", tower, config.towers[tower])
            values = towers.read(config.towers[tower], job.task.model.spec, tower, fresh=config.fresh)
            given[tower] = _placed(values, like[tower])
    return given


def _placed(values: Any, like: Any) -> Any:
    """NumPy arrays that every process holds as arrays with the placements of `like`."""
    return {
        name: _placed(value, like[name])
        if isinstance(value, dict)
        else jax.make_array_from_callback(value.shape, like[name].sharding, lambda index, value=value: value[index])
        for name, value in values.items()
    }


def _merged(params: Any, given: Any) -> Any:
    """`params` with the leaves of `given` in their places."""
    if not isinstance(given, dict):
        return given
    return {name: _merged(value, given[name]) if name in given else value for name, value in params.items()}


def _refuse_other_data(config: ConfigDict, job: setup.Job, meta: dict[str, Any], step: int) -> None:
    found = next(differences(meta["data"], io.json_form(job.identity), "data"), None)
    if found and not config.data.other_set:
        name, before, after = found
        raise InputError(
            f"checkpoint {step} of this run was trained on another {name} ({before!r}, now {after!r}); "
            "--config.data.other_set goes on with other data"
        )
