"""Leave one teacher out: stage 2 with all teachers, then without each, three training seeds each.

    mmkd sweep --config configs/sweeps/leave_one_out.py --workdir SWEEP --config.features=FEATURES \
        --config.data.pairs=PAIRS --config.tokenizer=vocab.txt --config.score=TESTS

All runs start from one checkpoint of stage 1 and read one feature set. Stage 1 is trained once, in the sweep, unless
`--config.init=STAGE1` names a checkpoint. Features come from the folder `--config.features`; or they are emitted once,
in the sweep, by the teachers in `--config.weights="('NAME=WEIGHTS', ...)"`. `--config.score=PAIRS` scores each student
on that set's tests. Without a routing table all teachers of a sample count alike, so that leaving one out is all that
changes.

Arguments: `recipe=public|mean|plus` (`mean` by default), `smoke`, `demo` as in stage2_mmkd.py, and `seeds=N`.
"""

import pathlib

from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax.config import parse_arg
from mmkd_jax.sweeps import grids

CONFIGS = pathlib.Path(__file__).parents[1]


def get_config(arg: str = "") -> ConfigDict:
    """See the file's docstring."""
    args = parse_arg(arg, recipe="mean", smoke=False, demo=False, seeds=3)
    size = "smoke" if args.smoke else "demo" if args.demo else ""
    config = configs.load(f"{CONFIGS}/stage2_mmkd.py:recipe={args.recipe}{',' + size if size else ''}").unlock()
    config.name = "leave_one_out"
    config.size, config.seeds = size, args.seeds
    config.weights = ()  # NAME=WEIGHTS of teachers to emit features with
    config.views = 1  # stored views of each picture, where the sweep emits
    config.score = ""  # a pairs set to evaluate on
    return config


def sweep(config: ConfigDict) -> list[grids.Overrides]:
    """All teachers and all but each, with every seed."""
    emitted = sorted(entry.partition("=")[0] for entry in config.weights)
    names = config.teachers or emitted or grids.teachers_in(config.features)
    return grids.product(grids.leave_one_out(names), grids.grid({"seed": range(config.seeds)}))


def shared(config: ConfigDict) -> dict[str, list[str]]:
    """One stage 1 and one feature set for all, unless they are named."""
    made = {}
    if not config.init:
        same = grids.pick(config, "model", "towers", "data", "tokenizer", "batch", "dtype", "remat", "mesh")
        made["init"] = ["train", "--config", f"{CONFIGS}/stage1_clip.py:{config.size}", *same]
    if config.weights:
        low, high = config.data.views.scale
        rows = ["--rows", config.data.rows] if config.data.rows else []
        crops = ["--scale", low, high, "--seed", config.data.views.seed, "--views", config.views]
        made["features"] = ["emit", "--teacher", *config.weights, "--pairs", config.data.pairs, *crops, *rows]
    return made


def evaluate(config: ConfigDict) -> list[str]:
    """How a student is scored."""
    return ["--pairs", config.score] if config.score else []
