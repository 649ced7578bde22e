"""One page that shows a run: `write_report(path, data)`, and its main plot alone: `main_plot_svg(data)`.

The page is one file: style, charts (SVG) and thumbnails are inside, nothing is loaded from elsewhere, no script runs.
It follows the reader's light or dark theme and fits a phone. All text from data is escaped.

`data` is JSON-like; every field may be left out, and a section without data is not shown:

  title: str, what the page is about in a few words.
  headline: str, the finding in one sentence, with its number and interval.
  lede: str, one or two sentences below it.
  rows: result rows (`mmkd_jax.evals.results.FIELDS`). The set named "mean" (`evals.summary.row`) is shown first.
  models: [{"name", "label", "kind": "student" | "control" | "teacher" | "reference"}], in the order of showing. A
    reference is no model of its own, such as the best teacher of each set. Models of the rows that are not listed come
    last; "teacher:..." is a teacher, anything else a student.
  highlight: str, the name of the model that the page is about; the last student by default.
  datasets: [{"name", "label", "detail"}], in the order of showing.
  comparisons: records of `mmkd_jax.evals.comparison.compare`, a task each: ranks, wins and losses.
  calibration: [{"model", "datasets", "ece", "bins"}], see `report.reliability.measure`.
  cases: [{"model", "dataset", "accuracy", "right": [...], "wrong": [...]}], see `report.examples.cases`.
  differences: [{"label", "value", "low", "high"}], paired differences of means over sets, as shares.
  curves: {run: [(step, {metric: value})]}; curve_metrics: [str], which of them, "loss" by default.
  timings: [(name, seconds)], the stages in their order.
  examples: [{"model", "dataset", "i2t": [...], "t2i": [...]}], see `report.examples.examples`.
  questions: [{"model", "dataset", "accuracy", "right": [...], "wrong": [...]}], see `report.vqa.cases`.
  vqa: [{"dataset", "task", "first", "differences"}], see `report.vqa.measure`.
  provenance: nested {str: value}: commit, versions, device, data hashes, licences.
  notes: [str], what a careful reader should know.
"""

import os
from collections.abc import Mapping
from typing import Any

from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.report.board import Board
from mmkd_jax.report.page import page
from mmkd_jax.report.plot import main_plot

__all__ = ["DATA", "main_plot_svg", "pages", "rebuild", "write_report"]

DATA = "report_data.json"


def write_report(out: str | os.PathLike, data: Mapping[str, Any]) -> None:
    """Writes the page to the file `out`, atomically.

    Raises:
      InputError: `data` does not have the form above.
    """
    io.write_text(out, page(data))


def main_plot_svg(data: Mapping[str, Any], width: int = 1000) -> str:
    """The main plot as an SVG file's text, with its own background, fonts and both themes.

    Raises:
      InputError: `data` does not have the form above, or has no zero-shot scores to show.
    """
    board = Board(data)
    if not board.datasets("zeroshot", "balanced_accuracy"):
        raise InputError("there are no zero-shot balanced accuracies to plot; evaluate the task zeroshot first")
    return main_plot(board, width, alone=True) + "\n"


def pages(folder: str | os.PathLike) -> list[os.PathLike]:
    """Writes all pages of a folder again: those of its studies (survival, diagnosis), and `rebuild` if there is more.

    Raises:
      InputError: as `rebuild`, or a study's record is damaged.
    """
    from mmkd_jax.evals import results, studies
    from mmkd_jax.report import telemetry

    folder, told = io.as_path(folder), studies.rebuild(folder)
    more = not told or any((folder / name).exists() for name in (DATA, telemetry.FILE))
    if not more and (folder / "results.json").exists():
        rows = results.load(folder / "results.json")
        more = any(row["task"].partition("_")[0] not in studies.STUDIES for row in rows)
    return [*told, rebuild(folder)] if more else told


def rebuild(folder: str | os.PathLike) -> os.PathLike:
    """Writes FOLDER/report.html from FOLDER/report_data.json, or from what mmkd eval left, or mmkd train.

    Returns:
      The page's path.

    Raises:
      InputError: the folder holds nothing of these.
    """
    from mmkd_jax.report import evaluation, telemetry

    folder = io.as_path(folder)
    if (folder / DATA).exists():
        data = io.read_json(folder / DATA)
        if not isinstance(data, dict):
            raise InputError(f"{folder / DATA} does not hold a report's data")
    elif (folder / "results.json").exists():
        data = evaluation.gather(folder)
        if (folder / telemetry.FILE).exists():  # evaluated into the run's own folder
            data |= telemetry.beside(telemetry.gather(folder), data.get("provenance", {}))
    elif (folder / telemetry.FILE).exists():
        io.write_text(folder / "report.html", telemetry.page(telemetry.gather(folder)))
        return folder / "report.html"
    else:
        raise InputError(
            f"{folder} has no {DATA} and no results.json, and is no run of mmkd train; run mmkd demo, mmkd eval or "
            "mmkd train into it first"
        )
    write_report(folder / "report.html", data)
    return folder / "report.html"
