"""Stage 2: the student learns from stored features of many teachers, beside its own contrastive loss."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmkd_jax.errors import InputError, near
from mmkd_jax.losses import distill as losses
from mmkd_jax.losses.base import Inputs, normalise, similarity
from mmkd_jax.models import heads
from mmkd_jax.specs import ModelSpec
from mmkd_jax.tasks import patches, targets
from mmkd_jax.tasks.base import Batch, Features, Params
from mmkd_jax.tasks.clip import ClipTask

RELEASED_ICL_SCALE = math.log(1 / 0.07)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The switches of stage 2.

    Attributes:
      target: `random` (one teacher a sample a visit), `mean` (over the sample's teachers), both at the student's
        width; or `heads` (each teacher in its own space, through a head of the student's).
      task_weight: weight of the contrastive loss on the pairs themselves.
      feature_weight: weight of the feature loss: a mean square for `random` and `mean`, 1 - cosine for `heads`.
      icl_weight: weight of interactive contrastive learning (`random` and `mean` only).
      icl_trained: False keeps its scale at ln(1 / 0.07) without exponentiating, as released; True exponentiates and
        trains it.
      affinity_weight: weight of each teacher's affinity divergence (`heads` only).
      affinity_scale: inverse temperature of the teachers' affinities; 0 takes each teacher's own.
      centre: subtract the teacher's mean feature before normalising (`heads` only).
      head: `linear` or `mlp`.
      teacher_drop: of each sample's teachers the hardest stays in the feature loss, each other is left out with this
        chance (`heads` only).
      smooth_l1: the share of smooth-L1 in the feature loss of `heads`, the rest being 1 - cosine; UNIC has 0.5
        (arXiv 2408.05088).
      mask: the feature loss of `random` and `mean` looks at pictures without this share of their patches, masked
        feature distillation (CLIP-KD eq. 12, where it is 0.75); 0: at whole ones.
    """

    target: str = "random"
    task_weight: float = 1.0
    feature_weight: float = 50.0
    icl_weight: float = 1.0
    icl_trained: bool = False
    affinity_weight: float = 0.0
    affinity_scale: float = 0.0
    centre: bool = False
    head: str = "linear"
    teacher_drop: float = 0.0
    smooth_l1: float = 0.0
    mask: float = 0.0

    def __post_init__(self):
        if self.target not in ("random", "mean", "heads"):
            raise InputError(f"recipe target {self.target!r}: {near(self.target, ('random', 'mean', 'heads'))}")
        if self.head not in heads.KINDS:
            raise InputError(f"recipe head {self.head!r}: {near(self.head, heads.KINDS)}")
        for name, what in (("teacher_drop", "chance"), ("smooth_l1", "share")):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"recipe {name} is {getattr(self, name)}, not a {what} between 0 and 1")
        for name, where in (("teacher_drop", ("heads",)), ("smooth_l1", ("heads",)), ("mask", ("random", "mean"))):
            if getattr(self, name) and self.target not in where:
                raise InputError(f"recipe {name} has no meaning for target {self.target}; it is for {', '.join(where)}")


