"""A task whose numbers go wrong where a test wants it; nothing here starts JAX, so that processes can still join."""

import jax.numpy as jnp
import numpy as np

from mmkd_jax.tasks.clip import ClipTask

POISON = 99  # a modality that no pair has


class Disturbed(ClipTask):
    """Stage 1 with text gradients that are no numbers in the third step, with a loss a hundred times too large in it,
    or with such a loss on poisoned batches."""

    how = "nan"

    def objective(self, params, features, batch, step):
        loss, reports, extra = super().objective(params, features, batch, step)
        if self.how == "nan":
            loss += jnp.where(step == 2, jnp.nan, 0.0) * features.text.sum()
        if self.how == "loud":
            loss *= jnp.where(step == 2, 100.0, 1.0)
        if self.how == "poisoned":
            loss *= jnp.where((batch["modality"] == POISON).any(), 100.0, 1.0)
        if self.how == "lost":
            loss *= jnp.where(step >= 2, jnp.nan, 1.0)
        return loss, reports, extra


def disturbed(config, spec, pairs, features):
    """A task as a config names it."""
    return Disturbed(spec)


def poisoning(real, bad=(), left_out=()):
    """`Batches.batch` over the batches that are not `left_out`; those that are `bad` raise the loss a hundredfold."""
    kept = [number for number in range(1000) if number not in left_out]

    def batch(this, number):
        made = dict(real(this, kept[number]))
        if kept[number] in bad:
            made["modality"] = np.full_like(made["modality"], POISON)
        return made

    return batch
