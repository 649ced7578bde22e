"""Stage 1: contrastive pretraining of the student on image-text pairs."""

import jax
import jax.numpy as jnp

from mmkd_jax import preprocess
from mmkd_jax.losses.contrastive import normalise, softmax_loss
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ModelSpec
from mmkd_jax.tasks.base import Batch, Features, Params


class ClipTask:
    """Symmetric InfoNCE over the global batch with a trained temperature."""

    def __init__(self, spec: ModelSpec, *, dtype=jnp.float32, remat: str = "none"):
        self.model = DualEncoder(spec, dtype=dtype, remat=remat)

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        """See `Task.init`."""
        return self.model.init(key), {}

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
        loss = softmax_loss(features.image, features.text, scale)
        return loss, {"loss/task": loss, "logit_scale": scale}, {}

    def lr_scale(self, path: str) -> float:
        """Every parameter is trained at the full rate, as in the released code."""
        return 1.0

    def encoders(self, params: Params) -> Params:
        """All of it."""
        return {name: params[name] for name in ("image", "text", "logit_scale")}
