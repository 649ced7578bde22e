"""The ladder: from recipe `public` to `plus` one switch at a time, then one more switch each, and one teacher fewer.

    mmkd demo  --prepare --workdir DEMO --seeds 3 --captions label --data DIR...
    mmkd sweep --config configs/sweeps/ladder.py:captions=label --workdir LADDER --config.demo=DEMO

The first command makes what all rungs share: the set with the captions of the setting (`label`, or `modality` for
captions of labelled pictures that name the modality alone), the specialists, their features and scores. The second
trains stage 1 once a seed and every rung from there, as many steps each on the same pairs in the same order; measures
weights of teachers on the held-out part of the training pictures (`dev`); and scores all alike. `clip_only` goes
without teachers for as many steps as stage 1 and stage 2 of the others together. Teachers are weighed with the captions
that they learned in both settings: where captions name the modality alone, all match them alike.

Rungs up to `+routing`, which is `plus`, add a switch to the one before; those called `plus+...` add one to `plus`
alone. PHI-S is not among them: it turns and scales a teacher's centred space, which 1 - cosine through a linear head
does not see. The table has the zero-shot score (mean balanced accuracy of `scored`) with its interval over cases and
seeds, paired differences, and the steps that a rung takes to reach the last score of `public`, from an evaluation every
`evaluation.every` steps. These are read, and nothing is chosen by them.

Arguments: `captions=label|modality`, `seeds=N` training seeds.
"""

import pathlib

from ml_collections import ConfigDict, config_dict

from mmkd_jax import config as configs
from mmkd_jax.config import parse_arg
from mmkd_jax.errors import InputError, near
from mmkd_jax.sweeps import grids

CONFIGS = pathlib.Path(__file__).parents[1]
CAPTIONS = ("label", "modality")
CONTROL = "clip_only"
PLUS = "+routing"
# Each adds its fields to those of the rung before. A `route` is what `mmkd features route` measures the weights by.
CLIMB = {
    "public": {"recipe.target": "random"},
    "+mean": {"recipe.target": "mean"},
    "+icl_scale": {"recipe.icl_trained": True},
    "+heads": {
        "recipe.target": "heads",
        "recipe.feature_weight": 1.0,
        "recipe.icl_weight": 0.0,
        "recipe.icl_trained": False,
    },
    "+centre": {"recipe.centre": True},
    "+affinity": {"recipe.affinity_weight": 3.0},
    PLUS: {"route": "hard"},
}
BESIDE = {
    "plus+teacher_drop": {"recipe.teacher_drop": 0.5},
    "plus+soft_routing": {"route": "soft"},
    "plus+mlp_heads": {"recipe.head": "mlp"},
    "plus+smooth_l1": {"recipe.smooth_l1": 0.5},
    "plus+sigmoid": {"loss.task": "sigmoid"},
    "plus+half_patches": {"patches.drop": 0.5},
    "plus+ema": {"ema": 0.95},
}
ROUTES = {
    "hard": (),
    "soft": ("--temperature", 0.1),
}


def get_config(arg: str = "") -> ConfigDict:
    """See the file's docstring."""
    args = parse_arg(arg, captions="label", seeds=3)
    if args.captions not in CAPTIONS:
        raise InputError(f"captions={args.captions}: {near(args.captions, CAPTIONS)}")
    config = configs.load(f"{CONFIGS}/stage2_mmkd.py:recipe=public,demo").unlock()
    demo = configs.load(f"{CONFIGS}/demo.py:experiment")
    config.name = f"ladder-{args.captions}"
    config.label, config.seeds = "", args.seeds
    config.rungs = ()  # only these; none: all
    config.demo = folder = config_dict.FieldReference("")  # what `mmkd demo --prepare` made
    config.data.pairs = folder + f"/pairs-{args.captions}"
    config.data.rows = "fit"
    config.features = folder + f"/features-{args.captions}"
    config.tokenizer = folder + "/vocabulary/bpe/tokenizer.json"
    config.references = folder + ("" if args.captions == "label" else "/modality")  # results of the teachers
    # Few, so that all rungs of a setting are climbed in about an hour on two cores.
    config.steps, config.stage1_steps = 100, demo.steps.stage1
    config.patches.steps = 80  # of patches.drop; the rest sees whole pictures
    config.route = ""
    config.measured = ConfigDict({"pairs": folder + "/pairs-label", "features": folder + "/features-label"})
    config.scored, config.beside = demo.scored, demo.beside
    config.retrieved = ("medpix2", "openstax_bio")
    config.bootstrap = demo.bootstrap
    config.evaluation.every, config.evaluation.tasks = 25, ("zeroshot",)
    config.evaluation.sets = demo.scored
    config.log_every = 10
    config.keep, config.save_every = 1, config.steps
    config.table = "mmkd_jax.sweeps.ladder.write"
    return config


def sweep(config: ConfigDict) -> list[grids.Overrides]:
    """Every rung with every seed, the climb first."""
    if not config.demo:
        raise InputError("the ladder stands on a demo's data and teachers; use --config.demo=DIR (mmkd demo --prepare)")
    rungs, fields = [{"label": CONTROL, **_alone(config)}], {}
    for label, change in CLIMB.items():
        fields = {**fields, **change}
        rungs.append({"label": label, **fields})
    rungs += [{"label": label, **fields, **change} for label, change in BESIDE.items()]
    names = grids.teachers_in(config.features)
    for one in grids.leave_one_out(names)[1:]:
        (left_out,) = set(names) - set(one["teachers"])
        rungs.append({"label": f"plus-{left_out}", **fields, **one})
    known = [rung["label"] for rung in rungs]
    for name in config.rungs:
        if name not in known:
            raise InputError(f"the ladder has no rung {name!r}; {near(name, known)}")
    chosen = [rung for rung in rungs if rung["label"] in (config.rungs or known)]
    return grids.product(chosen, grids.grid({"seed": range(config.seeds)}))


def shared(config: ConfigDict) -> dict[str, list[str]]:
    """Stage 1 once a seed; a routing table for each way of measuring it and each choice of teachers."""
    if config.task == "clip":
        return {}
    same = grids.pick(config, "model", "towers", "data", "tokenizer", "batch", "dtype", "remat", "mesh", "seed")
    more = [f"--config.steps={config.stage1_steps}", f"--config.save_every={config.stage1_steps}"]
    made = {"init": ["train", "--config", f"{CONFIGS}/stage1_clip.py:demo", *same, *more]}
    if config.route:
        teachers = ["--teachers", *config.teachers] if config.teachers else []
        measured = ["--pairs", config.measured.pairs, "--rows", "dev", *ROUTES[config.route], *teachers]
        made["routing"] = ["features", "route", config.measured.features, *measured]
    return made


def evaluate(config: ConfigDict) -> list[str]:
    """Every student alike."""
    sets = (*config.scored, *config.beside, *config.retrieved)
    named = ["--sets", *sets] if sets else []
    tasks = ["--tasks", "zeroshot", "linear_probe", "retrieval", "--probe-layer", "pooled"]
    return ["--pairs", config.data.pairs, *named, *tasks, "--bootstrap", config.bootstrap]


def _alone(config: ConfigDict) -> grids.Overrides:
    """No teachers, and no stage 1 before."""
    return {"task": "clip", "features": "", "steps": config.stage1_steps + config.steps}
