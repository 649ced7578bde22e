"""Every model of a demo on every set, and the comparison that the demo is about."""

import dataclasses
import os
from collections.abc import Sequence

from etils import epath

from mmkd_jax import api, io
from mmkd_jax.demo.pipeline import Demo
from mmkd_jax.errors import InputError
from mmkd_jax.evals import base, bootstrap, results, summary
from mmkd_jax.evals.floor import FLOOR, PixelFloor

TASK, METRIC = "zeroshot", "balanced_accuracy"
BEST = "teachers:best_per_set"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Results of a demo: `rows` as in results.json, and where the per-sample predictions lie.

    Attributes:
      demo: what was run.
      out: folder with results.json and predictions/.
      sets: the evaluation sets.
      scored: names of those in the mean.
    """

    demo: Demo
    out: epath.Path
    sets: list[base.EvalSet]
    scored: list[str]

    @classmethod
    def of(cls, demo: Demo) -> "Scores":
        """The sets that are there: the config's where it finds them, otherwise every set with classes."""
        pairs = demo.pairs()
        sets = base.sets_of(pairs)
        classified = [s.name for s in sets if s.class_names]
        wanted = {*demo.config.scored, *demo.config.beside}
        if wanted & set(classified):
            sets = [s for s in sets if s.name in wanted or not s.class_names]
            scored = [name for name in demo.config.scored if name in classified]
        else:
            scored = classified
        out = demo.workdir if demo.captions == "label" else demo.workdir / demo.captions
        return cls(demo, out, sets, scored)

    @property
    def path(self) -> epath.Path:
        """The results file."""
        return self.out / "results.json"

    @property
    def rows(self) -> list[dict]:
        """Rows so far."""
        return results.load(self.path) if self.path.exists() else []

    def teacher(self, name: str) -> None:
        """Evaluates one teacher, as it is read back from its exported folder."""
        import teachers

        loaded = teachers.load(name, weights=self.demo.teacher(name))
        self._evaluate(teachers.as_encoder(loaded, f"teacher:{name}"), f"teacher:{name}", 0)

    def student(self, name: str, seed: int) -> None:
        """Evaluates one student; its rows are called `name` with its training seed."""
        folder = self.demo.student(name, seed)
        self._evaluate(api.load(folder, name=f"{name}.seed{seed}"), name, seed)

    def floor(self) -> None:
        """Evaluates the pixel floor."""
        self._evaluate(PixelFloor(), FLOOR, 0, tasks=("linear_probe",))

    def _evaluate(self, encoder: base.Encoder, model: str, seed: int, tasks: Sequence[str] = tuple(base.TASKS)) -> None:
        if any(row["model"] == model and row["seed"] == seed for row in self.rows):
            return
        rows = base.run(
            encoder,
            self.demo.pairs(),
            self.sets,
            self.out,
            tasks=tasks,
            bootstrap=self.demo.config.bootstrap,
            probe_layer="pooled" if tasks != ("linear_probe",) else "embedding",
        )
        checkpoint = os.path.relpath(encoder.checkpoint, os.fspath(self.demo.workdir)) if encoder.checkpoint else ""
        results.update(self.path, [{**row, "model": model, "seed": seed, "checkpoint": checkpoint} for row in rows])

    @property
    def _resamples(self) -> int:
        return self.demo.config.bootstrap

    @property
    def _options(self) -> dict:
        return {"task": TASK, "metric": METRIC, "resamples": self._resamples}

    # --- the comparison -----------------------------------------------------------------------------------------

    def summarise(self) -> None:
        """Adds each model's mean over the scored sets, the best teacher of each set, and writes `summary.json`."""
        if not self.scored:
            raise InputError("none of the data sets has classes and a test split; give at least one labelled set")
        config, seeds = self.demo.config, range(self.demo.seeds)
        teachers = [f"teacher:{name}" for name in config.specialists]
        best, rows = self._best(teachers)
        rows += [self._mean(name, [name]) for name in teachers]
        rows += [self._mean(name, [f"{name}.seed{s}" for s in seeds]) for name in ("stage1", *config.students)]
        results.update(self.path, rows)
        record = {
            "metric": f"mean {TASK} {METRIC} over {', '.join(self.scored)}",
            "captions": self.demo.captions,
            "seeds": self.demo.seeds,
            "mean": {row["model"]: [row["value"], row["low"], row["high"]] for row in rows if row["dataset"] == "mean"},
            "plus_minus": {name: self._difference("plus", name) for name in config.students if name != "plus"},
            "plus_share_of_best": self._value("plus") / best.value,
        }
        io.write_json(self.out / "summary.json", record)

    def _best(self, teachers: list[str]) -> tuple[bootstrap.Estimate, list[dict]]:
        """The best teacher of each set, chosen on the very test split: an upper reference, not a method."""
        rows, estimates = [], []
        for one in (s for s in self.sets if s.class_names):
            winner = summary.best(self.rows, teachers, one.name, TASK, METRIC)
            rows.append({**winner, "model": BEST, "context": {**winner["context"], "teacher": winner["model"]}})
            if one.name in self.scored:
                of_winner = summary.estimates(self.out, winner["model"], one.name, TASK, resamples=self._resamples)[0]
                estimates.append(of_winner[METRIC])
        mean = bootstrap.mean_over_sets(estimates)
        template = summary.row(self.out, teachers[0], self.scored, name=BEST, **self._options)
        low, high = mean.interval()
        chosen = {row["dataset"]: row["context"]["teacher"] for row in rows}
        context = {**template["context"], "models": chosen}
        return mean, [*rows, {**template, "value": mean.value, "low": low, "high": high, "context": context}]

    def _mean(self, name: str, models: list[str]) -> dict:
        return summary.row(self.out, models, self.scored, name=name, **self._options)

    def _value(self, name: str) -> float:
        models = [f"{name}.seed{s}" for s in range(self.demo.seeds)]
        return summary.mean(self.out, models, self.scored, **self._options).value

    def _difference(self, name: str, other: str) -> dict:
        """`name` minus `other`: the mean with its paired interval, and each seed."""
        pairs = [(f"{name}.seed{s}", f"{other}.seed{s}") for s in range(self.demo.seeds)]
        mine, theirs = zip(*pairs, strict=True)
        whole = summary.difference(self.out, mine, theirs, self.scored, **self._options)
        each = [summary.difference(self.out, a, b, self.scored, **self._options).value for a, b in pairs]
        low, high = whole.interval()
        return {"value": whole.value, "low": low, "high": high, "each_seed": each}
