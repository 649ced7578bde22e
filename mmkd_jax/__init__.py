"""mmkd_jax: distil many biomedical CLIP teachers into one generalist student, in JAX."""

__version__ = "0.1.0"


def load(checkpoint, **options):
    """A trained student from its checkpoint; see `mmkd_jax.api.load`."""
    from mmkd_jax import api

    return api.load(checkpoint, **options)
