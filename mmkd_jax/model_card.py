"""The model card: what a model is, how to load it, and what it was made from, as a `README.md`."""

import json
from collections.abc import Mapping
from typing import Any

from mmkd_jax.errors import InputError
from mmkd_jax.specs import ModelSpec

SECTIONS = {"use": "Intended use", "data": "Data", "teachers": "Teachers", "recipe": "Recipe", "results": "Results"}
RESULT_COLUMNS = ("model", "dataset", "task", "metric", "value", "low", "high", "n", "seed")
RESEARCH = "For research; not a medical device. It must not guide the care of patients."


def check(card: Mapping[str, Any]) -> None:
    """InputError for a part that a card does not have."""
    if unknown := set(card) - set(SECTIONS):
        raise InputError(f"a model card has no part {sorted(unknown)}; its parts are {', '.join(SECTIONS)}")


def text(spec: ModelSpec, card: Mapping[str, Any], library: str, loading: str) -> str:
    """The text of `README.md`.

    Args:
      spec: of the model.
      card: any of `SECTIONS`; each a text, a mapping, or a list of mappings (a table).
      library: what hubs call the library that loads it.
      loading: how to load it, in Markdown.
    """
    license_name = spec.license if spec.license != "unknown" else "other"
    parts = [
        f"---\nlicense: {license_name}\nlibrary_name: {library}\npipeline_tag: zero-shot-image-classification\n---",
        f"# {spec.name}",
        f"{_tower(spec)} Licence: {spec.license}.{f' Source: {spec.source}.' if spec.source else ''}",
        "## Use",
        loading,
    ]
    for name, title in SECTIONS.items():
        if part := {"use": RESEARCH, **card}.get(name):
            parts += [f"## {title}", _render(part)]
    return "\n\n".join(parts) + "\n"


def _tower(spec: ModelSpec) -> str:
    text = spec.text
    kind = {"bert": "BERT", "clip": "CLIP's text tower"}[text.kind]
    return (
        f"A CLIP model: {spec.image.title} (width {spec.image.width}, {spec.image.image_size} px) "
        f"and {kind} (width {text.width}, {text.layers} layers, {text.context} tokens), embedding {spec.embed}."
    )


def _render(part: Any) -> str:
    """A text as it is, a list of mappings as a table, a mapping as a list (nested values as JSON)."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        return "\n".join(f"- {key}: {_inline(value)}" for key, value in part.items())
    if part and all(isinstance(row, Mapping) for row in part):
        columns = list(dict.fromkeys(key for row in part for key in row))
        lines = [columns, ["---"] * len(columns), *([_inline(row.get(c, "")) for c in columns] for row in part)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join(f"- {_inline(item)}" for item in part)


def _inline(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else f"`{json.dumps(value, default=str)}`"
