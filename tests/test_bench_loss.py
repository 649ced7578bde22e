"""`mmkd bench loss`: what it prints follows from programs that run; the ring's memory at the largest batch."""

import jax
import pytest

from mmkd_jax import cli
from mmkd_jax.losses import bench

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_memory_and_time_of_each_batch(capsys):
    assert cli.main(["bench", "loss", "--batches", "128", "64", "--timed", "64", "--rounds", "2", "--once"]) == 0
    setting, *header, timed, compiled, once = capsys.readouterr().out.splitlines()
    assert "8 fake devices" in setting
    assert "\n".join(header) == bench.HEADER
    assert timed.split()[:2] == ["softmax", "64"]
    assert compiled.split()[:2] == ["softmax", "128"]
    assert len(compiled.split()) == 6
    assert len(timed.split()) == 6 + 3 * 2 + 2  # three medians with their spreads, and two ratios
    assert all(float(x) > 0 for x in (*compiled.split()[2:], *timed.split()[2:6], *timed.split()[-2:]))
    assert once.startswith("softmax as a ring at 128: ")


def test_memory_is_what_the_program_holds():
    """A known program: 4 MiB in, 4 MiB out, and the square between that an optimiser cannot leave out."""
    x = jax.ShapeDtypeStruct((1024, 1024), "float32")
    compiled = jax.jit(lambda x: jax.lax.sort(x @ x, dimension=0) @ x).lower(x).compile()
    assert 12 <= bench.memory(compiled) <= 20


@pytest.mark.parametrize(
    "name", ["softmax", *(pytest.param(name, marks=pytest.mark.full) for name in bench.LOSSES if name != "softmax")]
)
def test_the_ring_needs_at_most_a_tenth_of_the_memory(name):
    (line,) = bench.measure([name], [32_768], 0, 1)
    plain, rows, ring = map(float, line.split()[2:5])
    assert ring <= 0.1 * plain
    assert rows > 10 * ring  # which holds its rows against all columns


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--losses", "sofmax"], "did you mean 'softmax'"),
        (["--batches", "12"], "a batch of 12 cannot be divided over 8 devices"),
        (["--batches", "0"], "a batch of 0 cannot be divided over 8 devices"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, says):
    assert cli.main(["bench", "loss", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
