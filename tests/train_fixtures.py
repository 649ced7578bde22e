"""A tiny set, two teachers' features and a vocabulary, from which both stages train in seconds."""

import functools
import json
import pathlib
import tempfile

import data_fixtures as toy
import jax

from mmkd_jax import config as configs
from mmkd_jax import io, tokenizers
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.specs import TokenizerSpec
from mmkd_jax.train import checkpoint, metrics, optim, setup
from mmkd_jax.train import state as states

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
POLICY = ViewPolicy(scale=(0.9, 1.0), seed=0)  # that of the shipped configs


@functools.cache
def world() -> pathlib.Path:
    """A folder with `pairs`, `features/{alpha,beta}` and `vocabulary`, made once a process; programs compile once."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="mmkd-test-"))
    jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    pairs = toy.make_pairs(root / "pairs")
    for seed, (name, width) in enumerate({"alpha": 6, "beta": 10}.items()):
        toy.make_features(
            root / "features" / name, pairs, seed=seed, teacher=name, width=width, policy=POLICY, logit_scale=20.0
        )
    texts = [caption for row in range(len(pairs)) for caption in pairs.read(row).captions]
    learned = tokenizers.train(TokenizerSpec("wordpiece"), texts, vocab_size=60, context=16)
    io.write_bytes(root / "vocabulary" / "tokenizer.json", learned.files()["tokenizer.json"])
    table = {"weights": {"ct": {"alpha": 1.0, "beta": 0.0}, "mri": {"alpha": 0.25, "beta": 0.75}}}
    (root / "routing.json").write_text(json.dumps(table))
    return root


def overrides(*more: str) -> list[str]:
    """What makes a shipped smoke config train on `world`."""
    root = world()
    return [
        f"--config.data.pairs={root / 'pairs'}",
        f"--config.tokenizer={root / 'vocabulary'}",
        "--config.model.text.vocab_size=60",
        "--config.data.threads=1",
        *more,
    ]


def stage1(*more: str):
    """Config of stage 1 on `world`."""
    return configs.load(f"{CONFIGS}/stage1_clip.py:smoke", overrides(*more))


def stage2(recipe: str, *more: str):
    """Config of stage 2 on `world`."""
    features = f"--config.features={world() / 'features'}"
    return configs.load(f"{CONFIGS}/stage2_mmkd.py:smoke,recipe={recipe}", overrides(features, *more))


def pairs() -> PairsSet:
    """The set of `world`."""
    return PairsSet.open(world() / "pairs")


def untrained(config, folder: pathlib.Path) -> pathlib.Path:
    """A run's folder with the checkpoint that a run of `config` would leave after updates of zero."""
    job = setup.build(config)
    transform = optim.optimizer(config.optimizer, job.steps, job.task.lr_scale)
    meta = checkpoint.describe(job.task.model.spec, job.tokenizer.files(), configs.to_dict(config), {})
    saver = checkpoint.Checkpoints(folder)
    saver.save(job.steps, jax.jit(lambda: states.init_state(job.task, transform, config.seed))(), meta)
    saver.close()
    return folder


def losses(workdir) -> list[dict]:
    """The metrics of a run without what depends on time."""
    return [{k: v for k, v in line.items() if k != "pairs_per_second"} for line in metrics.read(workdir)]
