"""What stands out in a compiled step: its collectives as a table, and warnings."""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax.models import heads
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.planning import estimate
from mmkd_jax.planning.count import Collective, Totals
from mmkd_jax.specs import ModelSpec

SMALL = 65_536  # numbers; smaller weights may be gathered without notice


def collectives(totals: Totals) -> list[dict[str, Any]]:
    """A row for each kind, axes, type and place: how many arrays, their bytes, the largest shapes; most bytes first."""
    rows: dict[tuple, dict[str, Any]] = {}
    for one, number in totals.collectives.items():
        key = one.kind, one.axes, one.dtype, one.looped
        row = rows.setdefault(
            key,
            {"kind": one.kind, "axes": list(one.axes), "dtype": one.dtype, "in_loop": one.looped, "count": 0,
             "bytes": 0, "asynchronous": 0, "shapes": collections.Counter()},
        )  # fmt: skip
        row["count"] += number
        row["bytes"] += int(number * estimate.size_of(one))
        row["asynchronous"] += number * one.asynchronous
        row["shapes"]["x".join(map(str, one.dims)) or "scalar"] += int(number * estimate.size_of(one))
    for row in rows.values():
        row["shapes"] = [name for name, _ in row["shapes"].most_common(4)]
    return sorted(rows.values(), key=lambda row: (-row["bytes"], row["kind"], row["dtype"]))


def warnings(
    text: str, totals: Totals, mesh: Mapping[str, int], config: ConfigDict, teachers: Mapping[str, int]
) -> list[str]:
    """Sentences on what a plan should not pass over in silence."""
    found = []
    if again := len(set(re.findall(r"%([\w.\-]*\.remat[\w.\-]*) = ", text))):
        found.append(f"the compiler computes {again} values again by itself: the batch is near the memory's limit")
    if totals.hidden:
        names = ", ".join(f"{name} ({number})" for name, number in sorted(totals.hidden.items()))
        found.append(f"custom calls whose FLOPs and time are not counted: {names}")
    if any(one.axes == ("?",) for one in totals.collectives):
        found.append("collectives whose devices the program's text does not tell; their axes and time are not known")
    shapes = parameter_shapes(config, teachers)
    if not any(config.batch in dims for dims in shapes):  # else weights could be taken for it
        found += _square(text, config.batch)
        if config.loss.form == "plain":  # the others exchange what they say
            found += _sides(totals, config, teachers) + _turned(totals, mesh, config.batch)
    found += _gathered(totals, mesh, config.batch, shapes)
    found += _reduced(totals, shapes)
    return found


def _square(text: str, batch: int) -> list[str]:
    """Arrays of all pairs against all pairs."""
    one = rf"(?:1,)*{batch}(?:,1)*"
    shapes = set(re.findall(rf"\b\w+\[{one},{one}\]", text)) if batch > 1 else ()
    return [f"a device holds a matrix of all pairs against all pairs: {shape}" for shape in sorted(shapes)]


def _turned(totals: Totals, mesh: Mapping[str, int], batch: int) -> list[str]:
    """Matrices of all pairs, divided by rows, that devices exchange whole to divide them by columns."""
    devices = math.prod(mesh.values())
    turned = [one for one in totals.collectives if one.kind == "all-to-all" and _size(one.dims) * devices == batch**2]
    number = sum(totals.collectives[one] for one in turned)
    return [f"a matrix of all pairs against all pairs is exchanged among the devices {number} times"] if turned else []


def _gathered(totals: Totals, mesh: Mapping[str, int], batch: int, shapes: Mapping[tuple, int]) -> list[str]:
    found = []
    for one in totals.collectives:
        if one.kind not in ("all-gather", "all-to-all"):
            continue
        text = f"{one.dtype}[{','.join(map(str, one.dims))}]"
        dims = _plain(one.dims)
        large = [size for size in dims if size > 1]
        if large and large[0] == batch and len(large) > 2:
            found.append(f"a whole activation is gathered on every device: {text}")
        elif dims in shapes and mesh["fsdp"] * mesh["tensor"] == 1 and _size(dims) > SMALL:
            found.append(f"weights are gathered though no axis of the mesh divides them: {text}")
    return sorted(set(found))


def _reduced(totals: Totals, shapes: Mapping[tuple, int]) -> list[str]:
    """Gradients that are reduced more often than there are such parameters."""
    times: collections.Counter = collections.Counter()
    for one, number in totals.collectives.items():
        if one.kind in ("all-reduce", "reduce-scatter"):
            times[_plain(one.dims)] += number
    found = []
    for dims, expected in shapes.items():
        if _size(dims) > SMALL and times[dims] > expected:
            found.append(
                f"gradients of shape {'x'.join(map(str, dims))} are reduced {times[dims]} times, not {expected}"
            )
    return found


def _sides(totals: Totals, config: ConfigDict, teachers: Mapping[str, int]) -> list[str]:
    """Features of the whole batch that are gathered or reduced more often than the losses need.

    They gather one side of what is compared: the student's, and in stage 2 of stored targets; of gradients they reduce
    that of the student's side alone.
    """
    own = collections.Counter([config.model.embed, *config.loss.widths])
    stored: collections.Counter = collections.Counter(teachers.values())
    if teachers and config.recipe.target != "heads":  # targets at the student's width, of either tower
        stored = collections.Counter({config.model.embed: 2})
    times: collections.Counter = collections.Counter()
    for one, number in totals.collectives.items():
        for width in own | stored:
            if _plain(one.dims) == _plain((config.batch, width)):
                times["gathered" if one.kind == "all-gather" else "reduced", width] += number
    # A compiler may make a gather as a reduction of sides padded by zeros (TPU v5p): those count as gathers.
    for width, wanted in (own + stored).items():
        padded = min(max(0, times["reduced", width] - own[width]), max(0, wanted - times["gathered", width]))
        times["gathered", width] += padded
        times["reduced", width] -= padded
    expected = {"gathered": own + stored, "reduced": own}
    if config.mesh.slices > 1:  # there a reduction ends with a gather within each slice
        del expected["gathered"]
    return [
        f"features {config.batch}x{width} are {what} {times[what, width]} times, not {wanted[width]}"
        for what, wanted in expected.items()
        for width in sorted(own | stored)
        if times[what, width] > wanted[width]
    ]


def parameter_shapes(config: ConfigDict, teachers: Mapping[str, int]) -> dict[tuple, int]:
    """How many parameters there are of each shape (dimensions of 1 left out, in any order), stacks taken by layer.

    Args:
      config: of the run.
      teachers: their widths by name; where the recipe has heads, each has them.
    """
    import jax

    from mmkd_jax.train.optim import path_of

    model = DualEncoder(ModelSpec.from_dict(configs.to_dict(config.model)))
    found: collections.Counter = collections.Counter()
    shapes = {"student": model.shapes()}
    if teachers and config.recipe.target == "heads":
        init = lambda key: heads.init(key, teachers, config.model.embed, config.recipe.head)  # noqa: E731
        shapes["heads"] = jax.eval_shape(init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        stacked = "layers/" in path_of(path)
        found[_plain(leaf.shape[1:] if stacked else leaf.shape)] += leaf.shape[0] if stacked else 1
    return dict(found)


def _plain(dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted((size for size in dims if size != 1), reverse=True))


def _size(dims: Sequence[int]) -> int:
    return math.prod(dims)


__all__ = ["Collective", "collectives", "parameter_shapes", "warnings"]
