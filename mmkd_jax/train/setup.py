"""From a config to the pieces of a run: the student's spec, tokenizer, input and task."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax import io, registry, tokenizers
from mmkd_jax.data.batches import Batches
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.selection import Selection
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError, near
from mmkd_jax.specs import ModelSpec
from mmkd_jax.tasks import maps, routing, targets
from mmkd_jax.tasks.base import Task
from mmkd_jax.tasks.clip import ClipTask
from mmkd_jax.tasks.distill import DistillTask, Recipe

TASKS = {"clip": "mmkd_jax.train.setup.clip_task", "distill": "mmkd_jax.train.setup.distill_task"}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a config comes down to.

    Attributes:
      task: see `mmkd_jax.tasks.base`.
      batches: the global batch as a function of the step: `iterate(start, stop, threads)` as of `Batches`.
      tokenizer: the student's; None for what reads no text.
      steps: number of updates in all.
      identity: hashes of all data that the run is made of.
      fields: of a batch, which go to the devices; the rest stays on the host.
      given: parts of the parameters that start from these NumPy arrays instead of those of `task.init`.
    """

    task: Task
    batches: Batches
    tokenizer: tokenizers.Tokenizer | None
    steps: int
    identity: dict[str, Any]
    fields: tuple[str, ...] = ("image", "text", "modality", "targets")
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files by name."""
        return self.tokenizer.files() if self.tokenizer else {}


def build(config: ConfigDict) -> Job:
    """Opens the data and makes the task.

    Raises:
      InputError: data, features, vocabulary and config do not fit together.
    """
    spec = ModelSpec.from_dict(configs.to_dict(config.model))
    if not config.data.pairs:
        raise InputError("no pairs set is given; use --config.data.pairs=DIR (made by `mmkd ingest`)")
    pairs = PairsSet.open(config.data.pairs)
    tokenizer = load_tokenizer(config, spec)
    features = open_features(config, pairs)
    rows = pairs.rows(config.data.rows) if config.data.rows else None
    batches = Batches(
        pairs,
        batch=config.batch,
        seed=config.seed,
        policy=ViewPolicy.from_dict(configs.to_dict(config.data.views)),
        image_size=spec.image.image_size,
        tokenizer=tokenizer,
        rows=rows,
        features=features or None,
        selection=Selection.load(config.selection) if config.get("selection") else None,
        block=config.data.block,
        window=config.data.window,
        caption=config.data.caption,
        process=(jax.process_index(), jax.process_count()),
    )
    count = len(rows.rows) if rows is not None else len(pairs)
    steps = config.steps or max(1, config.epochs * count // config.batch)
    make = registry.resolve(config.task, TASKS, "task")
    vocabulary = io.hash_of({name: io.sha256(data) for name, data in tokenizer.files().items()})
    identity = batches.identity | {"tokenizer": vocabulary, "licences": _licences(pairs, features)}
    if config.get("routing"):
        identity["routing"] = io.hash_of(routing.load(config.routing))
    if config.get("maps"):
        identity["maps"] = {name: one.hash for name, one in maps.load(config.maps, features).items()}
    return Job(make(config, spec, pairs, features), batches, tokenizer, steps, identity)


def _licences(pairs: PairsSet, features: dict[str, FeatureSet]) -> dict[str, Any]:
    """What the student is made from may forbid passing it on: licences by teacher, and of the pictures with counts."""
    teachers = {name: one.manifest["license"] for name, one in features.items()}
    return {"teachers": teachers, "data": dict(pairs.manifest["counts"]["license"])}


def load_tokenizer(config: ConfigDict, spec: ModelSpec) -> tokenizers.Tokenizer:
    """The student's tokenizer, its vocabulary checked against the model's."""
    if not config.tokenizer:
        wanted = {"wordpiece": "vocab.txt or tokenizer.json", "bpe": "bpe_simple_vocab_16e6.txt.gz or tokenizer.json"}
        raise InputError(f"no vocabulary is given; use --config.tokenizer=FILE ({wanted[spec.tokenizer.kind]})")
    return tokenizers.load(spec.tokenizer, config.tokenizer, context=spec.text.context, vocab_size=spec.text.vocab_size)


def open_features(config: ConfigDict, pairs: PairsSet) -> dict[str, FeatureSet]:
    """The feature sets in `config.features` (one folder a teacher), all or those that `config.teachers` names."""
    if not config.get("features"):
        return {}
    root = io.as_path(config.features)
    folders = list(root.iterdir()) if root.is_dir() else []
    found = sorted(folder.name for folder in folders if (folder / "manifest.json").exists())
    if not found:
        raise InputError(f"{root} holds no feature set; make them with `mmkd emit --out {os.fspath(root)}`")
    names = list(config.teachers) or found
    for name in names:
        if name not in found:
            raise InputError(f"{root} has no features of teacher {name!r}; {near(name, found)}")
    features = {name: FeatureSet.open(root / name, pairs) for name in names}
    for name, one in features.items():
        if one.teacher != name:
            raise InputError(f"{root / name} holds the features of teacher {one.teacher!r}; give the folder that name")
    return features


def clip_task(config: ConfigDict, spec: ModelSpec, pairs: PairsSet, features: dict[str, FeatureSet]) -> Task:
    """Stage 1."""
    return ClipTask(spec, **student(config))


def distill_task(config: ConfigDict, spec: ModelSpec, pairs: PairsSet, features: dict[str, FeatureSet]) -> Task:
    """Stage 2."""
    if not features:
        raise InputError("stage 2 needs the teachers' features; use --config.features=DIR (made by `mmkd emit`)")
    table = routing.load(config.routing) if config.routing else None
    fitted = maps.load(config.maps, features) if config.maps else {}
    teachers = [teacher_target(features[name], fitted.get(name)) for name in sorted(features)]
    return DistillTask(
        spec,
        teachers,
        Recipe(**configs.to_dict(config.recipe)),
        targets.routing_table(table, pairs.modalities, [teacher.name for teacher in teachers]),
        seed=config.seed,
        **student(config),
    )


def teacher_target(features: FeatureSet, fitted: maps.TargetMap | None = None) -> targets.TeacherTarget:
    """A feature set's record, with the map fitted to it, as stage 2 needs it."""
    statistics = features.statistics
    return targets.TeacherTarget(
        name=features.teacher,
        width=features.width,
        space=features.space,
        scale=float(features.manifest["logit_scale"]),
        image_mean=np.asarray(statistics["image"]["mean"], np.float32),
        text_mean=np.asarray(statistics["text"]["mean"], np.float32),
        map=fitted,
    )


def student(config: ConfigDict) -> dict[str, Any]:
    """What both stages' tasks take alike."""
    if config.dtype not in DTYPES:
        raise InputError(f"dtype {config.dtype!r}: {near(config.dtype, DTYPES)}")
    if config.accumulate < 1 or config.batch % config.accumulate:
        raise InputError(f"batch {config.batch} cannot be cut into accumulate={config.accumulate} equal micro-batches")
    return {
        "dtype": DTYPES[config.dtype],
        "remat": config.remat,
        "loss": config.loss.task,
        "form": config.loss.form,
        "micro_batches": config.accumulate,
        "widths": tuple(config.loss.widths),
        "patch_drop": config.patches.drop,
        "patch_drop_steps": config.patches.steps,
    }
