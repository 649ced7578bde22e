"""Stage 1: contrastive pretraining of the student on image-text pairs."""

import math

import jax
import jax.numpy as jnp

from mmkd_jax import preprocess
from mmkd_jax.errors import InputError, near
from mmkd_jax.losses import contrastive
from mmkd_jax.losses.base import Inputs, normalise
from mmkd_jax.losses.forms import FORMS
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ModelSpec
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

    Raises:
      InputError: an unknown loss or form.
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
    ):
        for name, value, known in (("loss", loss, contrastive.LOSSES), ("loss form", form, FORMS)):
            if value not in known:
                raise InputError(f"{name} {value!r}: {near(value, known)}")
        self.model = DualEncoder(spec, dtype=dtype, remat=remat)
        self.loss, self.form, self.micro_batches = loss, form, micro_batches

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        """See `Task.init`; the sigmoid loss adds `sigmoid/bias` and starts from its own scale."""
        params = self.model.init(key)
        if self.loss == "sigmoid":
            params["logit_scale"] = jnp.asarray(SIGMOID_SCALE, jnp.float32)
            params["sigmoid"] = {"bias": jnp.asarray(SIGMOID_BIAS, jnp.float32)}
        return params, {}

    def encode(self, params: Params, extra: dict, batch: Batch, key: jax.Array, step: jax.Array) -> Features:
        """Unit embeddings of `batch["image"]` uint8 `[n, S, S, 3]` and `batch["text"]`; dropout keyed by `key`."""
        image = preprocess.normalise(batch["image"], self.model.spec.preprocess)
        # Without the barrier XLA fuses this into the patch embedding and repeats it there, at a third of the speed.
        image = jax.lax.optimization_barrier(image)
        image_key, text_key = jax.random.split(key)
        return Features(
            image=normalise(self.model.encode_image(params, image, key=image_key)),
            text=normalise(self.model.encode_text(params, batch["text"], key=text_key)),
        )

    def objective(
        self, params: Params, features: Features, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], dict]:
        """The task loss in nats."""
        scale = jnp.exp(params["logit_scale"])
        bias = params["sigmoid"]["bias"] if self.loss == "sigmoid" else 0.0
        inputs = Inputs(features.image, features.text, scale=scale, bias=bias)
        loss = contrastive.LOSSES[self.loss](inputs, self.form)
        return loss, {"loss/task": loss, "logit_scale": scale}, {}

    def lr_scale(self, path: str) -> float:
        """Every parameter is trained at the full rate, as in the released code."""
        return 1.0

    def encoders(self, params: Params) -> Params:
        """All of it."""
        return {name: params[name] for name in ("image", "text", "logit_scale")}
