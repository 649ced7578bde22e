"""Bars in plain HTML, which reflow on a phone: paired differences, and where the time went."""

from collections.abc import Mapping, Sequence

from mmkd_jax.errors import InputError
from mmkd_jax.report.markup import Markup, duration, element, signed

MOST_STAGES = 14


def differences(records: Sequence[Mapping]) -> Markup:
    """Paired differences with their intervals around zero.

    Args:
      records: `{"label", "value", "low", "high"}` each, shares.
    """
    for record in records:
        if set(record) != {"label", "value", "low", "high"}:
            raise InputError(f"a difference must have label, value, low and high, not {sorted(record)}")
    reach = max([abs(record[k]) for record in records for k in ("low", "high")] + [0.01]) * 1.05
    items = []
    for record in records:
        place = {k: 50 + 50 * record[k] / reach for k in ("value", "low", "high")}
        sure = "up" if record["low"] > 0 else "down" if record["high"] < 0 else "even"
        bar = element("i", style=f"left:{place['low']:.2f}%;width:{place['high'] - place['low']:.2f}%")
        dot = element("b", style=f"left:{place['value']:.2f}%")
        words = element(
            "span", signed(record["value"]), element("small", f"{signed(record['low'])} to {signed(record['high'])}")
        )
        items.append(
            element(
                "li", element("em", record["label"]), element("div", bar, dot, class_="track zero"), words, class_=sure
            )
        )
    return element("ul", items, class_="bars differences")


def timeline(timings: Sequence[tuple[str, float]]) -> Markup:
    """Stages one after the other on the clock of the whole run.

    Beyond `MOST_STAGES`, stages that differ only in what stands in brackets ("train plus (seed 1)") are added up.
    """
    if len(timings) > MOST_STAGES:
        sums: dict[str, float] = {}
        for name, seconds in timings:
            sums[name.partition(" (")[0]] = sums.get(name.partition(" (")[0], 0.0) + seconds
        timings = list(sums.items())
    total = sum(seconds for _, seconds in timings) or 1.0
    items, start = [], 0.0
    for name, seconds in timings:
        share = 100 * seconds / total
        bar = element("i", style=f"left:{100 * start / total:.2f}%;width:{max(share, 0.4):.2f}%")
        words = element("span", duration(seconds), element("small", f"{share:.0f} %"))
        items.append(element("li", element("em", name), element("div", bar, class_="track"), words))
        start += seconds
    return element("ul", items, class_="bars timeline")
