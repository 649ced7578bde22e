"""What nine stored teachers add to a step of stage 1: FLOPs counted in the traced programs, and the host's time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmkd_jax import cli
from mmkd_jax import config as configs
from mmkd_jax.planning import flops
from teachers import costs, overhead


def counted(function, *arguments) -> float:
    return overhead.count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_products_are_counted_wherever_they_stand():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    once = 2 * 3 * 5 * 7
    assert counted(jnp.matmul, a, b) == once
    assert counted(jax.jit(lambda a, b: jax.checkpoint(jnp.matmul)(a, b)), a, b) == once
    assert counted(lambda a, b: jax.lax.scan(lambda c, _: (c, a @ b), 0.0, None, length=4)[1], a, b) == 4 * once
    assert counted(lambda a, b: jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: jnp.zeros((3, 7))), a, b) == once
    assert counted(lambda a, b: jax.vmap(lambda x: x @ b)(jnp.stack([a, a])), a, b) == 2 * once
    assert counted(jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), argnums=(0, 1)), a, b) == 3 * once
    assert counted(lambda a: jnp.exp(a) + a, a) == 0
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((4, 4, 3, 6))
    names = ("NHWC", "HWIO", "NHWC")

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (4, 4), "VALID", dimension_numbers=names)

    assert counted(convolve, x, kernel) == 2 * (2 * 2 * 2 * 6) * (4 * 4 * 3)
    with pytest.raises(NotImplementedError):
        counted(lambda a, b: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + (a @ b).sum(), a), a, b)


@pytest.mark.parametrize(
    "recipe", ["plus", *(pytest.param(name, marks=pytest.mark.full) for name in overhead.RECIPES if name != "plus")]
)
def test_nine_teachers_add_at_most_three_percent(recipe):
    found = overhead.flops(recipe)
    assert 0 < found.share <= 0.03
    config = configs.load(f"{overhead.CONFIGS}/stage1_clip.py", ["--config.remat=none"])
    np.testing.assert_allclose(found.stage1, flops.model_flops(config), rtol=0.02)  # in closed form


def test_the_share_grows_with_what_teachers_add():
    few, many = overhead.Overhead("x", 100.0, 2.0), overhead.Overhead("x", 100.0, 5.0)
    assert (few.share, many.share) == (0.02, 0.05)
    assert "(5.00%)" in str(many)


@pytest.mark.full
def test_the_host_adds_at_most_thirty_milliseconds():
    """For 1,000 pairs, of the processor; the least of some rounds, since others' work makes it longer."""
    assert 0 < min(overhead.host(4 * costs.BATCH, 5)) <= 30.0


@pytest.mark.parametrize("arguments", [["--rows", "1023"], ["--rounds", "0"]])
def test_too_little_to_measure_is_one_line(capsys, arguments):
    assert cli.main(["bench", "distill", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"{arguments[0]} must be at least" in error
    assert error.count("\n") == 1
