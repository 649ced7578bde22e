"""A grid: learning rates of stage 1, three training seeds each.

    mmkd sweep --config configs/sweeps/learning_rate.py --workdir SWEEP \
        --config.data.pairs=PAIRS --config.tokenizer=vocab.txt

`--config.score=PAIRS` also scores each student on that set's tests: choose a rate on one that is not reported later.

Arguments: those of stage1_clip.py, and `seeds=N`.
"""

import pathlib

from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax.config import parse_arg
from mmkd_jax.sweeps import grids

STAGE1 = pathlib.Path(__file__).parents[1] / "stage1_clip.py"
FACTORS = (0.3, 1.0, 3.0)  # times the config's own


def get_config(arg: str = "") -> ConfigDict:
    """See the file's docstring."""
    args = parse_arg(arg, smoke=False, demo=False, text="", seeds=3)
    words = [name for name in ("smoke", "demo") if args[name]] + ([f"text={args.text}"] if args.text else [])
    config = configs.load(f"{STAGE1}:{','.join(words)}").unlock()
    config.name = "learning_rate"
    config.seeds = args.seeds
    config.score = ""  # a pairs set to evaluate on
    return config


def sweep(config: ConfigDict) -> list[grids.Overrides]:
    """Every learning rate with every seed."""
    rates = [float(f"{config.optimizer.lr * factor:.4g}") for factor in FACTORS]
    return grids.grid({"optimizer.lr": rates, "seed": range(config.seeds)})


def evaluate(config: ConfigDict) -> list[str]:
    """How a student is scored."""
    return ["--pairs", config.score] if config.score else []