class DistillTask(ClipTask):
    """Contrastive loss plus what the recipe asks of the teachers.

    Args:
      spec: the student.
      teachers: those with features.
      recipe: the switches.
      routing: float32 `[modalities, teachers]`, teachers in sorted order of name (`heads` only); a teacher of weight 0
        for every modality is left out, with its heads.
      seed: of the draws.
      student: what `ClipTask` takes beside.
    """

    def __init__(
        self,
        spec: ModelSpec,
        teachers: Sequence[targets.TeacherTarget],
        recipe: Recipe,
        routing: np.ndarray,
        *,
        seed: int,
        **student: Any,
    ):
        super().__init__(spec, **student)
        self.teachers = sorted(teachers, key=lambda teacher: teacher.name)
        self.recipe = recipe
        self.routing = np.asarray(routing, np.float32)
        self.seed = seed
        patches.check(recipe.mask, spec.image)
        if recipe.target == "heads":
            believed = self.routing.any(axis=0)
            self.teachers = [teacher for teacher, kept in zip(self.teachers, believed, strict=True) if kept]
            self.routing = self.routing[:, believed]
        if not self.teachers:
            raise InputError("stage 2 has no teacher: name at least one feature set with a weight above 0")
        if recipe.target != "heads":
            for teacher in self.teachers:
                if (teacher.map or teacher.space == "projected") and teacher.out != spec.embed:
                    what = "targets" if teacher.map else "projected features"
                    raise InputError(f"{what} of {teacher.name} are {teacher.out} wide, the student {spec.embed}")

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        """The student, and the recipe's own: `heads/TEACHER/TOWER/...` or `icl_scale`."""
        params, extra = super().init(key)
        if self.recipe.target == "heads":
            widths = {teacher.name: teacher.out for teacher in self.teachers}
            params["heads"] = heads.init(key, widths, self.model.spec.embed, self.recipe.head)
        elif self.recipe.icl_trained:
            params["icl_scale"] = jnp.asarray(RELEASED_ICL_SCALE, jnp.float32)
        return params, extra

    def encode(self, params: Params, extra: dict, batch: Batch, key: jax.Array, step: jax.Array) -> Features:
        """As stage 1; pictures once more without some of their patches where the recipe masks."""
        features = super().encode(params, extra, batch, key, step)
        if not self.recipe.mask:
            return features
        image, image_key = self._pixels(batch), jax.random.split(key)[0]
        kept = patches.draw(jax.random.fold_in(image_key, 1), len(image), self.model.spec.image, self.recipe.mask)
        return features._replace(masked=normalise(self.model.encode_image(params, image, key=image_key, kept=kept)))

    def objective(
        self, params: Params, features: Features, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], dict]:
        """Task loss and distillation; reports are unweighted."""
        batch = {**batch, "targets": jax.tree.map(_widened, batch["targets"])}
        if self.recipe.affinity_weight and self.form == "plain":
            features = features._replace(between=similarity(features.image, features.text))
        task, reports, extra = super().objective(params, features, batch, step)
        distil = self._own_spaces if self.recipe.target == "heads" else self._joint_space
        parts = distil(params, features, batch, step)
        loss = self.recipe.task_weight * task
        for name, (weight, value) in parts.items():
            loss = loss + weight * value
            reports[f"loss/{name}"] = value
        return loss, reports, extra

    def _joint_space(self, params: Params, features: Features, batch: Batch, step: jax.Array) -> dict:
        """`random` and `mean`: one target a sample at the student's width."""
        stored = batch["targets"]
        present = {teacher.name: stored[teacher.name]["present"] for teacher in self.teachers}
        if self.recipe.target == "random":
            share = targets.draw_teacher(present, self.seed, step)
        else:
            count = sum(present[name].astype(jnp.float32) for name in present)
            share = {name: present[name] / jnp.maximum(count, 1.0) for name in present}
        embed = self.model.spec.embed
        goal = {
            tower: sum(
                share[teacher.name][:, None]
                * jnp.where(
                    present[teacher.name][:, None],
                    targets.joint_target(teacher, tower, stored[teacher.name][tower], embed),
                    0.0,
                )
                for teacher in self.teachers
            )
            for tower in ("image", "text")
        }
        weight = sum(share.values())
        scale = jnp.exp(params["icl_scale"]) if self.recipe.icl_trained else RELEASED_ICL_SCALE
        inputs = Inputs(features.image, features.text, goal["image"], goal["text"], weight, scale)
        seen = inputs if features.masked is None else inputs._replace(image=features.masked)
        return {
            "feature": (self.recipe.feature_weight, losses.released_feature(seen)),
            "icl": (self.recipe.icl_weight, losses.interactive(inputs, self.form)),
        }

    def _own_spaces(self, params: Params, features: Features, batch: Batch, step: jax.Array) -> dict:
        """`heads`: every teacher in its own space, weighted by the sample's modality; mean over samples with a teacher.

        As in `_joint_space`, samples without any teacher do not dilute the others.
        """
        weights = self._sample_weights(batch)
        taught = jnp.maximum(sum(jnp.sum(weight) for weight in weights.values()), 1e-9)
        scale = jnp.exp(params["logit_scale"])
        feature, affinity = jnp.zeros(()), jnp.zeros(())
        own = {teacher.name: self._in_own_space(teacher, params, features, batch) for teacher in self.teachers}
        heard = weights
        if self.recipe.teacher_drop:
            distances = {name: sum(losses.cosine_distance(s, t) for s, t in own[name].towers) for name in own}
            heard = targets.drop_teachers(weights, distances, self.recipe.teacher_drop, self.seed, step)
        for teacher in self.teachers:
            stored, weight = batch["targets"][teacher.name], weights[teacher.name]
            share, of_feature = jnp.sum(weight) / taught, heard[teacher.name]
            inputs = own[teacher.name]._replace(weight=of_feature)
            feature = feature + jnp.sum(of_feature) / taught * self._distance(inputs)
            if self.recipe.affinity_weight:
                # The teacher's own affinities: uncentred, since its temperature belongs to those.
                told = normalise(stored["image"]), normalise(stored["text"])
                target_scale = self.recipe.affinity_scale or teacher.scale
                inputs = Inputs(
                    features.image, features.text, *told, weight, scale, target_scale, between=features.between
                )
                affinity = affinity + share * losses.affinity(inputs, self.form)
        parts = {"feature": (self.recipe.feature_weight, feature)}
        if self.recipe.affinity_weight:
            parts["affinity"] = (self.recipe.affinity_weight, affinity)
        return parts

    def _distance(self, inputs: Inputs) -> jax.Array:
        """The feature loss in one teacher's own space."""
        share = self.recipe.smooth_l1
        loss = (1.0 - share) * losses.cosine(inputs)
        return loss + share * losses.smooth_l1(inputs) if share else loss

    def _in_own_space(self, teacher: targets.TeacherTarget, params: Params, features: Features, batch: Batch) -> Inputs:
        """What the student says through a teacher's heads, and the teacher's targets."""
        stored, head = batch["targets"][teacher.name], params["heads"][teacher.name]
        said = [heads.apply(head[tower], x) for tower, x in (("image", features.image), ("text", features.text))]
        return Inputs(*said, *(self._own_target(teacher, tower, stored[tower]) for tower in ("image", "text")))

    def _own_target(self, teacher: targets.TeacherTarget, tower: str, stored: jax.Array) -> jax.Array:
        """Target `[n, out]` in the teacher's own space: what its map says, else of unit norm."""
        if teacher.map:
            return teacher.map.apply(tower, stored)
        mean = teacher.image_mean if tower == "image" else teacher.text_mean
        unit = normalise(stored)
        return normalise(unit - jnp.asarray(mean)) if self.recipe.centre else unit

    def _sample_weights(self, batch: Batch) -> Mapping[str, jax.Array]:
        """Weight `[n]` of each teacher for each sample: its row of the routing table among those present, sum 1."""
        rows = jnp.asarray(self.routing)[batch["modality"]]
        present = jnp.stack([batch["targets"][teacher.name]["present"] for teacher in self.teachers], axis=1)
        weights = rows * present
        weights = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-9)
        return {teacher.name: weights[:, i] for i, teacher in enumerate(self.teachers)}


def _widened(x: jax.Array) -> jax.Array:
    """Stored features come to the device in their own type and are computed with in float32."""
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
