"""A training run at a glance: lines for a terminal, and the page of a run's folder."""

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.planning import devices
from mmkd_jax.report import bars, curves
from mmkd_jax.report.board import Board
from mmkd_jax.report.document import document
from mmkd_jax.report.markup import Markup, duration, element, number
from mmkd_jax.train import commits, folder, ledger, metrics
from mmkd_jax.train.evaluation import SECONDS
from mmkd_jax.train.retention import EVALUATED

FILE = ledger.FILE
WORDS = {
    "train": "training",
    "input": "waiting for input",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "compile": "compilation",
    "start": "start",
    "log": "metrics and traces",
    "lost": "lost to restarts",
}
WIDTH, BLOCKS = 40, "▁▂▃▄▅▆▇█"  # of bars and sparklines in a terminal


@dataclasses.dataclass(frozen=True)
class Glance:
    """What a run's folder says of it.

    Attributes:
      name: of the folder.
      state: `running`, or how the last process ended.
      heard: seconds since the run last wrote.
      totals: see `ledger`.
      machine: devices in words.
      memory: bytes that a device has, None where unknown.
      left: seconds to go at the mean pace, None where nothing is known or left.
      history: lines of `metrics.jsonl`.
      checkpoints: steps of those that are whole.
      provenance: of the run's first process, what a page tells of it.
    """

    name: str
    state: str
    heard: float
    totals: ledger.Totals
    machine: str
    memory: int | None
    left: float | None
    history: Sequence[Mapping[str, float]]
    checkpoints: Sequence[int]
    provenance: Mapping[str, Any]


def gather(path: str | os.PathLike, now: float | None = None) -> Glance:
    """Reads a run's folder; `now` is seconds since 1970, the present unless given.

    Raises:
      InputError: it is not a run's, or the run has not come so far as to train.
    """
    run = io.as_path(path)
    segments = ledger.read(run)
    if not segments:
        raise InputError(f"{run} has no {FILE}; name the folder of an mmkd train that has begun to train")
    totals, head = ledger.totals(segments), segments[-1].head
    last = segments[-1].lines[-1] if segments[-1].lines else head
    known = devices.of_kind(head["kind"])
    paced = sum(value for name, value in totals.seconds.items() if name not in ledger.SETUP)
    made = folder.PROVENANCE
    return Glance(
        name=run.name,
        state=last.get("end", "running"),
        heard=(time.time() if now is None else now) - last["time"],
        totals=totals,
        machine=f"{head['devices']} x {known.title if known else head['kind']}",
        memory=head["memory"],
        left=paced / totals.step * (totals.steps - totals.step) if 0 < totals.step < totals.steps else None,
        history=metrics.read(run),
        checkpoints=commits.committed(run / commits.FOLDER),
        provenance=io.read_json(run / made) if (run / made).exists() else {},
    )


def lines(glance: Glance) -> list[str]:
    """The run in a few lines for a terminal."""
    totals = glance.totals
    share = totals.step / totals.steps
    filled = round(WIDTH * share)
    pace = f", {duration(glance.left)} to go at this pace" if glance.left is not None else ""
    shown = [
        f"{glance.name}: {_state(glance)}",
        f"{'█' * filled}{'░' * (WIDTH - filled)} step {totals.step:,} of {totals.steps:,} ({100 * share:.0f} %){pace}",
        ", ".join(_speed(glance)),
        ", ".join(_use(glance)),
        "time: " + ", ".join(f"{WORDS[name]} {_percent(value)}" for name, value in _shares(totals)),
    ]
    losses = [line["loss"] for line in glance.history if "loss" in line]
    if losses:
        shown.append(f"loss {number(losses[-1])}  {sparkline(losses)}  from {number(losses[0])}")
    last = glance.history[-1] if glance.history else {}
    if "grad_norm" in last:
        parts = [f"{name.partition('/')[2]} {number(last[name])}" for name in _by_tower(last)]
        shown.append(f"gradient norm {number(last['grad_norm'])}" + (f" ({', '.join(parts)})" if parts else ""))
    judged = next((line for line in reversed(glance.history) if _judged(line)), None)
    if judged:
        shown.append(f"evaluation after step {judged['step']:,}")
        shown += [f"  {name.removeprefix(EVALUATED)} {judged[name]:.3f}" for name in _judged(judged)]
    steps = ", ".join(f"{step:,}" for step in glance.checkpoints)
    return [*shown, f"checkpoints: {steps}" if steps else "no checkpoint yet"]


