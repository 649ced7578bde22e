"""What stage 2 regresses to: stored teacher features, mapped to where the student can meet them."""

import dataclasses
import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mmkd_jax.errors import InputError, near
from mmkd_jax.tasks.maps import TargetMap

DROPPING = 1  # tells these draws from those of `draw_teacher`


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherTarget:
    """A teacher as stage 2 sees it.

    Attributes:
      name: the teacher's name; heads, maps and draws are keyed by it.
      width: width of its stored features.
      space: `native` (the teacher's own, unit norm) or `projected` (already at the student's width).
      scale: its exponentiated logit scale: the inverse temperature of its own similarities.
      image_mean: mean of its unit image features, float32 `[width]`.
      text_mean: the same for text.
      map: to what is regressed to; None for the recipe's own way.
    """

    name: str
    width: int
    space: str
    scale: float
    image_mean: np.ndarray
    text_mean: np.ndarray
    map: TargetMap | None = None

    @property
    def out(self) -> int:
        """Width of its targets."""
        return self.map.out if self.map else self.width


def name_key(seed: int, name: str) -> jax.Array:
    """A key that depends on the teacher's name and not on which other teachers there are."""
    return jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(name.encode())))


def seeded_map(name: str, width: int, embed: int) -> jax.Array:
    """A fixed linear map `[width, embed]` for a teacher, the same for image and text.

    Gaussian with variance 1 / embed: it keeps lengths in expectation, and the images of different teachers' spaces
    are nearly orthogonal, as those of the authors' trained affine maps were measured to be (their published samples:
    cosine between teachers -0.07 to 0.21).
    """
    return jax.random.normal(name_key(0, name), (width, embed), jnp.float32) / math.sqrt(embed)


def joint_target(teacher: TeacherTarget, tower: str, features: jax.Array, embed: int) -> jax.Array:
    """A teacher's features float32 `[n, width]` at the student's width, `[n, embed]`, not at unit norm."""
    if teacher.map:
        return teacher.map.apply(tower, features)
    if teacher.space == "projected":
        return features
    matrix = seeded_map(teacher.name, teacher.width, embed)
    return jnp.matmul(features, matrix, precision=jax.lax.Precision.HIGHEST)


def draw_teacher(present: Mapping[str, jax.Array], seed: int, step: jax.Array) -> dict[str, jax.Array]:
    """One teacher a sample, uniformly among those present, fresh at each step: one-hot float32 `[n]` by name.

    Each teacher gets its own noise, keyed by its name, and the largest wins: taking a teacher away changes the draw
    only where it had won.
    """
    names = sorted(present)
    noise = [
        jnp.where(
            present[name],
            jax.random.uniform(jax.random.fold_in(name_key(seed, name), step), present[name].shape),
            -1.0,
        )
        for name in names
    ]
    winner = jnp.argmax(jnp.stack(noise), axis=0)
    return {name: ((winner == i) & present[name]).astype(jnp.float32) for i, name in enumerate(names)}


def drop_teachers(
    weights: Mapping[str, jax.Array], losses: Mapping[str, jax.Array], rate: float, seed: int, step: jax.Array
) -> dict[str, jax.Array]:
    """Weights `[n]` by teacher with some left out at random: of each sample the hardest stays, others go at `rate`.

    The hardest is the teacher of the largest loss among those of positive weight (UNIC, arXiv 2408.05088). What stays
    is scaled to the sum that all had. Draws are keyed by name, as in `draw_teacher`.

    Args:
      weights: float32 `[n]`, at least 0.
      losses: float32 `[n]`; they choose, and are not differentiated.
      rate: chance of each other teacher to be left out.
      seed: of the draws.
      step: of the run, int32.
    """
    names = sorted(weights)
    given = jnp.stack([weights[name] for name in names])
    hard = jnp.stack([jax.lax.stop_gradient(losses[name]) for name in names])
    hardest = jnp.argmax(jnp.where(given > 0, hard, -jnp.inf), axis=0)
    keys = [jax.random.fold_in(jax.random.fold_in(name_key(seed, name), step), DROPPING) for name in names]
    drawn = jnp.stack([jax.random.uniform(key, given.shape[1:]) for key in keys]) >= rate
    kept = jnp.where(drawn | (jnp.arange(len(names))[:, None] == hardest), given, 0.0)
    kept = kept * (jnp.sum(given, axis=0) / jnp.maximum(jnp.sum(kept, axis=0), 1e-9))
    return dict(zip(names, kept, strict=True))


def routing_table(
    table: Mapping[str, Mapping[str, float]] | None, modalities: list[str], teachers: list[str]
) -> np.ndarray:
    """Weights float32 `[modalities, teachers]` from `{modality: {teacher: weight}}`; all ones without a table.

    A modality that the table leaves out gets all teachers alike.

    Raises:
      InputError: the table names a teacher that has no features here, or none of these modalities.
    """
    if table and not set(table) & set(modalities):
        raise InputError(f"the routing table has none of the pairs' modalities; {near(next(iter(table)), modalities)}")
    weights = np.ones((len(modalities), len(teachers)), np.float32)
    for m, modality in enumerate(modalities):
        row = (table or {}).get(modality)
        if row is None:
            continue
        for name in row:
            if name not in teachers:
                raise InputError(f"the routing table names teacher {name!r}, without features; {near(name, teachers)}")
        weights[m] = [row.get(name, 0.0) for name in teachers]
    return weights
