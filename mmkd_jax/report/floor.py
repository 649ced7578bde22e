"""Which models find less in a set's pictures than its pixels tell, and whether that could be chance."""

import os
from collections.abc import Mapping, Sequence

from mmkd_jax.errors import InputError
from mmkd_jax.evals import comparison
from mmkd_jax.evals.floor import FLOOR

TASK, METRIC = "linear_probe", "balanced_accuracy"
WHY = "its features have lost some of the colour and coarse shape that tell these classes apart"


def shortfalls(out: str | os.PathLike, rows: Sequence[Mapping]) -> list[str]:
    """A sentence for each model of the folder `out` that is below the floor somewhere; none where no floor was run."""
    scores = {(row["model"], row["dataset"]): row for row in rows if (row["task"], row["metric"]) == (TASK, METRIC)}
    floors = {dataset: row["value"] for (model, dataset), row in scores.items() if model == FLOOR}
    below: dict[str, list[Mapping]] = {}
    for (model, dataset), row in scores.items():
        if row["value"] < floors.get(dataset, 0.0):
            below.setdefault(model, []).append(row)
    return [_sentence(out, model, found, floors) for model, found in below.items()]


def _sentence(out: str | os.PathLike, model: str, below: Sequence[Mapping], floors: Mapping[str, float]) -> str:
    found = [_against_floor(out, row, floors[row["dataset"]]) for row in below]
    parts = [
        (f"beyond chance on {', '.join(text for text, sure in found if sure)}: {WHY}", any(sure for _, sure in found)),
        (
            f"too few cases to say so on {', '.join(text for text, sure in found if not sure)}",
            not all(s for _, s in found),
        ),
    ]
    return f"{model} is below {FLOOR} in {TASK}, {'; '.join(text for text, told in parts if told)}"


def _against_floor(out: str | os.PathLike, row: Mapping, floor: float) -> tuple[str, bool]:
    """A set's numbers, and whether its cases, paired, leave no doubt that the floor is higher."""
    said = f"{row['dataset']} {row['value']:.3f} against {floor:.3f}"
    try:
        pair = [comparison.Contestant(os.fspath(out), name, name) for name in (row["model"], FLOOR)]
        found = comparison.compare(pair, task=TASK, metric=METRIC, sets=[row["dataset"]], resamples=1000)
    except InputError:  # its outputs are not kept, or are of other rows
        return said, False
    (one,) = found["sets"][0]["differences"]
    if one is None:
        return said, False
    return f"{said} ({one['value']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}], n={row['n']})", one["high"] < 0
