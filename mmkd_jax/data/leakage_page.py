"""The page of a leakage search: what leaks, where and why, with pictures side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmkd_jax import preprocess
from mmkd_jax.data.leakage import REASONS, Matches, Part, Prints
from mmkd_jax.report.board import thumbnail
from mmkd_jax.report.document import document, table
from mmkd_jax.report.markup import Markup, element

_SHOWN = 6  # examples a reason
_WORDS = {
    "id": "the same row of a source",
    "bytes": "the same file",
    "pixels": "the same pixels in another file",
    "near": "near copy: resized, encoded again, brightened or slightly cropped",
    "article": "another picture of the same article",
    "group": "another picture of the same patient, case or other group",
}


def page(record: Mapping[str, Any], examples: Sequence[Markup]) -> str:
    """The whole document as text; it loads nothing from elsewhere.

    Args:
      record: of `leakage.record`.
      examples: of `examples`.
    """
    header = element(
        "header", element("p", "mmkd leakage", class_="kicker"), element("h1", headline(record)),
        element("p", "A picture counts under the first reason that holds, from left to right.", class_="lede"),
    )  # fmt: skip
    names = {"evaluation": "Evaluated pictures", "train": "Training pictures"}
    tables = [_table(names[side], record[side]) for side in names]
    reading = element("ul", [element("li", text) for text in _notes(record)], class_="notes")
    shown = element("section", element("h2", "Examples"), examples) if examples else None
    return document(
        "Leakage", header, element("section", element("h2", "In numbers"), tables), shown,
        element("section", element("h2", "Read with care"), reading),
    )  # fmt: skip


def headline(record: Mapping[str, Any]) -> str:
    """The finding in one sentence."""
    leaks, rows = (sum(_total(one)[k] for one in record["evaluation"]) for k in (0, 1))
    return f"{leaks} of {rows} evaluated pictures leak" if leaks else f"None of {rows} evaluated pictures leaks"


def lines(record: Mapping[str, Any]) -> list[str]:
    """The findings for a terminal: a line a part."""
    found = []
    for side in ("evaluation", "train"):
        for one in record[side]:
            why = ", ".join(f"{reason} {count}" for reason, count in one["leaks"].items() if count)
            leaks, rows = _total(one)
            found.append(f"{side:10} {one['part']:28} {leaks} of {rows} leak" + (f" ({why})" if why else ""))
    return found


def examples(sides: Mapping[str, Sequence[Part]], found: Mapping[str, Prints], matches: Mapping[str, Matches]) -> list:
    """For each reason a few pairs of pictures, the least similar near copies among them, which may be errors."""
    shown = []
    for reason in REASONS:
        one = matches[reason]
        if not len(one.train):
            continue
        picked = np.unique(np.linspace(0, len(one.train) - 1, _SHOWN).astype(int))
        cards = [_card(sides, found, one, int(k), reason) for k in picked]
        title = _WORDS[reason][0].upper() + _WORDS[reason][1:]
        shown.append(element("div", element("h3", title), element("div", cards, class_="cards")))
    return shown


def _card(sides, found, match: Matches, k: int, reason: str) -> Markup:
    halves = []
    for side, at in (("train", int(match.train[k])), ("evaluation", int(match.evaluation[k]))):
        part = sides[side][found[side].part[at]]
        row = int(found[side].row[at])
        picture = thumbnail(preprocess.decode(part.pairs.read(row).image))
        image = element("img", src=picture, alt=f"row {row} of {part.label}")
        halves.append(element("figure", image, element("figcaption", element("small", f"{part.label}, row {row}"))))
    score = f"similarity {match.score[k]:.3f}" if reason == "near" else None
    body = [
        element("p", score, class_="rank") if score else None,
        element("div", halves, style="display:flex;gap:14px"),
    ]
    return element("div", body, class_="card")


def _table(title: str, parts: Sequence[Mapping[str, Any]]) -> Markup:
    body = []
    for one in parts:
        leaks, rows = _total(one)
        cells = [element("td", count or "–") for count in one["leaks"].values()]
        share = element("td", f"{leaks} ({leaks / rows:.1%})")
        body.append(element("tr", element("th", one["part"], scope="row"), element("td", rows), cells, share))
    return table(title, ["set", "pictures", *REASONS, "together"], body)


def _total(one: Mapping[str, Any]) -> tuple[int, int]:
    return sum(one["leaks"].values()), one["rows"]


def _notes(record: Mapping[str, Any]) -> list[str]:
    found = [f"{reason}: {words}." for reason, words in _WORDS.items()]
    found.append(
        f"Near copies have hashes within {record['settings']['distance']} of 64 bits and a similarity of at least "
        f"{record['settings']['similarity']}. Frames of one clip and repeated exposures can reach that."
    )
    if record["citations"]:
        listed = "; ".join(record["citations"][:5])
        found.append(f"Articles that many pictures of a side name are taken for the citation of a set: {listed}.")
    return found
