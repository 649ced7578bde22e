"""Described sets of patients and slides, evaluated as the studies of configs/survival.py and configs/diagnosis.py.

Their tables are rewritten in the form that those configs read, below OUT/sets/NAME; numbers are the studies' own.
"""

import csv
import io as memory
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax import io
from mmkd_jax.data.sources import Skipped
from mmkd_jax.errors import InputError
from mmkd_jax.evals import patient_sets, sets, slide_sets, studies
from mmkd_jax.evals.sets import SetRecord

_CONFIGS = pathlib.Path(__file__).parents[3] / "configs"
TIMES = {"months": (12.0, 36.0, 60.0), "days": (365.0, 1096.0, 1826.0)}  # at which the AUC is told: 1, 3 and 5 years


def run(
    roots: Mapping[str, str], out: epath.Path, encoders: Callable[[], Iterable[Any]], *, resamples: int, seed: int
) -> None:
    """Evaluates each set; rows go to OUT/results.json, and a page of each to OUT/NAME.html.

    Args:
      roots: folder by name of the set.
      out: folder of results.
      encoders: gives the encoders of tiles anew at each call.
      resamples, seed: of the intervals.

    Raises:
      InputError: a set is not as its record says, or nothing encodes its slides.
    """
    described = {name: _DESCRIBED[sets.known()[name].task](sets.known()[name], root, out / "sets" / name)
                 for name, root in roots.items()}  # fmt: skip
    for config in described.values():  # all that is wrong with a table shows before the work
        needed = config.task == "diagnosis" and not config.features
        studies.run(config, out, encoders() if needed else (), resamples=resamples, seed=seed)


def survival(record: SetRecord, root: str, folder: epath.Path) -> ConfigDict:
    """The study of a set of patients: Cox regression on its covariates and, where there are, on mean features.

    Folds are the set's, or keep its sites whole; where it has neither, only patients.

    Raises:
      InputError: the table is not as the record says, or there is nothing to predict from.
    """
    cohort = patient_sets.read(record, root)
    patients, bags = cohort.patients, [[io.as_path(root) / path for path in of] for of in cohort.bags]
    slides = bool(bags) and all(path.exists() for of in bags for path in of) and any(bags)
    config = configs.load(str(_CONFIGS / "survival.py"))
    config.name, config.root, config.table = record.name, str(folder), "patients.csv"
    config.id, config.time, config.event = "patient", "time", "event"
    config.unit = record.layout.get("unit", "months")
    config.times = TIMES[config.unit]
    config.cohort, config.cohorts, config.clinical = "", (), patients.names
    config.fold, config.site = ("fold" if "fold" in patients.columns else ""), "site"
    config.cox = tuple(name for name, there in (("clinical", patients.names), ("slides", slides)) if there)
    if slides:
        config.slides, config.slide_column = str(bags[0][0].parent), "slides"
    if not config.cox:
        raise InputError(f"set {record.name}: there are neither covariates nor features of slides to predict from")
    site, fold = patients.columns.get("site", patients.ids), patients.columns.get("fold", patients.ids)
    rows = [["patient", "time", "event", "site", "fold", "slides", *patients.names]]
    for k, patient in enumerate(patients.ids):
        outcome = (repr(float(patients.outcomes.time[k])), int(patients.outcomes.event[k]))
        numbers = ["" if value != value else repr(float(value)) for value in patients.covariates[k]]
        rows.append([patient, *outcome, site[k], fold[k], ";".join(path.name for path in bags[k]), *numbers])
    _write(folder / "patients.csv", rows)
    return config


def diagnosis(record: SetRecord, root: str, folder: epath.Path) -> ConfigDict:
    """The study of a set of slides: attention over tiles, and a probe on the mean tile.

    Slides are linked to from one folder, since those of a set may lie in several.

    Raises:
      InputError: a slide is missing, or two have one name.
    """
    slides = list(slide_sets.read(record, root))
    if absent := [one for one in slides if isinstance(one, Skipped)]:
        raise InputError(
            f"set {record.name}: {len(absent)} of {len(slides)} slides are missing, first {absent[0].reason}"
        )
    paths = {one.slide: epath.Path(one.path) for one in slides}
    suffixes = {path.suffix for path in paths.values() if not path.is_dir()}
    if len(suffixes) > 1:
        raise InputError(f"set {record.name}: its slides are files of several kinds ({', '.join(sorted(suffixes))})")
    stems = {slide: path.name if path.is_dir() else path.stem for slide, path in paths.items()}
    if len(set(stems.values())) < len(stems):
        raise InputError(f"set {record.name}: two slides lie in files of one name; rename one")
    for path in paths.values():
        _link(path, folder / "slides" / path.name)
    config = configs.load(str(_CONFIGS / "diagnosis.py"))
    config.name, config.root, config.table = record.name, str(folder), "slides.csv"
    config.path, config.classes = f"slides/{{slide}}{next(iter(suffixes), '')}", record.classes.names
    if suffixes == {".npy"}:
        config.features = str(folder / "slides")
    about = [[stems[one.slide], one.patient, record.classes.names[one.label], one.split] for one in slides]
    _write(folder / "slides.csv", [["slide", "patient", "label", "split"], *about])
    return config


_DESCRIBED = {"survival": survival, "diagnosis": diagnosis}


def _link(target: epath.Path, place: epath.Path) -> None:
    """Makes `place` a link to `target`, or to this one if it was to another."""
    if "://" in str(place):
        raise InputError(f"{place.parent} cannot hold links to slides; give --out a folder on a disk of this machine")
    here = pathlib.Path(place)
    here.parent.mkdir(parents=True, exist_ok=True)
    here.unlink(missing_ok=True)
    here.symlink_to(pathlib.Path(target).resolve())


def _write(path: epath.Path, rows: Sequence[Sequence[Any]]) -> None:
    text = memory.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    io.write_text(path, text.getvalue())
