"""Described sets of patients with survival times, and the bags of pictures' features that belong to each.

A layout has the source `patients`, a table (`mmkd_jax.evals.set_tables`) and:

    columns     theirs by ours: patient, time, event, and where they are there site, fold, split
    events      1 (seen) or 0 (not seen) by what the column of events says; by default those numbers
    covariates  columns, each with its levels in order, or with an empty list where it holds numbers
    unit        of the times: months (default) or days
    bag         path of a row's feature file or folder of tiles, with columns in braces ("features/{slide_id.stem}.npy")
    slides      column that holds several slides' names, and what is between them (["slide_ids", ";"]); `bag` then has
                {slide} for each

A patient may have several rows, one a slide, which must agree in time and event.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmkd_jax.errors import InputError, near
from mmkd_jax.evals import set_tables, sets
from mmkd_jax.evals.set_tables import text
from mmkd_jax.evals.survival_curves import Outcomes
from mmkd_jax.evals.survival_table import Patients


@dataclasses.dataclass(frozen=True, eq=False)
class Cohort:
    """Patients and what there is to look at of each.

    Attributes:
      patients: `columns` holds `site`, `fold` and `split` as far as the set has them.
      bags: paths below the root by patient, in their order; empty where the set names none.
      left_out: lines about rows without time or event.
    """

    patients: Patients
    bags: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...]


def read(record: sets.SetRecord, root: str) -> Cohort:
    """The patients of a set.

    Raises:
      InputError: a file, a column or a level is missing, an event or a time is no such thing, rows of a patient
        contradict one another, or nothing is left.
    """
    layout = record.layout
    first: dict[str, dict[str, Any]] = {}
    bags: dict[str, list[str]] = {}
    left_out = []
    for row in sets.table_rows(record, root, ("patient", "time", "event", *layout.get("covariates", ()))):
        told = _told(row, layout)
        if told is None:
            left_out.append(f"{row['where_from']}: no time or no event")
            continue
        known = first.setdefault(text(row, "patient"), told)
        if (known["time"], known["event"]) != (told["time"], told["event"]):
            raise InputError(f"{row['where_from']}: another time or event than in {known['row']['where_from']}")
        bags.setdefault(text(row, "patient"), []).extend(_bags(row, layout))
    if not first:
        raise InputError(f"set {record.name}: no row has a time and an event")
    return Cohort(_patients(first, layout), tuple(map(tuple, bags.values())), tuple(left_out))


def _told(row: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, Any] | None:
    """Time and event of a row, None where one is missing."""
    time, event = text(row, "time"), text(row, "event")
    if "" in (time, event) or "NA" in (time, event):
        return None
    events = layout.get("events", {"1": 1, "0": 0, "1.0": 1, "0.0": 0})
    if event not in events:
        raise InputError(f"{row['where_from']}: the event {event!r} is unknown; {near(event, events)}")
    try:
        seconds = float(time)
    except ValueError:
        raise InputError(f"{row['where_from']}: the time {time!r} is no number") from None
    if not seconds > 0:
        raise InputError(f"{row['where_from']}: the time is {time}, not above zero; leave the patient out by `where`")
    if not text(row, "patient"):
        raise InputError(f"{row['where_from']}: the patient has no name")
    return {"time": seconds, "event": bool(events[event]), "row": row}


def _patients(first: Mapping[str, Mapping[str, Any]], layout: Mapping[str, Any]) -> Patients:
    rows = [told["row"] for told in first.values()]
    outcomes = Outcomes(np.array([t["event"] for t in first.values()]), np.array([t["time"] for t in first.values()]))
    covariates = layout.get("covariates", {})
    numbers = [[_number(row, name, levels) for name, levels in covariates.items()] for row in rows]
    kept = [name for name in ("site", "fold", "split") if name in layout.get("columns", {})]
    columns = {name: np.array([text(row, name) for row in rows]) for name in kept}
    shape = (len(rows), len(covariates))
    return Patients(np.array(list(first)), outcomes, np.array(numbers).reshape(shape), tuple(covariates), columns)


def _number(row: Mapping[str, Any], name: str, levels: Sequence[str]) -> float:
    """The covariate; levels are numbered from 0, and any other word is missing."""
    word = text(row, name)
    if levels:
        return float(levels.index(word)) if word in levels else np.nan
    try:
        return float(word) if word not in ("", "NA") else np.nan
    except ValueError:
        raise InputError(f"{row['where_from']}: {name} is {word!r}, no number; give its levels in order") from None


def _bags(row: Mapping[str, Any], layout: Mapping[str, Any]) -> list[str]:
    if "bag" not in layout:
        return []
    if "slides" not in layout:
        return [set_tables.place(layout["bag"], row)]
    column, between = layout["slides"]
    names = [name.strip() for name in text(row, column).split(between) if name.strip()]
    return [set_tables.place(layout["bag"], {**row, "slide": name}) for name in names]
