"""The shell of every page: one document that loads nothing from elsewhere, and tables that scroll by themselves."""

from collections.abc import Sequence

from mmkd_jax.report.markup import Markup, element
from mmkd_jax.report.plot import css


def document(title: str, *sections) -> str:
    """The whole document as text; `sections` are the children of its `main`."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", css("theme", "chart", "page")),
    )
    return "<!doctype html>\n" + element("html", head, element("body", element("main", sections)), lang="en") + "\n"


def table(caption: str, columns: Sequence, body: Sequence[Markup]) -> Markup:
    """A table with a row of headings; `body` holds its `tr`."""
    head = element("thead", element("tr", [element("th", text, scope="col") for text in columns]))
    shown = element("table", element("caption", caption), head, element("tbody", list(body)))
    return element("div", shown, class_="scroll", tabindex=0, role="region", aria_label=caption)


def shaded(value: float | None, low: float, high: float, small: str | None = None) -> Markup:
    """A cell with a number of two digits, the deeper the higher between `low` and `high`; a dash for None."""
    if value is None:
        return element("td", "–")
    depth = 0.03 + 0.32 * (min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0)
    note = element("small", small) if small else None
    return element("td", f"{value:.2f}".replace("-", "−"), note, style=f"background:rgb(var(--shade) / {depth:.3f})")
