"""What stage 2 with nine stored teachers adds to a step of stage 1: FLOPs of the model, and time of the host."""

import contextlib
import dataclasses
import io as std_io
import math
import pathlib
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.extend import core

from mmkd_jax import config as configs
from mmkd_jax import io, timing
from mmkd_jax.batch import TextBatch
from mmkd_jax.data.batches import Batches
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.specs import ModelSpec
from mmkd_jax.tasks import targets
from mmkd_jax.tasks.base import Task
from mmkd_jax.tasks.clip import ClipTask
from mmkd_jax.tasks.distill import DistillTask, Recipe
from mmkd_jax.train import setup, sharding
from teachers import costs

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
RECIPES = ("public", "mean", "plus")
NAMES = tuple(f"teacher{i}" for i in range(len(costs.WIDTHS)))


@dataclasses.dataclass(frozen=True)
class Overhead:
    """What a recipe adds.

    Attributes:
      recipe: its name.
      stage1: FLOPs of a step of stage 1 for one pair.
      added: those that the recipe adds.
    """

    recipe: str
    stage1: float
    added: float

    @property
    def share(self) -> float:
        """Of stage 1's FLOPs."""
        return self.added / self.stage1

    def __str__(self) -> str:
        return (
            f"{self.recipe:<7} {self.stage1 / 1e9:8.1f} GFLOPs a pair in stage 1, "
            f"stage 2 adds {self.added / 1e9:.3f} ({self.share:.2%})"
        )


def flops(recipe: str, batch: int = costs.BATCH) -> Overhead:
    """Counts the products of a step at the paper's size, forwards and backwards, in the programs as they are traced.

    Nothing is computed a second time (`remat` is left out), and elementwise work does not count, as is usual.
    """
    config = configs.load(f"{CONFIGS / 'stage2_mmkd.py'}:recipe={recipe}", ["--config.remat=none"])
    spec = ModelSpec.from_dict(configs.to_dict(config.model))
    student = setup.student(config)
    zeros = [np.zeros(width, np.float32) for width in costs.WIDTHS]
    taught = [
        targets.TeacherTarget(name, width, "native", 100.0, mean, mean)
        for name, width, mean in zip(NAMES, costs.WIDTHS, zeros, strict=True)
    ]
    routing = np.ones((1, len(taught)), np.float32)
    distill = DistillTask(spec, taught, Recipe(**configs.to_dict(config.recipe)), routing, seed=0, **student)
    stage1, stage2 = (_of_step(task, spec, batch) / batch for task in (ClipTask(spec, **student), distill))
    return Overhead(recipe, stage1, stage2 - stage1)


def host(rows: int, rounds: int) -> list[float]:
    """Milliseconds of the processor that nine teachers add to 1,000 pairs of a loop whose step takes no time.

    They are read, put on the device beside the rest of the batch, and given to a compiled step that looks at nothing.
    Work of others on the same cores makes the processor's own time longer too: the least number is nearest to the cost.

    Args:
      rows: of the set, at least `costs.BATCH`.
      rounds: numbers to return, after a small round that is not counted.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        root = io.as_path(folder)
        for number, count in enumerate((costs.BATCH, rows)):
            pairs, features = costs.tiny_pairs(root / f"pairs{number}", count), root / f"features{number}"
            with contextlib.redirect_stderr(std_io.StringIO()):  # lines of progress
                costs.storing(pairs, features)
            for _ in range(rounds if number else 1):
                found.append(costs.reading(pairs, features) + _handing_over(pairs, features))
    return found[1:]


def report(rows: int, rounds: int) -> Iterable[str]:
    """The lines of `mmkd bench distill`."""
    yield f"nine teachers of widths {', '.join(map(str, costs.WIDTHS))}, global batch {costs.BATCH}"
    for recipe in RECIPES:
        yield str(flops(recipe))
    yield f"host, for 1,000 pairs: {timing.spread(host(rows, rounds))} ms of the processor more than stage 1"


def _handing_over(pairs: PairsSet, features: epath.Path) -> float:
    """Milliseconds of the processor for 1,000 pairs: to the device and into a step, with the targets and without."""
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    sets = {name: FeatureSet.open(features / name, pairs) for name in NAMES}
    batches = Batches(
        pairs, batch=costs.BATCH, seed=0, policy=costs.POLICY, image_size=8, tokenizer=_tokens, features=sets
    )
    step_fn, state = jax.jit(lambda state, batch: state + 1), jnp.zeros(())
    steps, seconds = len(pairs) // costs.BATCH, {True: 0.0, False: 0.0}
    for step in range(-1, steps):  # the first compiles
        batch = batches.batch(max(step, 0))
        for taught in seconds:
            given = {name: batch[name] for name in setup.Job.fields if taught or name != "targets"}
            begin = time.process_time()
            jax.block_until_ready(step_fn(state, sharding.global_batch(given, mesh)))
            seconds[taught] += (time.process_time() - begin) * (step >= 0)
    return 1e6 * (seconds[True] - seconds[False]) / (steps * costs.BATCH)


def _tokens(texts: list[str]) -> TextBatch:
    return TextBatch(*np.zeros((4, len(texts), 1), np.int32))


def _of_step(task: Task, spec: ModelSpec, batch: int) -> float:
    """FLOPs of the products of a loss and its gradient."""
    size, context = spec.image.image_size, spec.text.context
    of_teacher = {
        name: {
            **{tower: jax.ShapeDtypeStruct((batch, width), np.float32) for tower in ("image", "text")},
            "present": jax.ShapeDtypeStruct((batch,), np.bool_),
        }
        for name, width in zip(NAMES, costs.WIDTHS, strict=True)
    }
    inputs = {
        "image": jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8),
        "text": TextBatch(*[jax.ShapeDtypeStruct((batch, context), np.int32)] * 4),
        "modality": jax.ShapeDtypeStruct((batch,), np.int32),
        "targets": of_teacher,
    }

    def gradient(params, inputs):
        def loss(params):
            features = task.encode(params, {}, inputs, jax.random.key(0), jnp.int32(0))
            return task.objective(params, features, inputs, jnp.int32(0))[0]

        return jax.value_and_grad(loss)(params)

    params = jax.eval_shape(lambda: task.init(jax.random.key(0))[0])
    return count(jax.make_jaxpr(gradient)(params, inputs).jaxpr)


def count(jaxpr: Any) -> float:
    """FLOPs of all products in a traced program: 2 for each multiplication; a loop's body as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        shapes = [getattr(var.aval, "shape", ()) for var in equation.invars]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in contracted)
        elif name == "conv_general_dilated":
            inputs = math.prod(shapes[1]) / shapes[1][params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * inputs
        elif name == "while" and any(count(params[part].jaxpr) for part in ("cond_jaxpr", "body_jaxpr")):
            raise NotImplementedError("products in a loop whose length is not known before it runs")
        elif name == "cond":
            total += max(count(branch.jaxpr) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(count(one) for one in _inner(params))
    return total


def _inner(params: dict[str, Any]) -> Sequence[Any]:
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, kinds))
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if isinstance(leaf, kinds)]
