"""What the forms of global losses cost: the compiler's memory a device, and time, on fake devices of one CPU.

On such devices nothing is sent over a network; times compare what the forms compute, not what they communicate.
"""

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmkd_jax import timing
from mmkd_jax.errors import InputError, near
from mmkd_jax.losses import contrastive, distill, forms
from mmkd_jax.losses.base import Inputs, normalise
from mmkd_jax.models import constraints

DEVICES, WIDTH = 8, 512
BATCHES, LARGEST_TIMED = (1024, 2048, 4096, 8192, 16384, 32768), 8192
LOSSES = contrastive.LOSSES | {name: distill.LOSSES[name] for name in ("interactive", "affinity")}
HEADER = (
    f"{'MiB a device':>29}{'':32}   seconds\n"
    f"{'loss':<12} {'batch':>6}  {' '.join(f'{form:>9}' for form in forms.FORMS)} {'ring/plain':>11}   "
    f"{' '.join(f'{form:<18}' for form in forms.FORMS)} ring/plain  by processor time"
)


def fake_devices() -> list[jax.Device]:
    """Eight devices of the CPU, asked for before JAX starts.

    Raises:
      InputError: JAX started with fewer.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # it started before
            jax.config.update("jax_num_cpu_devices", DEVICES)
    found = jax.devices("cpu")
    if len(found) < DEVICES:
        raise InputError(f"JAX has {len(found)} CPU devices, {DEVICES} are needed; unset XLA_FLAGS")
    return found[:DEVICES]


def program(name: str, form: str, mesh: Mesh) -> Callable:
    """Value and gradients of a loss of (image, text, target_image, target_text, weight), jitted for `mesh`."""

    def loss(live, target_image, target_text, weight):
        image, text, scale = live
        return LOSSES[name](Inputs(image, text, target_image, target_text, weight, scale, 50.0, -5.0), form)

    return jax.jit(constraints.under(mesh, jax.value_and_grad(loss)))


def memory(compiled: Any) -> float:
    """MiB that a compiled program needs on each device: arguments, results and what lies between."""
    found = compiled.memory_analysis()
    sizes = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return (sizes - found.alias_size_in_bytes) / 2**20


def measure(names: Sequence[str], batches: Sequence[int], largest_timed: int, rounds: int) -> Iterator[str]:
    """A line for each loss and batch, timed up to a batch of `largest_timed`.

    Raises:
      InputError: an unknown loss, or a batch that eight devices cannot divide.
    """
    mesh = Mesh(np.reshape(fake_devices(), (DEVICES, 1, 1)), constraints.AXES)
    for name in names:
        if name not in LOSSES:
            raise InputError(f"unknown loss {name!r}; {near(name, LOSSES)}")
        for n in batches:
            if n < DEVICES or n % DEVICES:
                raise InputError(f"a batch of {n} cannot be divided over {DEVICES} devices; make it a multiple")
            inputs = _shapes(n, mesh)
            compiled = {form: program(name, form, mesh).lower(*inputs).compile() for form in forms.FORMS}
            sizes = [memory(compiled[form]) for form in forms.FORMS]
            line = f"{name:<12} {n:>6}  {' '.join(f'{size:9.1f}' for size in sizes)} {sizes[-1] / sizes[0]:11.3f}"
            yield line + (f"   {_times(compiled, _values(n, mesh), rounds)}" if n <= largest_timed else "")


def report(names: Sequence[str], batches: Sequence[int], largest_timed: int, rounds: int, *, once: bool) -> None:
    """Prints what `mmkd bench loss` prints; see `measure`.

    Raises:
      InputError: as `measure`, or fewer rounds than one.
    """
    if rounds < 1:
        raise InputError(f"--rounds must be at least 1, not {rounds}")
    batches = sorted(batches or BATCHES)
    print(setting())
    print(HEADER)
    for line in measure(names, batches, largest_timed, rounds):
        print(line, flush=True)
    for name in names if once else ():
        print(run_ring(name, batches[-1]), flush=True)


def run_ring(name: str, n: int) -> str:
    """Runs the ring once at batch `n`."""
    mesh = Mesh(np.reshape(fake_devices(), (DEVICES, 1, 1)), constraints.AXES)
    compiled = program(name, "ring", mesh).lower(*_shapes(n, mesh)).compile()
    inputs = _values(n, mesh)
    begin = time.perf_counter()
    value, (of_image, _, _) = jax.block_until_ready(compiled(*inputs))
    seconds = time.perf_counter() - begin
    norm = float(jnp.linalg.norm(of_image))
    return f"{name} as a ring at {n}: {seconds:.1f} s, loss {value:.4f}, norm of the images' gradient {norm:.4g}"


def setting() -> str:
    """What was measured where."""
    cores = len(os.sched_getaffinity(0))
    machine = f"{platform.machine()}, {cores} cores, jax {jax.__version__}"
    return f"loss and gradients, float32, width {WIDTH}, {DEVICES} fake devices of one CPU ({machine})"


def _times(compiled: dict[str, Callable], inputs: tuple, rounds: int) -> str:
    """Seconds of each form turn by turn, and the ring's share of plain's: by the clock, and of the processor's time."""
    seconds: dict[str, list[float]] = {form: [] for form in compiled}
    processor: dict[str, list[float]] = {form: [] for form in compiled}
    for number in range(rounds + 1):
        for form, call in compiled.items():
            begin, begin_processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(call(*inputs))
            if number:  # not the first
                seconds[form].append(time.perf_counter() - begin)
                processor[form].append(time.process_time() - begin_processor)
    by_clock, of_processor = (
        statistics.median(of["ring"]) / statistics.median(of["plain"]) for of in (seconds, processor)
    )
    spreads = " ".join(f"{timing.spread(seconds[form]):<18}" for form in forms.FORMS)
    return f"{spreads} {by_clock:10.2f} {of_processor:18.2f}"


def _shapes(n: int, mesh: Mesh) -> tuple:
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((constraints.BATCH_AXES,), ()))
    x = jax.ShapeDtypeStruct((n, WIDTH), jnp.float32, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    return (x, x, scale), x, x, jax.ShapeDtypeStruct((n,), jnp.float32, sharding=rows)


def _values(n: int, mesh: Mesh) -> tuple:
    """Pairs that resemble each other, and targets that resemble the pairs."""
    rng = np.random.default_rng(0)
    common, *noise = (rng.standard_normal((n, WIDTH), np.float32) for _ in range(5))
    features = [np.asarray(normalise(common + part)) for part in noise]
    given = (features[0], features[1], np.float32(20.0)), *features[2:], np.ones(n, np.float32)
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), given, _shapes(n, mesh))
