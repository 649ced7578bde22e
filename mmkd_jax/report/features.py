"""The page of stored features: where each teacher is strong, how far teachers agree, what their vectors look like."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmkd_jax.report.document import document, shaded, table
from mmkd_jax.report.feature_plots import dots, grid
from mmkd_jax.report.markup import Markup, element, number

Record = Mapping[str, Any]


def page(record: Record) -> str:
    """The whole document as text; it loads nothing from elsewhere.

    Args:
      record: of `mmkd_jax.data.agreement.measure`.
    """
    names = list(record["sets"])
    teachers = len({one["teacher"] for one in record["sets"].values()})
    title = f"Features of {teachers} teacher" + ("s" if teachers > 1 else "")
    header = element(
        "header",
        element("p", "mmkd_jax features", class_="kicker"),
        element("h1", title),
        element("p", f"A sample of {record['rows']} pairs; first views and first captions.", class_="lede"),
    )
    sections = [
        _section(
            "Where each is strong",
            "Share of pictures whose own caption is nearest among those of their modality in the sample; below, the "
            "mean cosine of picture and caption. Few pairs make it easy.",
            _plot(record, "r_at_1", "R@1 within the modality"),
            _plot(record, "matched", "Cosine of a picture and its own caption"),
            element("details", element("summary", "In numbers"), _strength(record)),
        ),
        _section(
            "How far they agree",
            "Correlation of two teachers' cosines of every picture with every caption, in percent: 100 where both find "
            "the same alike.",
            _grids(record),
            element("details", element("summary", "In numbers"), _agreements(record)),
        )
        if len(names) > 1
        else None,
        _section("What they look like", _LOOKS, _looks(record)),
        _section("Means of teachers", _MEANS, _means(record)) if record["mean"] else None,
    ]
    return document(title, header, *sections)


_WIDTHS = ("wide", 1000), ("narrow", 380)
_LOOKS = (
    "Length of vectors, and the mean cosine of different pairs' pictures and of their captions: near 1, a teacher puts "
    "everything in one direction. Across: the mean cosine of its features with other teachers' of the same pair, where "
    "widths are the same: near 0, their spaces have nothing to do with each other."
)
_MEANS = (
    "Length of the mean over a pair's teachers, and how far its cosines go with the mean of the teachers' cosines, for "
    "teachers of one space and width."
)


def lines(record: Record) -> list[str]:
    """The tables for a terminal: a line a feature set; then matched cosine and R@1 a modality."""
    columns = (
        "set",
        "teacher",
        "pairs",
        "width",
        "norm",
        "text norm",
        "within",
        "text within",
        "across",
        "text across",
    )
    rows = [(*columns, "matched", "R@1", "licence", "hash")]
    for name, one in record["sets"].items():
        shares = [(m["r_at_1"], m["rows"]) for m in one["by_modality"].values() if m["r_at_1"] is not None]
        first = sum(share * n for share, n in shares) / sum(n for _, n in shares) if shares else None
        other = across(record, name)
        numbers = [one["image_norm"], one["text_norm"], one["image_within"], one["text_within"]]
        numbers += [other["image"], other["text"], one["matched"], first]
        told = map(_told, numbers)
        rows.append(
            (name, one["teacher"], str(one["present"]), str(one["width"]), *told, one["license"], one["hash"][:12])
        )
    return [*_columns(rows), "", "matched cosine / R@1 within the modality (pairs)", *_columns(_modalities(record))]


def across(record: Record, name: str) -> dict[str, float | None]:
    """Mean cosine of a set's features with those of other teachers' sets of its space and width, of the same rows."""
    one, sets = record["sets"][name], record["sets"]
    others = [
        pair["same"]
        for pair in record["pairs"]
        if name in pair["sets"] and "same" in pair
        for other in [next(n for n in pair["sets"] if n != name)]
        if sets[other]["teacher"] != one["teacher"] and sets[other]["space"] == one["space"]
    ]
    means = {tower: [same[tower][1] for same in others if same[tower]] for tower in ("image", "text")}
    return {tower: sum(values) / len(values) if values else None for tower, values in means.items()}


def _modalities(record: Record) -> list[tuple[str, ...]]:
    rows = [("set", *record["modalities"])]
    for name, one in record["sets"].items():
        found = [one["by_modality"].get(modality) for modality in record["modalities"]]
        rows.append(
            (name, *(f"{_told(m['matched'])} / {_told(m['r_at_1'])} ({m['rows']})" if m else "–" for m in found))
        )
    return rows


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _section(title: str, lede: str, *content) -> Markup:
    return element("section", element("h2", title), element("p", lede, class_="lede"), list(content))


def _plot(record: Record, value: str, title: str) -> Markup:
    plots = [element("div", dots(record, value, title, width), class_=name) for name, width in _WIDTHS]
    return element("figure", plots, class_="panel")


def _grids(record: Record) -> Markup:
    """All modalities together, then each."""
    drawn = [grid(record, modality) for modality in (None, *record["modalities"])]
    return element("div", [element("figure", one, class_="panel") for one in drawn if one], class_="multiples")


def _agreements(record: Record) -> list[Markup]:
    return [shown for modality in (None, *record["modalities"]) if (shown := _agreement(record, modality))]


def _strength(record: Record) -> Markup:
    body = []
    for name, one in record["sets"].items():
        cells = []
        for modality in record["modalities"]:
            found = one["by_modality"].get(modality)
            small = f"{_told(found['matched'])}, n = {found['rows']}" if found else None
            cells.append(shaded(found and found["r_at_1"], 0.0, 1.0, small))
        body.append(element("tr", element("th", name, scope="row"), cells))
    return table("R@1 within the modality", ("Teacher", *record["modalities"]), body)


def _agreement(record: Record, modality: str | None) -> Markup | None:
    names = list(record["sets"])
    found = {}
    for one in record["pairs"]:
        value = one["agreement"] if modality is None else one["by_modality"].get(modality)
        found[frozenset(one["sets"])] = value
    if all(value is None for value in found.values()):
        return None
    body = [
        element("tr", element("th", row, scope="row"), [shaded(_of(found, row, column), 0.0, 1.0) for column in names])
        for row in names
    ]
    return table(modality or "All modalities", ("", *names), body)


def _of(found: Mapping[frozenset, float | None], a: str, b: str) -> float | None:
    return 1.0 if a == b else found[frozenset((a, b))]


def _looks(record: Record) -> Markup:
    columns = ("Set", "Teacher", "Space", "Width", "Pairs", "Length", "Pictures alike", "Captions alike")
    columns += ("Pictures across", "Captions across", "Matched", "Licence", "Hash")
    body = []
    for name, one in record["sets"].items():
        lengths = f"{_told(one['image_norm'])}, {_told(one['text_norm'])}"
        cells = [one["teacher"], one["space"], one["width"], one["present"], lengths]
        cells = [element("td", cell) for cell in cells]
        other = across(record, name)
        for value in (one["image_within"], one["text_within"], other["image"], other["text"], one["matched"]):
            cells.append(shaded(value, 0.0, 1.0))
        cells += [element("td", one["license"]), element("td", one["hash"][:12])]
        body.append(element("tr", element("th", name, scope="row"), cells))
    return table("Vectors", columns, body)


def _means(record: Record) -> Markup:
    body = [
        element(
            "tr",
            element("th", name, scope="row"),
            element("td", _range(one["norm"]["image"])),
            element("td", _range(one["norm"]["text"])),
            shaded(one["agreement"], 0.0, 1.0),
        )
        for name, one in record["mean"].items()
    ]
    return table("Mean features", ("Space", "Pictures' length", "Captions' length", "Agreement"), body)


def _range(values: Sequence[float] | None) -> str:
    return "–" if values is None else f"{number(values[1])} ({number(values[0])} to {number(values[2])})"


def _told(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