def beside(glance: Glance, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What the page of an evaluation (see `mmkd_jax.report`) tells of the run that was evaluated."""
    shares = ", ".join(f"{WORDS[name]} {_percent(value)}" for name, value in _shares(glance.totals))
    told = {"speed": ", ".join(_speed(glance)), "use": ", ".join(_use(glance)), "time": shares}
    return {"curves": {glance.name: _points(glance)}, "provenance": {**provenance, "training": told}}


def page(glance: Glance) -> str:
    """The whole document as text; it loads nothing from elsewhere."""
    totals = glance.totals
    header = element(
        "header",
        element("p", "mmkd_jax training", class_="kicker"),
        element("h1", glance.name),
        element("p", f"{glance.state.capitalize()}: {', '.join(_use(glance))}.", class_="lede"),
        element("div", _tiles(glance), class_="tiles"),
    )
    timings = [(WORDS[name], share * sum((*totals.seconds.values(), totals.lost))) for name, share in _shares(totals)]
    mine = _points(glance)
    names = list(dict.fromkeys(name for _, values in mine for name in values))
    judged = [name for name in names if name.startswith(EVALUATED)]
    losses = [name for name in names if name == "loss" or name.startswith("loss/")]
    norms = [name for name in names if name.startswith("grad_norm")]
    speeds = [name for name in names if name == "pairs_per_second"]
    told = {name: glance.provenance[name] for name in ("commit", "versions", "devices") if name in glance.provenance}
    return document(
        glance.name,
        header,
        _section("Where the time went", _TIME, element("div", bars.timeline(timings), class_="panel padded")),
        _section("Losses", _CURVES, _multiples(mine, losses)),
        _section("Gradient norms", "Of all parameters, and of each tower's or head's.", _multiples(mine, norms)),
        _section("Speed", "Pairs a second while it trained or waited for input.", _multiples(mine, speeds)),
        _section("Evaluations during training", None, _multiples(mine, judged)),
        _section("Made with", None, _facts(told)) if told else None,
    )


_TIME = (
    "Each update counts once. Lost is what an undisturbed run would not have spent: steps that were made again, and "
    "starting and compiling again. Input counts as far as the devices had nothing else to do."
)
_CURVES = "Thin: as logged. Thick: running mean. Each panel has its own scale."


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Values as blocks of eight heights, means of equal stretches where there are more than `width`."""
    values = [value for value in values if math.isfinite(value)]
    count = min(width, len(values))
    edges = [place * len(values) // count for place in range(count + 1)] if count else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * (mean - low) / ((high - low) or 1.0))] for mean in means)


def _state(glance: Glance) -> str:
    return f"{glance.state}, heard of {duration(max(glance.heard, 0.0))} ago"


def _speed(glance: Glance) -> list[str]:
    rates = [line["pairs_per_second"] for line in glance.history if "pairs_per_second" in line]
    now = f" (now {number(rates[-1])})" if rates else ""
    return [f"{glance.totals.pairs:,} pairs", f"{number(glance.totals.rate)} pairs/s{now}", glance.machine]


def _use(glance: Glance) -> list[str]:
    """Utilisation, device-hours, memory, disturbances: what is known of them."""
    totals, known = glance.totals, []
    if totals.mfu:
        known.append(f"MFU {_percent(totals.mfu[0])} while training, {_percent(totals.mfu[1])} in all")
    known.append(f"{number(totals.device_seconds / 3600)} device-hours")
    if totals.memory:
        of = f" of {glance.memory / 2**30:.1f}" if glance.memory else ""
        known.append(f"device memory {totals.memory / 2**30:.1f}{of} GiB")
    known.append(f"host memory {totals.host / 2**30:.1f} GiB")
    for count, word in ((totals.attempts - 1, "restart"), (totals.rollbacks, "roll-back")):
        known += [f"{count} {word}{'s' if count > 1 else ''}"] if count else []
    return known


def _shares(totals: ledger.Totals) -> list[tuple[str, float]]:
    """Shares of all time, training first, without what took none."""
    return [(name, totals.shares[name]) for name in WORDS if totals.shares[name] > 0 or name == "train"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _by_tower(line: Mapping[str, float]) -> list[str]:
    return [name for name in line if name.startswith("grad_norm/")]


def _judged(line: Mapping[str, float]) -> list[str]:
    """The evaluation's means over sets, or all it has where there are none."""
    names = [name for name in line if name.startswith(EVALUATED)]
    return [name for name in names if name.startswith(f"{EVALUATED}mean/")] or names


def _points(glance: Glance) -> list[tuple[float, dict[str, float]]]:
    """Step and scalars of each logged line."""
    return [(line["step"], {k: v for k, v in line.items() if k not in ("step", SECONDS)}) for line in glance.history]


def _tiles(glance: Glance) -> list[Markup]:
    totals = glance.totals
    found = [
        ("lead", f"{totals.step:,}", f"of {totals.steps:,}", "steps"),
        ("", number(totals.rate), "pairs/s", "while it trained or waited for input"),
        ("", f"{100 * totals.shares['train']:.0f}", "%", "of all time spent on training"),
    ]
    if totals.mfu:
        found.append(("", f"{100 * totals.mfu[0]:.0f}", "%", "MFU: useful FLOPs of what the devices could have made"))
    found.append(("", number(totals.device_seconds / 3600), "h", f"device-hours on {glance.machine}"))
    return [
        element("div", element("strong", value, element("small", f" {unit}")), element("span", text),
                class_=f"tile {kind}".strip())
        for kind, value, unit, text in found
    ]  # fmt: skip


def _multiples(points: Sequence[tuple], names: Sequence[str]) -> Markup | None:
    drawn = [panel for name in names for panel in curves.panels(Board({}), {name: points}, [name])]
    figures = [element("figure", one, class_="panel") for one in drawn]
    return element("div", figures, class_="multiples") if drawn else None


def _section(title: str, lede: str | None, shown: Markup | None) -> Markup | None:
    if not shown:
        return None
    return element("section", element("h2", title), element("p", lede, class_="lede") if lede else None, shown)


def _facts(record: Mapping[str, Any]) -> Markup:
    rows = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {text}" for key, text in value.items())
        elif isinstance(value, list | tuple):
            value = ", ".join(f"{value.count(one)} x {one}" for one in dict.fromkeys(value))
        rows.append(element("div", element("dt", name), element("dd", value)))
    return element("dl", rows)
