"""A random search: the weights of recipe `plus` and the learning rate of stage 2, all from one checkpoint of stage 1.

    mmkd sweep --config configs/sweeps/loss_weights.py --workdir SWEEP --config.features=FEATURES \
        --config.data.pairs=PAIRS --config.tokenizer=vocab.txt --config.score=DEVELOPMENT

Stage 1 is trained once, in the sweep, unless `--config.init=STAGE1` names a checkpoint. Losses of different weights are
not comparable: `--config.score=PAIRS` scores each student on that set's tests; take one that is not reported later.

Arguments: `smoke`, `demo` as in stage1_clip.py, `count=N` draws, `seeds=N` training seeds of each.
"""

import pathlib

from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax.config import parse_arg
from mmkd_jax.sweeps import grids

CONFIGS = pathlib.Path(__file__).parents[1]


def get_config(arg: str = "") -> ConfigDict:
    """See the file's docstring."""
    args = parse_arg(arg, smoke=False, demo=False, count=16, seeds=1)
    size = "smoke" if args.smoke else "demo" if args.demo else ""
    config = configs.load(f"{CONFIGS}/stage2_mmkd.py:recipe=plus{',' + size if size else ''}").unlock()
    config.name = "loss_weights"
    config.size, config.count, config.seeds = size, args.count, args.seeds
    config.score = ""  # a pairs set to evaluate on
    return config


def sweep(config: ConfigDict) -> list[grids.Overrides]:
    """Draws of three fields, each with every seed."""
    spaces = {
        "recipe.feature_weight": grids.log_uniform(0.1, 10),
        "recipe.affinity_weight": grids.log_uniform(0.1, 10),
        "optimizer.lr": grids.log_uniform(config.optimizer.lr / 3, config.optimizer.lr * 3),
    }
    return grids.product(grids.random(config.count, spaces), grids.grid({"seed": range(config.seeds)}))


def shared(config: ConfigDict) -> dict[str, list[str]]:
    """One stage 1 for all, of the same model on the same data, unless a checkpoint is named."""
    if config.init:
        return {}
    same = grids.pick(config, "model", "towers", "data", "tokenizer", "batch", "dtype", "remat", "mesh")
    return {"init": ["train", "--config", f"{CONFIGS}/stage1_clip.py:{config.size}", *same]}


def evaluate(config: ConfigDict) -> list[str]:
    """How a student is scored."""
    return ["--pairs", config.score] if config.score else []
