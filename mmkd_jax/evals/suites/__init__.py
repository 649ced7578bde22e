"""Suites: named lists of sets that are evaluated together, and the means that are taken over them.

One JSON file a suite, called NAME.json:

    {"title": "...", "sets": ["pathmnist", ...], "tasks": ["zeroshot", "multilabel"], "evidence": "...",
     "means": [{"name": "zero-shot AUC", "of": [["zeroshot", "macro_auc"], ["multilabel", "macro_auc"]]}]}

`tasks` are those of `mmkd eval`; sets of patients and slides are evaluated by their own. A mean is taken over the first
of its (task, metric) that a set has, over all sets of the suite or those it names in `sets`, each counting alike; where
a set is absent there is no mean, and what is absent is said. A metric that ends in `_` stands for the one that begins
so.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.errors import InputError, near
from mmkd_jax.evals import sets


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean: its name, the (task, metric) it is of, and the names of the sets it is over."""

    name: str
    of: tuple[tuple[str, str], ...]
    sets: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Suite:
    """A named list of sets with the tasks they are evaluated in, the means over them, and where the list was seen."""

    name: str
    title: str
    sets: tuple[str, ...]
    tasks: tuple[str, ...]
    means: tuple[Mean, ...]
    evidence: str

    def located(self, folder: str, roots: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
        """Folder by name of the sets that are there, and the names of those that are absent.

        Args:
          folder: holds sets as folders of their names, or has the files of a set right in it; "" for none.
          roots: folders of single sets, which count before `folder`.

        Raises:
          InputError: `folder` is not there, a root is of no set of the suite, or nothing is there.
        """
        for name in roots:
            if name not in self.sets:
                raise InputError(f"the set {name!r} is not in the suite {self.name}; {near(name, self.sets)}")
        if folder and not io.as_path(folder).is_dir():
            raise InputError(f"{folder} does not exist; give the folder that holds the sets of {self.name}")
        found = {name: roots.get(name) or (_below(folder, name) if folder else "") for name in self.sets}
        there = {name: root for name, root in found.items() if root}
        if not there:
            raise InputError(f"none of the {len(self.sets)} sets of {self.name} is in {folder or 'what --set names'}; "
                             f"they lie in folders of their names: {', '.join(self.sets[:3])}, ...")  # fmt: skip
        return there, tuple(name for name in self.sets if name not in there)


def known() -> dict[str, Suite]:
    """The suites by name."""
    return {name: _read(name) for name in _names()}


def find(name: str) -> Suite:
    """The suite of that name.

    Raises:
      InputError: there is none.
    """
    if name not in _names():
        raise InputError(f"no suite is called {name!r}; {near(name, _names())}")
    return _read(name)


def means(suite: Suite, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The suite's means of every model that has a part of them.

    Args:
      suite: the suite.
      rows: of `results.json`.

    Returns:
      By mean and model: `name`, `model`, `value` (None where a set is absent), `of` (value by set), `absent` (names).

    Raises:
      InputError: the rows hold two numbers for one (of two profiles of prompts, say).
    """
    found = []
    for mean in suite.means:
        by_model: dict[str, dict[str, float]] = {}
        for task, metric in reversed(mean.of):  # those named first count
            meant = [row for row in rows if row["task"] == task and _is(row["metric"], metric)]
            seen = set()
            for row in [row for row in meant if row["dataset"] in mean.sets]:
                if (what := (row["model"], row["dataset"])) in seen:
                    raise InputError(f"the results hold two numbers for {mean.name} of {what[0]} on {what[1]}; "
                                     "evaluate the suite into a folder of its own")  # fmt: skip
                seen.add(what)
                by_model.setdefault(row["model"], {})[row["dataset"]] = row["value"]
        for model, values in by_model.items():
            absent = [name for name in mean.sets if name not in values]
            value = None if absent else sum(values.values()) / len(values)
            of = {name: values[name] for name in mean.sets if name in values}
            found.append({"name": mean.name, "model": model, "value": value, "of": of, "absent": absent})
    return found


def lines(suite: Suite, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is printed of means: one line each, and why there is none."""
    said = []
    for one in found:
        total = len(one["of"]) + len(one["absent"])
        if one["value"] is None:
            what = f"no mean: {len(one['absent'])} of {total} sets are absent ({', '.join(one['absent'])})"
        else:
            what = f"{one['value']:.3f} over {total} sets"
        said.append(f"{one['model']:24} {suite.name}: {one['name']}: {what}")
    return said


def _is(metric: str, wanted: str) -> bool:
    return metric == wanted or (wanted.endswith("_") and metric.startswith(wanted) and metric[len(wanted) :].isdigit())


def _below(folder: str, name: str) -> str:
    """Where the set lies: in a folder of its name, or right in `folder` if all that its layout names is there."""
    here, record = io.as_path(folder), sets.known()[name]
    if (here / name).exists():
        return str(here / name)
    given = record.layout.get("input") or record.layout.get("files") or []
    patterns = [given] if isinstance(given, str) else given
    return str(here) if patterns and all(any(here.glob(pattern)) for pattern in patterns) else ""


@functools.cache
def _names() -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in pathlib.Path(__file__).parent.glob("*.json")))


@functools.cache
def _read(name: str) -> Suite:
    told = json.loads((pathlib.Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    listed = tuple(told["sets"])
    made = [
        Mean(one["name"], tuple((task, metric) for task, metric in one["of"]), tuple(one.get("sets", listed)))
        for one in told["means"]
    ]
    return Suite(name, told["title"], listed, tuple(told["tasks"]), tuple(made), told["evidence"])
