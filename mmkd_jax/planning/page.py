"""A plan for people: a few lines for the terminal, and a page."""

from collections.abc import Mapping
from typing import Any

from mmkd_jax.report.document import document, table
from mmkd_jax.report.markup import Markup, element

GIB = 2.0**30


def lines(plan: Mapping[str, Any]) -> list[str]:
    """What the terminal shows."""
    return [f"{name + ':':<18}{value}" for name, value in facts(plan)] + [f"warning: {one}" for one in _warned(plan)]


def facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what matters most, in order."""
    topology, mesh = plan["topology"], plan["mesh"]
    slices = f"{topology['slices']} x " if topology["slices"] > 1 else ""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    found = [
        ("plan", f"{plan['name']}, batch {plan['batch']}, remat {plan['remat']}, loss {plan['form']}"),
        ("topology", f"{slices}{topology['name']} ({topology['kind']}), {topology['chips']} chips a slice; {axes}"),
    ]
    if not plan["fits"]:
        need, have = plan.get("needed"), plan["allowed"]
        sizes = f": the compiler asks for {need / GIB:.2f} GiB a device, has {have / GIB:.2f}" if need and have else ""
        found.append(("fits", f"no{sizes}"))
        if "memory" not in plan:
            return [*found, ("try", " or ".join(plan["try"])), ("compiled with", versions)]
    memory, flops = plan["memory"], plan["flops"]
    if plan["fits"]:
        found.append(("fits", "yes" if plan["allowed"] else "not judged: fake devices have no memory of their own"))
    limit = f" of {plan['allowed'] / GIB:.2f}" if plan["allowed"] else ""
    kinds = ", ".join(f"{name} {memory[name] / GIB:.2f}" for name in ("argument", "output", "alias", "temp"))
    found += [
        ("peak memory", f"{memory['peak'] / GIB:.2f}{limit} GiB a device ({kinds})"),
        ("useful FLOPs", f"{plan['model']['flops_of_pair'] / 1e9:.2f} G a pair, texts of "
                         f"{plan['model']['text_tokens']:.1f} tokens ({plan['model']['text_length_of']})"),
        ("counted FLOPs", f"{flops['counted'] / 1e12:.4f} T a device and step, {flops['ratio']:.3f} of the useful"),
        ("collectives", f"{sum(row['bytes'] for row in plan['collectives']) / 2**20:.1f} MiB a device and step"),
        *_times(plan),
        ("compiled with", versions),
    ]  # fmt: skip
    return found


def _times(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    spent, run = plan["seconds"], plan["run"]
    if spent is None:
        return [("time", "not estimated: nothing is known of these devices")]
    if spent["high"] is None:
        return [("time", f"at least {spent['low']:.3f} s a step (estimate)")]
    found = [
        ("time", f"{spent['low']:.3f} to {spent['high']:.3f} s a step (estimate of a compiler)"),
        ("throughput", f"{run['pairs_per_second'][0]:,.0f} to {run['pairs_per_second'][1]:,.0f} pairs/s, "
                       f"{run['utilisation'][0]:.0%} to {run['utilisation'][1]:.0%} of peak (estimate)"),
    ]  # fmt: skip
    if run["chip_hours"]:
        low, high = run["chip_hours"]
        found.append(("whole run", f"{run['steps']:,} steps, {low:,.0f} to {high:,.0f} chip-hours (estimate)"))
    return found


def _warned(plan: Mapping[str, Any]) -> list[str]:
    return list(plan.get("warnings", ()))


def page(plan: Mapping[str, Any]) -> str:
    """The whole page as text."""
    title = f"Plan: {plan['name']} on {plan['topology']['name']}"
    words = "An estimate from a compiler and arithmetic. Nothing here ran on these devices."
    head = element("header", element("h1", title), element("p", words, class_="lede"))
    shown = [_section("What it comes to", _pairs(facts(plan)))]
    if plan.get("warnings"):
        shown.append(_section("Warnings", element("ul", [element("li", one) for one in plan["warnings"]])))
    if "collectives" in plan:
        shown.append(_section("What the devices exchange in a step", _collectives(plan["collectives"])))
    if plan.get("seconds"):
        rests = [(f"the {end} end", text) for end, text in plan["rests_on"].items()]
        shown.append(_section("What the time rests on", _pairs(rests)))
    if plan.get("largest"):
        shown.append(_section("The largest batch", _largest(plan["largest"])))
    return document(title, head, *shown)


def _section(title: str, *content: Markup) -> Markup:
    return element("section", element("h2", title), *content)


def _pairs(rows: list[tuple[str, str]]) -> Markup:
    return element("dl", [element("div", element("dt", name), element("dd", value)) for name, value in rows])


def _collectives(rows: list[Mapping[str, Any]]) -> Markup:
    columns = ("kind", "axes", "type", "in a loop", "arrays", "MiB", "largest shapes")
    body = [
        [row["kind"], ", ".join(row["axes"]) or "-", row["dtype"], "yes" if row["in_loop"] else "no", row["count"],
         f"{row['bytes'] / 2**20:.2f}", ", ".join(row["shapes"])]
        for row in rows
    ]  # fmt: skip
    return table("On each device", columns, [element("tr", [element("td", cell) for cell in row]) for row in body])


def _largest(found: list[Mapping[str, Any]]) -> Markup:
    body = [
        element("tr", [element("td", cell) for cell in (one["remat"], one["batch"] or "none fits", one["below"])])
        for one in found
    ]
    return table("By remat policy, to an eighth", ("remat", "fits", "too large"), body)
