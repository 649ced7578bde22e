"""The config of a head that is trained on features: what the loop asks of any run, for few numbers."""

from ml_collections import ConfigDict


def config(
    name: str,
    *,
    batch: int,
    steps: int,
    lr: float,
    seed: int = 0,
    decay: float = 1e-4,
    warmup: int = 0,
    save_every: int = 0,
    keep: int = 1,
) -> ConfigDict:
    """A config for `loop.run(config, workdir, build)`; a builder may add fields of its own before.

    Args:
      name: in progress lines.
      batch: samples of a step, a multiple of the devices.
      steps: updates in all.
      lr: highest learning rate; it falls to 0 with half a cosine.
      seed: of initial values, order and dropout.
      decay: of the weights, but not of biases.
      warmup: steps up to the highest learning rate.
      save_every: steps between checkpoints; 0 saves the last one only.
      keep: how many checkpoints stay.
    """
    return ConfigDict(
        {
            "name": name, "seed": seed, "batch": batch, "steps": steps,
            "init": "", "towers": {"image": "", "text": ""}, "fresh": (),
            "data": {"other_set": False, "threads": 2},
            "optimizer": {"lr": lr, "warmup": warmup, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "decay": decay,
                          "clip": 1.0},
            "spikes": {"action": "", "loss": 2.0, "grad_norm": 10.0, "after": 100, "limit": 10},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "slices": 1}, "sharding": ((".*", ()),), "unsharded": 1.0,
            "evaluation": {"every": 0}, "wandb": "", "watchdog": 0.0, "log_every": max(1, steps // 20),
            "save_every": save_every or steps, "keep": keep, "save_minutes": 0.0, "best": "",
        }
    )  # fmt: skip
