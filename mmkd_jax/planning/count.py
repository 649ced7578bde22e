"""What one run of a compiled program does on one device: FLOPs, estimated cycles, collectives; loops taken as often
as they run.

FLOPs are those of matrix products and convolutions, a multiply-add counts two, products with padding do not count.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from mmkd_jax.planning import hlo
from mmkd_jax.planning.hlo import Array, Computation, HloError, Instruction, Module

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast", "send",
)  # fmt: skip
# Custom calls that compute nothing, or what is told otherwise.
SILENT = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
    "GatherScatterIndicesBitpacked", "NopReturnToken", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape",
    "MoveToDevice", "MoveToHost", "SliceId", "ZeroCrop", "annotate_device_placement", "X64Combine", "X64SplitLow",
    "X64SplitHigh",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """A kind of exchange: which, over which mesh axes, of what type, of arrays of which size, within a loop or not."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    dims: tuple[int, ...]
    looped: bool
    asynchronous: bool


@dataclasses.dataclass
class Totals:
    """What is counted.

    Attributes:
      flops: of matrix products and convolutions.
      cycles: the compiler's own estimates, of what it has one for: collectives, copies and kernels have none.
      collectives: number of arrays exchanged, by what is exchanged.
      hidden: number of custom calls whose cost is not told, by target.
    """

    flops: int = 0
    cycles: int = 0
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    hidden: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Totals", times: int = 1, looped: bool = False) -> None:
        """Adds another's, `times` over; `looped`: within a loop."""
        self.flops += times * other.flops
        self.cycles += times * other.cycles
        for one, number in other.collectives.items():
            self.collectives[dataclasses.replace(one, looped=one.looped or looped)] += times * number
        for target, number in other.hidden.items():
            self.hidden[target] += times * number


def count(text: str, mesh: Mapping[str, int]) -> Totals:
    """What the program of `text` does on one device.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
      mesh: sizes of its axes, in order; collectives are told by them.

    Raises:
      HloError: the text does not say how often a loop runs, or is not understood.
    """
    module = hlo.parse(text)
    return _Counter(module, dict(mesh)).totals(module.entry)


class _Counter:
    def __init__(self, module: Module, mesh: dict[str, int]):
        self.module, self.mesh, self.known = module, mesh, {}

    def totals(self, name: str, fused: bool = False) -> Totals:
        key = name, fused
        if key not in self.known:
            if name not in self.module.computations:
                raise HloError(f"the program calls {name}, which its text lacks")
            self.known[key] = self._computation(self.module.computations[name], fused)
        return self.known[key]

    def _computation(self, where: Computation, fused: bool) -> Totals:
        found = Totals()
        targets = {_target(one) for one in where.values()}
        # What a collective is carried out beside holds a copy of it; the one that starts it counts.
        copies = fused and "AsyncCollectiveStart" not in targets
        for one in where.values():
            if not fused and (cycles := re.search(r'"estimated_cycles":"(\d+)"', one.attributes)):
                found.cycles += int(cycles[1])
            if one.opcode == "dot":
                found.flops += dot_flops(where, one)
            elif one.opcode == "convolution":
                found.flops += convolution_flops(where, one)
            elif one.opcode.removesuffix("-start") in COLLECTIVES:
                if not (copies and "chain_id" in one.attributes) and "AsyncCollectiveDone" not in targets:
                    started = one.opcode.endswith("-start") or "AsyncCollectiveStart" in targets
                    found.collectives.update(self._collective(where, one, started))
            elif one.opcode == "custom-call" and _target(one) not in SILENT:
                found.hidden[_target(one)] += 1
            else:
                self._called(where, one, found, fused)
        return found

    def _called(self, where: Computation, one: Instruction, found: Totals, fused: bool) -> None:
        if one.opcode == "while":
            found.add(self.totals(one.calls("body")), hlo.trip_count(self.module, where, one), looped=True)
        elif one.opcode == "fusion":
            found.add(self.totals(one.calls("calls"), fused=True))
        elif one.opcode == "call":
            found.add(self.totals(one.calls("to_apply"), fused))
        elif one.opcode == "async-start":
            found.add(self.totals(one.calls("calls"), fused))
        elif one.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
            names = [name.strip().removeprefix("%") for name in branches[1].split(",")] if branches else []
            names = names or [one.calls("true_computation"), one.calls("false_computation")]
            found.add(max((self.totals(name, fused) for name in names), key=lambda totals: totals.flops))

    def _collective(self, where: Computation, one: Instruction, started: bool) -> collections.Counter:
        kind = one.opcode.removesuffix("-start")
        axes = ("slices",) if kind == "send" else _axes(one.attributes, self.mesh)
        if kind in ("all-reduce", "reduce-scatter", "send"):  # what goes in: as large as what is exchanged
            names = one.operands[:1] if kind == "send" else one.operands
            arrays = [array for name in names for array in where[name].results]
        elif one.opcode.endswith("-start"):  # its results are operands, results and whatever else it keeps
            count = len(one.operands)
            arrays = [array for array in one.results if array.dtype != "token"][count : 2 * count]
        else:
            arrays = list(one.results)
        return collections.Counter(Collective(kind, axes, x.dtype, x.dims, False, started) for x in arrays)


