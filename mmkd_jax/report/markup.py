"""HTML and SVG from Python: everything that is not made here is escaped, so text from data cannot become markup."""

import html
import math

VOID = ("img", "meta")  # HTML elements without content or end tag


class Markup(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


def element(tag: str, *children, **attributes) -> Markup:
    """One element.

    Args:
      tag: its name.
      *children: `Markup` is taken as it is, None is left out, lists are flattened, anything else is escaped.
      **attributes: None is left out; `class_` gives `class`, `stroke_width` gives `stroke-width`.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(_plain(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children) -> Markup:
    """Children of an element one after the other, escaped where they are not `Markup`."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, list | tuple):
            parts.append(join(child))
        else:
            parts.append(child if isinstance(child, Markup) else html.escape(_plain(child)))
    return Markup("".join(parts))


def _plain(value) -> str:
    """Coordinates with two digits at most; anything else as `str` has it."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
    return str(value)


def percent(value: float) -> str:
    """A share in percent with one digit, without the sign."""
    return f"{100 * value:.1f}"


def interval(row: dict) -> str:
    """`low-high` of a share in percent."""
    return f"{percent(row['low'])}–{percent(row['high'])}"


def signed(value: float) -> str:
    """A difference of shares in points, with a true minus sign."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return text if text not in ("+0.0", "−0.0") else "±0.0"


def number(value: float) -> str:
    """A number with about three significant digits."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:,.{digits}f}" if abs(value) < 100 else f"{value:,.0f}"
        return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
    return f"{value:.1e}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds in the units in which one would say them."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
