"""What accelerators can do at most, by the name that JAX has for their kind.

A row describes one JAX device: a whole chip, but for TPU v2, v3 and 7x, where JAX sees each of a chip's two cores.
Figures are the vendors' own, dense bfloat16 (float16 where a GPU has no bfloat16), without sparsity, from
cloud.google.com/tpu/docs and the data sheets of nvidia.com; TPU links from jax-ml.github.io/scaling-book, memory of
TPUs as their compiler states it (libtpu 0.0.42 and 0.0.52). Nothing here was measured.
"""

import dataclasses
import re

GB, GIB = 1e9, 2.0**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One JAX device.

    Attributes:
      title: for people.
      pattern: regular expression of `jax.Device.device_kind`, not case-sensitive.
      flops: FLOP/s of matrix products in bfloat16; a fused multiply-add counts two.
      bandwidth: bytes/s of its memory.
      memory: bytes that a program may use: for TPUs what their compiler allows, else the vendor's size.
      network: bytes/s of the fast network: of a TPU one link, of a GPU all of them, both directions; 0 where unknown.
    """

    title: str
    pattern: str
    flops: float
    bandwidth: float
    memory: float
    network: float = 0.0


# The first pattern that matches wins, so that special cases stand before general ones.
DEVICES = (
    Device("TPU v2 (core)", r"^TPU v2", 22.5e12, 350 * GB, 7.48 * GIB),
    Device("TPU v3 (core)", r"^TPU v3", 61.5e12, 450 * GB, 15.48 * GIB, 200 * GB),
    Device("TPU v4", r"^TPU v4$", 275e12, 1228 * GB, 30.75 * GIB, 90 * GB),
    Device("TPU v5e", r"^TPU v5 ?(lite|e)", 197e12, 819 * GB, 15.75 * GIB, 90 * GB),
    Device("TPU v5p", r"^TPU v5p?$", 459e12, 2765 * GB, 95.73 * GIB, 180 * GB),
    Device("TPU v6e", r"^TPU v6 ?(lite|e)", 918e12, 1640 * GB, 31.24 * GIB, 180 * GB),
    Device("TPU 7x (core)", r"^TPU ?7x", 1153.5e12, 3690 * GB, 94.74 * GIB, 180 * GB),
    Device("GB200", r"GB200", 2500e12, 8000 * GB, 186 * GB, 1800 * GB),
    Device("B200", r"B200", 2250e12, 8000 * GB, 180 * GB, 1800 * GB),
    Device("GH200", r"GH200", 989.4e12, 4000 * GB, 96 * GB, 900 * GB),
    Device("H200", r"H200", 989.4e12, 4800 * GB, 141 * GB, 900 * GB),
    Device("H100 PCIe", r"H100 PCIe", 756e12, 2000 * GB, 80 * GB),
    Device("H100 NVL", r"H100 NVL", 835e12, 3900 * GB, 94 * GB, 600 * GB),
    Device("H100", r"H100", 989.4e12, 3350 * GB, 80 * GB, 900 * GB),
    Device("A100 80 GB", r"A100.*80GB", 312e12, 2039 * GB, 80 * GB, 600 * GB),
    Device("A100 40 GB", r"A100", 312e12, 1555 * GB, 40 * GB, 600 * GB),
    Device("L40S", r"L40S", 362e12, 864 * GB, 48 * GB),
    Device("L4", r"L4$", 121e12, 300 * GB, 24 * GB),
    Device("A10G", r"A10G", 70e12, 600 * GB, 24 * GB),
    Device("A10", r"A10$", 125e12, 600 * GB, 24 * GB),
    Device("V100 (float16)", r"V100", 125e12, 900 * GB, 16 * GB, 300 * GB),
    Device("T4 (float16)", r"T4$", 65e12, 320 * GB, 16 * GB),
)


def of_kind(kind: str) -> Device | None:
    """The row of a `jax.Device.device_kind`, such as `TPU v5 lite` or `NVIDIA H200`; None for CPUs and the unknown."""
    return next((one for one in DEVICES if re.search(one.pattern, kind, re.IGNORECASE)), None)
