"""From counts to time: a range, with what each end rests on. Nothing of it was measured on the devices."""

import math
from collections.abc import Mapping
from typing import Any

from mmkd_jax.planning import devices
from mmkd_jax.planning.count import Collective, Totals
from mmkd_jax.planning.topologies import Topology

# Cycles a second that follow from peak FLOP/s and the size of the matrix units; the compiler does not state them.
CLOCKS = {"TPU v4": 1.05e9, "TPU v5 lite": 1.5e9, "TPU v5": 1.75e9, "TPU v6 lite": 1.75e9}
BETWEEN_SLICES = 6.25e9  # bytes/s a chip between slices: 200 Gbit/s of a host with four chips
RESTS_ON = {
    "low": "the larger of counted FLOPs at the vendor's peak and collectives at the links' rate, all else hidden",
    "high": "the compiler's own cycle estimates, one after another, and collectives that overlap with nothing",
}


def seconds(totals: Totals, topology: Topology, mesh: Mapping[str, int]) -> dict[str, Any] | None:
    """Seconds of a step: `low`, `high` and their parts; None where nothing is known of the devices (fake ones).

    `high` is None for devices whose clock is not known.
    """
    device = devices.of_kind(topology.kind)
    if device is None:
        return None
    compute, network = totals.flops / device.flops, sum(
        number * _exchange(one, topology, mesh, device.network) for one, number in totals.collectives.items()
    )  # fmt: skip
    clock = CLOCKS.get(topology.kind)
    cycles = totals.cycles / clock if clock else None
    high = cycles + network if cycles is not None else None
    low = max(compute, network)
    return {"low": low, "high": high and max(low, high), "flops": compute, "network": network, "cycles": cycles}


def moved(one: Collective, mesh: Mapping[str, int]) -> float:
    """Bytes that a device sends for one exchange: what goes once round a ring."""
    ways = math.prod(mesh[axis] for axis in one.axes if axis in mesh) or 1
    size = size_of(one)
    if one.kind in ("send", "collective-permute"):
        return size
    return size * (ways - 1) / max(ways, 1) * (2 if one.kind == "all-reduce" else 1)


def size_of(one: Collective) -> float:
    """Bytes of the array that is exchanged: of the result, or of what goes into a reduction."""
    from mmkd_jax.planning.hlo import Array

    return Array(one.dtype, one.dims).bytes


def _exchange(one: Collective, topology: Topology, mesh: Mapping[str, int], link: float) -> float:
    if one.kind == "send":
        return size_of(one) / BETWEEN_SLICES
    ways = math.prod(mesh[axis] for axis in one.axes if axis in mesh)
    sides = [side for side in topology.dimensions if side > 1]
    # An axis as large as some sides of the torus together runs round all of these at once.
    used = next((n for n in range(1, len(sides) + 1) if math.prod(sides[-n:]) >= ways), max(1, len(sides)))
    return moved(one, mesh) / (used * link)


def run(
    spent: Mapping[str, Any] | None,
    flops_of_pair: float,
    batch: int,
    steps: int | None,
    topology: Topology,
    slices: int,
) -> dict[str, Any] | None:
    """What a step's range means: pairs a second, utilisation, and hours of devices for all steps, as `[low, high]`.

    Args:
      spent: of `seconds`.
      flops_of_pair: useful ones, of `flops.model_flops`.
      batch: pairs in a step.
      steps: of the whole run; None leaves the hours out.
      topology: of one slice.
      slices: how many.
    """
    if spent is None:
        return None
    count, peak = topology.devices * slices, devices.of_kind(topology.kind).flops
    both = [spent["high"], spent["low"]]
    rate = [batch / x if x else None for x in both]
    used = [batch * flops_of_pair / (count * peak * x) if x else None for x in both]
    hours = None
    if steps is not None:
        hours = [x and steps * x * topology.chips * slices / 3600 for x in reversed(both)]
    return {"pairs_per_second": rate, "utilisation": used, "chip_hours": hours, "steps": steps}
