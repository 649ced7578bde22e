"""From pictures to trained students. Every step leaves an artefact and is skipped where that is whole."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax import io, tokenizers
from mmkd_jax.data import ingest
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.data.sources import SourceRecord, open_source
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError
from mmkd_jax.specs import TokenizerSpec
from mmkd_jax.tasks import routing
from mmkd_jax.train import checkpoint, loop

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CAPTIONS = ("label", "modality")


@dataclasses.dataclass(frozen=True)
class Demo:
    """One demo in its folder.

    Attributes:
      config: of configs/demo.py.
      workdir: everything is below.
      data: folders of WebDataset sets; none: the embedded pictures.
      captions: what the students' captions of labelled sets say: the `label`, or the `modality` only.
      seeds: training seeds of the students.
    """

    config: ConfigDict
    workdir: epath.Path
    data: tuple[str, ...]
    captions: str
    seeds: int

    # --- data ---------------------------------------------------------------------------------------------------

    def pairs(self, captions: str | None = None) -> PairsSet:
        """The pairs set with the captions of a setting, and the row indices `fit`, `dev` and `fit.SPECIALIST`."""
        captions = captions or self.captions
        path = self.workdir / f"pairs-{captions}"
        if not (path / "manifest.json").exists():
            source = open_source("webdataset", self.data) if self.data else open_source("sample")
            ingest.ingest(
                source,
                path,
                name="demo",
                shards=1,
                max_side=self.config.max_side,
                captions=modality_only if captions == "modality" else None,
            )
        pairs = PairsSet.open(path)
        if "dev" not in pairs.row_names():
            self._divide(pairs)
        return pairs

    def _divide(self, pairs: PairsSet) -> None:
        """Row indices of the training splits: `dev` by group, `fit` the rest, and what each specialist sees of it."""
        sources = np.asarray(pairs.sources)[pairs.table["source"]]
        train = pairs.rows("train").rows
        train = train[~np.isin(sources[train], self.config.never_trained)]
        held_out = _in_dev(pairs, train, self.config.dev)
        fit = train[~held_out]
        parts = {"fit": fit}
        modality = np.asarray(pairs.modalities)[pairs.table["modality"]]
        for name, modalities in self.config.specialists.items():
            parts[f"fit.{name}"] = fit[np.isin(modality[fit], modalities)]
            if not len(parts[f"fit.{name}"]):
                raise InputError(f"no training pair has a modality of the specialist {name}: {', '.join(modalities)}")
        for source in sorted(set(sources[train[held_out]])):
            parts[f"{source}.dev"] = train[held_out][sources[train[held_out]] == source]
        parts["dev"] = train[held_out]  # last: its being there says that all are
        for name, rows in parts.items():
            index = RowIndex(rows, pairs.hash, name, {"from": "train", "dev": self.config.dev})
            index.save(pairs.path / "rows" / f"{name}.npz")

    def vocabulary(self, kind: str) -> epath.Path:
        """A tokenizer file learned from the training captions; the settings share it."""
        path = self.workdir / "vocabulary" / kind / "tokenizer.json"
        if not path.exists():
            pairs = self.pairs("label")
            texts = [text for pair in pairs.read_many(pairs.rows("fit").rows) for text in pair.captions]
            spec = TokenizerSpec(kind=kind)
            learned = tokenizers.train(spec, texts, vocab_size=self.config.vocabulary, context=24)
            for name, data in learned.files().items():
                io.write_bytes(path.parent / name, data)
        return path

    # --- teachers -----------------------------------------------------------------------------------------------

    def teacher(self, name: str) -> epath.Path:
        """A specialist as others get it: a folder in open_clip's layout, trained on its own modalities only."""
        from mmkd_jax import export

        folder = self.workdir / "teachers" / name
        if not (folder / "open_clip").exists():
            config = self._config(
                f"stage1_clip.py:demo,text={self.config.families[name]}",
                captions="label",
                name=f"teacher {name}",
                rows=f"fit.{name}",
                steps=self.config.steps.teacher,
                own=self.config.teacher,
            )
            loop.run(config, folder / "run")
            export.export_checkpoint(folder / "run", folder / "open_clip")
        return folder / "open_clip"

    def features(self, captions: str | None = None) -> epath.Path:
        """Features of every training pair by every teacher, in two views, under a setting's captions."""
        import teachers
        from teachers.emit import emit

        captions = captions or self.captions
        pairs, out = self.pairs(captions), self.workdir / f"features-{captions}"
        views = configs.load(str(CONFIGS / "stage1_clip.py:demo")).data.views
        emit(
            {name: teachers.load(name, weights=self.teacher(name)) for name in self.config.specialists},
            pairs,
            out,
            policy=ViewPolicy.from_dict(configs.to_dict(views)),
            views=self.config.views,
            rows=RowIndex(np.sort(np.concatenate([pairs.rows("fit").rows, pairs.rows("dev").rows])), pairs.hash, "all"),
        )
        return out

    def routing(self) -> epath.Path:
        """Which teacher to believe for which modality, measured on `dev` with the captions that teachers learned.

        Where captions name the modality only, all teachers match them alike; who knows a modality would not show.
        """
        path = self.workdir / "routing.json"
        if not path.exists():
            pairs, root = self.pairs("label"), self.features("label")
            sets = {name: FeatureSet.open(root / name, pairs) for name in self.config.specialists}
            declared = configs.to_dict(self.config.specialists)
            routing.save(path, routing.measure(pairs, sets, pairs.rows("dev"), declared=declared))
        return path

    # --- students -----------------------------------------------------------------------------------------------

    def student(self, name: str, seed: int) -> epath.Path:
        """A trained student's run folder: `stage1`, `clip_only`, `clip_only_3x`, or a recipe of stage 2."""
        folder = self.workdir / f"students-{self.captions}" / f"seed{seed}" / name
        steps = self.config.steps
        together = steps.stage1 + steps.stage2
        alone = {"stage1": steps.stage1, "clip_only": together, "clip_only_3x": 3 * together}
        shared = {"captions": self.captions, "name": f"{name} seed {seed}", "rows": "fit", "seed": seed}
        if name in alone:
            config = self._config("stage1_clip.py:demo", steps=alone[name], **shared)
        else:
            address = f"stage2_mmkd.py:demo,recipe={name}"
            config = self._config(address, steps=steps.stage2, own=self.config.stage2, **shared)
            config.unlock()
            config.init = os.fspath(checkpoint.find(self.student("stage1", seed)))
            config.features = os.fspath(self.features())
            config.routing = os.fspath(self.routing()) if name == "plus" else ""
            config.lock()
        return loop.run(config, folder)

    def _config(
        self,
        address: str,
        *,
        captions: str,
        name: str,
        rows: str,
        steps: int,
        seed: int = 0,
        own: Sequence[str] = (),
    ) -> ConfigDict:
        """A run's config: the shipped file with this demo's sizes and places, and the overrides `own`."""
        config = configs.load(f"{CONFIGS / address}", [*self.config.both, *own]).unlock()
        config.name, config.steps, config.seed = name, steps, seed
        config.data.pairs, config.data.rows = os.fspath(self.pairs(captions).path), rows
        kind = config.model.tokenizer.kind
        vocabulary = tokenizers.load(TokenizerSpec(kind=kind), self.vocabulary(kind), context=24)
        config.model.text.vocab_size, config.tokenizer = vocabulary.vocab_size, os.fspath(self.vocabulary(kind))
        return config.lock()


