"""Stage 1: contrastive pretraining of the student on image-text pairs."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mmkd_jax import preprocess
from mmkd_jax.errors import InputError, near
from mmkd_jax.losses import contrastive
from mmkd_jax.losses.base import Inputs, normalise
from mmkd_jax.losses.forms import FORMS
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ModelSpec
from mmkd_jax.tasks import patches
from mmkd_jax.tasks.base import Batch, Features, Params

SIGMOID_SCALE, SIGMOID_BIAS = math.log(10.0), -10.0  # where SigLIP starts (arXiv 2303.15343, section 3.2)


class ClipTask:
    """A contrastive loss over the global batch with a trained temperature.

    Args:
      spec: the student.
      dtype: compute dtype of its towers.
      remat: see `DualEncoder`.
      loss: `softmax` or `sigmoid`.
      form: how global losses are computed (`mmkd_jax.losses.forms`); it changes nothing but rounding.
      micro_batches: see `Task`.
      widths: the loss is the mean of that of the whole embeddings and of those of their first numbers, as many as these
        (Matryoshka representations, arXiv 2205.13147).
      patch_drop: share of each picture's patches that a step leaves out (FLIP, arXiv 2212.00794), drawn anew each time.
      patch_drop_steps: of the first steps only; those after them see whole pictures.

    Raises:
      InputError: an unknown loss or form, a width that is not within the embedding, a share that is not within [0, 1).
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype=jnp.float32,
        remat: str = "none",
        loss: str = "softmax",
        form: str = "plain",
        micro_batches: int = 1,
        widths: Sequence[int] = (),
        patch_drop: float = 0.0,
        patch_drop_steps: int = 0,
    ):
        for name, value, known in (("loss", loss, contrastive.LOSSES), ("loss form", form, FORMS)):
            if value not in known:
                raise InputError(f"{name} {value!r}: {near(value, known)}")
        self.model = DualEncoder(spec, dtype=dtype, remat=remat)
        self.loss, self.form, self.micro_batches, self.widths = loss, form, micro_batches, tuple(widths)
        self.patch_drop, self.patch_drop_steps = patch_drop, patch_drop_steps
        if not all(0 < width < spec.embed for width in self.widths):
            raise InputError(f"loss widths {self.widths} must lie between 0 and the embedding's {spec.embed}")
        patches.check(patch_drop, spec.image)
        if patch_drop and patch_drop_steps < 1:
            raise InputError("patches are to be dropped in no step; say in how many by --config.patches.steps")

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        """See `Task.init`; the sigmoid loss adds `sigmoid/bias` and starts from its own scale."""
        params = self.model.init(key)
        if self.loss == "sigmoid":
            params["logit_scale"] = jnp.asarray(SIGMOID_SCALE, jnp.float32)
            params["sigmoid"] = {"bias": jnp.asarray(SIGMOID_BIAS, jnp.float32)}
        return params, {}

    def encode(self, params: Params, extra: dict, batch: Batch, key: jax.Array, step: jax.Array) -> Features:
        """Unit embeddings of `batch["image"]` uint8 `[n, S, S, 3]` and `batch["text"]`; dropout keyed by `key`."""
        image = self._pixels(batch)
        image_key, text_key = jax.random.split(key)
        whole = functools.partial(self.model.encode_image, params, image, key=image_key)
        if self.patch_drop:
            kept = patches.draw(jax.random.fold_in(image_key, 0), len(image), self.model.spec.image, self.patch_drop)
            embedding = jax.lax.cond(step < self.patch_drop_steps, lambda: whole(kept=kept), whole)
        else:
            embedding = whole()
        return Features(
            image=normalise(embedding),
            text=normalise(self.model.encode_text(params, batch["text"], key=text_key)),
        )

    def _pixels(self, batch: Batch) -> jax.Array:
        """Normalised pictures float32 `[n, S, S, 3]`."""
        image = preprocess.normalise(batch["image"], self.model.spec.preprocess)
        # Without the barrier XLA fuses this into the patch embedding and repeats it there, at a third of the speed.
        return jax.lax.optimization_barrier(image)

    def objective(
        self, params: Params, features: Features, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], dict]:
        """The task loss in nats."""
        scale = jnp.exp(params["logit_scale"])
        bias = params["sigmoid"]["bias"] if self.loss == "sigmoid" else 0.0
        of_pairs = contrastive.LOSSES[self.loss]
        pairs = Inputs(features.image, features.text, scale=scale, bias=bias, between=features.between)
        loss = of_pairs(pairs, self.form)
        if self.widths:
            nested = [
                (normalise(features.image[:, :width]), normalise(features.text[:, :width])) for width in self.widths
            ]
            losses = [of_pairs(Inputs(*pair, scale=scale, bias=bias), self.form) for pair in nested]
            loss = (loss + sum(losses)) / (1 + len(losses))
        return loss, {"loss/task": loss, "logit_scale": scale}, {}

    def lr_scale(self, path: str) -> float:
        """Every parameter is trained at the full rate, as in the released code."""
        return 1.0

    def encoders(self, params: Params) -> Params:
        """All of it."""
        return {name: params[name] for name in ("image", "text", "logit_scale")}
