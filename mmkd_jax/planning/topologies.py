"""Slices of TPUs that can be had, and fake CPU devices, by name.

The TPU compiler checks that a layout can be divided, not that anyone sells it, and takes an empty name for two by two
chips of v2: names are held to what is on offer first (cloud.google.com/tpu/docs, and the device types of
github.com/AI-Hypercomputer/xpk).
"""

import dataclasses
import math
import re
from typing import Any

from mmkd_jax.errors import InputError, near

FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # beyond these, three multiples of four in ascending order
EXAMPLES = "v5e:16x16, v5litepod-256, v5p:4x4x4, v5p-128, cpu:8"


@dataclasses.dataclass(frozen=True)
class Generation:
    """What is on offer of one kind of TPU.

    Attributes:
      kind: `jax.Device.device_kind`.
      cloud: what Cloud's names begin with.
      cores: that those names count for a chip.
      devices: of JAX for a chip.
      largest: chips of the largest slice; 0 where the layouts are those of `FLAT`.
    """

    kind: str
    cloud: str
    cores: int
    devices: int
    largest: int


GENERATIONS = {
    "v4": Generation("TPU v4", "v4", 2, 1, 4096),
    "v5e": Generation("TPU v5 lite", "v5litepod", 1, 1, 0),
    "v5p": Generation("TPU v5", "v5p", 2, 1, 8960),
    "v6e": Generation("TPU v6 lite", "v6e", 1, 1, 0),
    "tpu7x": Generation("TPU7x", "tpu7x", 2, 2, 9216),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice, or fake CPU devices.

    Attributes:
      name: `v5e:16x16` or `cpu:8`.
      platform: `tpu` or `cpu`.
      kind: `jax.Device.device_kind`.
      devices: of JAX, in one slice.
      chips: in one slice.
      dimensions: of the torus; empty for CPUs.
      options: for `jax.experimental.topologies.get_topology_desc`.
    """

    name: str
    platform: str
    kind: str
    devices: int
    chips: int
    dimensions: tuple[int, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def find(name: str) -> Topology:
    """The topology that `name` means: `v5e:16x16`, Cloud's name for the same (`v5litepod-256`), or `cpu:8`.

    Raises:
      InputError: there is no such product; what there is near it is told.
    """
    text = name.strip().lower()
    if found := re.fullmatch(r"cpu:(\d+)", text):
        count = int(found[1])
        if not 0 < count <= 4096:
            raise InputError(f"topology {name!r}: ask for 1 to 4096 fake devices")
        return Topology(text, "cpu", "cpu", count, count)
    if found := re.fullmatch(r"([a-z]\w*):(\d+(?:x\d+)*)", text):
        return _slice(name, found[1], tuple(int(size) for size in found[2].split("x")))
    if found := re.fullmatch(r"([a-z]\w*)-(\d+)", text):
        return _of_cloud(name, found[1], int(found[2]))
    raise InputError(f"topology {name!r} is not a slice or devices; such as {EXAMPLES}")


def shapes(generation: str) -> list[tuple[int, ...]]:
    """All layouts of a generation, in chips, smallest first."""
    largest = GENERATIONS[generation].largest
    if not largest:
        return list(FLAT)
    sides = range(4, largest // 16 + 1, 4)
    found = [
        (a, b, c)
        for a in sides
        if a**3 <= largest
        for b in sides
        if b >= a and a * b * b <= largest
        for c in sides
        if c >= b and a * b * c <= largest
    ]
    return [*SMALL, *sorted(found, key=lambda shape: (math.prod(shape), sum(shape)))]


def _slice(name: str, generation: str, shape: tuple[int, ...]) -> Topology:
    if generation not in GENERATIONS:
        raise InputError(f"topology {name!r}: no TPU {generation!r}; {near(generation, GENERATIONS)}")
    known = shapes(generation)
    if shape not in known:
        chips, sorted_ = math.prod(shape), tuple(sorted(shape))
        close = sorted_ if sorted_ in known else min(known, key=lambda one: (abs(math.prod(one) - chips), sum(one)))
        raise InputError(f"topology {name!r} is not on offer; did you mean {generation}:{_layout(close)}?")
    of = GENERATIONS[generation]
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if len(shape) == 2 and shape <= (2, 4):
        options["chips_per_host_bounds"] = [*shape, 1]  # one host; the compiler takes four chips a host unless told
    chips = math.prod(shape)
    return Topology(f"{generation}:{_layout(shape)}", "tpu", of.kind, chips * of.devices, chips, shape, options)


def _of_cloud(name: str, prefix: str, count: int) -> Topology:
    by_name = {one.cloud: generation for generation, one in GENERATIONS.items()} | {"v5e": "v5e"}
    if prefix not in by_name:
        raise InputError(f"topology {name!r}: Cloud has no TPU {prefix!r}; {near(prefix, by_name)}")
    generation = by_name[prefix]
    cores = GENERATIONS[generation].cores
    fitting = [shape for shape in shapes(generation) if math.prod(shape) * cores == count]
    if not fitting:
        sizes = sorted({math.prod(shape) * cores for shape in shapes(generation)}, key=lambda size: abs(size - count))
        raise InputError(f"topology {name!r} is not on offer; near it are {prefix}-{sizes[0]} and {prefix}-{sizes[1]}")
    return _slice(name, generation, fitting[0])


def _layout(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