def modality_only(record: SourceRecord) -> Sequence[str]:
    """Captions that tell a labelled picture's modality and nothing else; other pictures keep theirs."""
    return (f"a {record.modality} image.",) if record.label else record.captions


class Clock:
    """Seconds that each part took, kept over restarts in `timing.json`; a part that was whole already adds nothing."""

    def __init__(self, workdir: epath.Path):
        self._path = workdir / "timing.json"
        self.parts: dict[str, float] = io.read_json(self._path) if self._path.exists() else {}

    def run(self, name: str, part: Callable[[], Any]) -> Any:
        """Runs `part` and adds its time under `name`."""
        print(f"== {name}", flush=True)
        begin = time.monotonic()
        result = part()
        self.parts[name] = round(self.parts.get(name, 0.0) + time.monotonic() - begin, 2)
        io.write_json(self._path, self.parts)
        return result


def _in_dev(pairs: PairsSet, rows: np.ndarray, share: float) -> np.ndarray:
    """Whether each row belongs to `dev`: by a hash of its group, so that no group is divided."""
    group = np.asarray(pairs.table["group"])[rows]
    ids = pairs.ids(rows)
    names = [str(int(g)) if g >= 0 else ids[i] for i, g in enumerate(group)]
    return np.array([int(io.sha256(name.encode())[:8], 16) / 2**32 < share for name in names], bool)
