"""Which patches of a picture a ViT sees, where it is not all of them."""

import jax
import jax.numpy as jnp

from mmkd_jax.errors import InputError
from mmkd_jax.models import draws
from mmkd_jax.specs import ImageTower


def draw(key: jax.Array, n: int, tower: ImageTower, dropped: float) -> jax.Array:
    """Of each of `n` pictures a random choice without the share `dropped`, at least one patch: int32 `[n, K]`."""
    whole = (tower.image_size // tower.patch) ** 2
    noise = draws.bits(key, (n, whole), jnp.uint32)
    return jnp.argsort(noise, axis=1)[:, : max(1, round(whole * (1 - dropped)))]


def check(dropped: float, tower: ImageTower) -> None:
    """Refuses a share that is not within [0, 1), and any but 0 for a tower without patches.

    Raises:
      InputError: see above.
    """
    if not 0.0 <= dropped < 1.0:
        raise InputError(f"the share of patches to drop is {dropped}; it must be at least 0 and less than 1")
    if dropped and tower.kind != "vit":
        raise InputError(f"{tower.kind} towers cannot leave patches out; only a vit can")