def _target(one: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', one.attributes)
    return found[1] if found else ""


def _operand(where: Computation, one: Instruction, number: int) -> Array:
    return where[one.operands[number]].results[0]


def _listed(attributes: str, key: str) -> list[int]:
    found = re.search(rf"\b{key}=\{{([\d,]*)\}}", attributes)
    return [int(number) for number in found[1].split(",") if number] if found else []


def dot_flops(where: Computation, one: Instruction) -> int:
    """Of a `dot`: twice the results times the contracted dimensions."""
    left = _operand(where, one, 0)
    return 2 * one.results[0].size * math.prod(left.dims[d] for d in _listed(one.attributes, "lhs_contracting_dims"))


def convolution_flops(where: Computation, one: Instruction) -> int:
    """Of a `convolution`, which is also what a TPU's compiler makes of matrix products."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if labels is None:
        raise HloError(f"the convolution {one.name} does not say its dimensions")
    left, kernel, out = _operand(where, one, 0), _operand(where, one, 1), one.results[0]
    by = [dict(zip(names, x.dims, strict=True)) for names, x in zip(labels.groups(), (left, kernel, out), strict=True)]
    window = _window(one.attributes)
    pairs = 1
    for place, label in enumerate(sorted(letter for letter in labels[3] if letter.isdigit())):
        options = {key: values[place] for key, values in window.items() if len(values) > place}
        pairs *= _pairs(by[0][label], by[1][label], by[2][label], **options)
    return 2 * by[2]["b"] * by[2]["f"] * by[1]["i"] * pairs


def _window(attributes: str) -> dict[str, list]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    values = {}
    for part in found[1].split() if found else ():
        key, _, text = part.partition("=")
        if key == "pad":
            values["pad"] = [int(entry.split("_")[0]) for entry in text.split("x")]
        elif key in ("stride", "lhs_dilate", "rhs_dilate"):
            values[key] = [int(entry) for entry in text.split("x")]
    return values


@functools.lru_cache(maxsize=4096)
def _pairs(
    size: int, kernel: int, out: int, stride: int = 1, pad: int = 0, lhs_dilate: int = 1, rhs_dilate: int = 1
) -> int:
    """Number of pairs of an output and a kernel's place that meet an input, and neither padding nor a gap."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * rhs_dilate - pad
    return int(np.sum((at >= 0) & (at <= (size - 1) * lhs_dilate) & (at % lhs_dilate == 0)))


def _axes(attributes: str, mesh: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes that the devices of one exchange differ in."""
    sizes = tuple(mesh.values())
    group = _group(attributes, math.prod(sizes))
    if group is None:
        return ("?",)
    places = np.stack(np.unravel_index(np.asarray(group), sizes), axis=1)
    return tuple(axis for axis, column in zip(mesh, places.T, strict=True) if len(set(column.tolist())) > 1)


def _group(attributes: str, devices: int) -> list[int] | None:
    """Numbers of the devices of the first group; None where they are not told."""
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return [int(found[1]), int(found[2])]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        numbers = _listed_devices(found[2] or "", math.prod(sizes.values())).reshape(tuple(sizes.values()))
        named = re.findall(r"'([^']+)'", found[3])
        chosen = tuple(slice(None) if name in named else 0 for name in sizes)
        return numbers[chosen].reshape(-1).tolist()
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape = [int(size) for size in found[3].split(",")]
        numbers = np.arange(math.prod(shape)).reshape(shape)
        if found[4]:
            numbers = numbers.transpose([int(axis) for axis in found[4].split(",")])
        return numbers.reshape(int(found[1]), int(found[2]))[0].tolist()
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(number) for number in found[1].split(",")]
    return list(range(devices)) if "replica_groups={}" in attributes else None


def _listed_devices(text: str, count: int) -> np.ndarray:
    """Device numbers `[count]` in the order that `[2,4]T(1,0)` says: counted up in that shape, then transposed."""
    shape = re.match(r"\[([\d,]+)\](?:T\(([\d,]+))?", text)
    if shape is None:
        return np.arange(count)
    numbers = np.arange(count).reshape([int(size) for size in shape[1].split(",")])
    return (numbers.transpose([int(axis) for axis in shape[2].split(",")]) if shape[2] else numbers).reshape(-1)
