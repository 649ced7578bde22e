"""A trained model as a folder that open_clip loads, with a model card.

The folder holds `open_clip_config.json`, `open_clip_model.safetensors`, the tokenizer, for a BERT tower its
`config.json`, the card (`README.md`), and `mmkd_spec.json` with what open_clip's config has no place for: name,
licence, source, modalities, and whether pictures become RGB before resizing. open_clip 3.3 takes a BERT's config from
`hf_model_name`, which it does not look for in the folder it loads: the card says what that means.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.models import open_clip, state_dict, weights
from mmkd_jax.models.dual_encoder import Params
from mmkd_jax.specs import ModelSpec
from mmkd_jax.tokenizers import BPE_SPECIAL, Tokenizer

SECTIONS = {"data": "Data", "teachers": "Teachers", "recipe": "Recipe", "results": "Results"}
RESULT_COLUMNS = ("model", "dataset", "task", "metric", "value", "low", "high", "n", "seed")

_LOAD = """```python
import open_clip

folder = "{folder}"
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{{folder}}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{{folder}}")
```"""
_LOAD_MOVED = """open_clip reads the text tower's `config.json` from `hf_model_name` in `open_clip_config.json`,
which is `{bert}`. Anywhere else, name the folder when loading:

```python
import json
import open_clip

folder = "THE_FOLDER"
with open(f"{{folder}}/open_clip_config.json") as file:
    text_cfg = json.load(file)["model_cfg"]["text_cfg"]
text_cfg.update(hf_model_name=folder, hf_model_pretrained=False)
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{{folder}}", text_cfg=text_cfg)
tokenizer = open_clip.get_tokenizer(f"local-dir:{{folder}}")
```"""
_HUB = """To publish the folder on a hub, set `hf_model_name` and `hf_tokenizer_name` (where they are present) in
`open_clip_config.json` to the name that it gets there."""


def export_open_clip(
    spec: ModelSpec,
    params: Params,
    tokenizer: Tokenizer,
    out: str | os.PathLike,
    *,
    card: Mapping[str, Any] | None = None,
    hub: str = "",
) -> epath.Path:
    """Writes a model as an open_clip folder, under a temporary name until it is complete.

    Args:
      spec: of the model.
      params: `{"image", "text", "logit_scale"}`; anything else (heads) is left out.
      tokenizer: of the model.
      out: the folder, which must not exist.
      card: what the model card tells: any of `data`, `teachers`, `recipe`, `results`; each a text, a mapping, or a
        list of mappings (a table).
      hub: the name that the folder will have on a hub; its own place without it.

    Returns:
      The folder.

    Raises:
      InputError: `out` exists or cannot be written, open_clip has no such model, or the tokenizer is not the model's.
    """
    out = io.as_path(out)
    if out.exists():
        raise InputError(f"{out} exists; choose another folder or remove it")
    if unknown := set(card or {}) - set(SECTIONS):
        raise InputError(f"a model card has no part {sorted(unknown)}; its parts are {', '.join(SECTIONS)}")
    if tokenizer.vocab_size != spec.text.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} tokens, {spec.name} has {spec.text.vocab_size}")
    place = hub or os.fspath(out)
    config = open_clip.to_config(spec, place)
    towers = {name: params[name] for name in ("image", "text", "logit_scale")}
    tensors = state_dict.from_params(spec, towers)
    temporary = io.make_workdir(io.temporary_name(out))
    try:
        weights.write_tensors(temporary / weights.WEIGHTS, tensors)
        io.write_json(temporary / open_clip.CONFIG, config)
        io.write_json(temporary / open_clip.OWN_SPEC, spec.to_dict())
        for name, data in {**tokenizer.files(), **_tokenizer_config(tokenizer)}.items():
            io.write_bytes(temporary / name, data)
        if spec.text.kind == "bert":
            io.write_json(temporary / open_clip.BERT_CONFIG, open_clip.bert_config(spec.text))
        io.write_text(temporary / "README.md", model_card(spec, card or {}, os.fspath(out), place))
        temporary.rename(out)
    except BaseException:
        temporary.rmtree(missing_ok=True)
        raise
    return out


def export_checkpoint(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    results: Sequence[Mapping[str, Any]] | None = None,
    card: Mapping[str, Any] | None = None,
    hub: str = "",
) -> epath.Path:
    """Exports a checkpoint of ours; its record fills the card's data and recipe.

    Args:
      checkpoint: a run's folder or one of its checkpoints.
      out: the folder, which must not exist.
      results: rows of `results.json` for the card.
      card: further parts of the card, or other ones instead.
      hub: see `export_open_clip`.

    Raises:
      InputError: see `export_open_clip`; or there is no checkpoint.
    """
    from mmkd_jax import api

    student = api.load(checkpoint)
    parts: dict[str, Any] = {
        "data": student.meta["data"],
        "recipe": {key: value for key, value in student.meta["config"].items() if key != "model"},
        "results": [{column: row.get(column, "") for column in RESULT_COLUMNS} for row in results or ()],
    }
    parts = {name: part for name, part in {**parts, **(card or {})}.items() if part}
    return export_open_clip(student.spec, student.params, student.tokenizer, out, card=parts, hub=hub)


def model_card(spec: ModelSpec, card: Mapping[str, Any], folder: str, place: str) -> str:
    """The text of `README.md`."""
    license_name = spec.license if spec.license != "unknown" else "other"
    parts = [
        f"---\nlicense: {license_name}\nlibrary_name: open_clip\npipeline_tag: zero-shot-image-classification\n---",
        f"# {spec.name}",
        f"{_tower(spec)} Licence: {spec.license}.{f' Source: {spec.source}.' if spec.source else ''}",
        "For research; not a medical device.",
        "## Use",
        _LOAD.format(folder=folder),
    ]
    if spec.text.kind == "bert":
        parts.append(_LOAD_MOVED.format(bert=place))
    parts.append(_HUB)
    for name, title in SECTIONS.items():
        if card.get(name):
            parts += [f"## {title}", _render(card[name])]
    return "\n\n".join(parts) + "\n"


def _tower(spec: ModelSpec) -> str:
    image, text = spec.image, spec.text
    kind = {"bert": "BERT", "clip": "CLIP's text tower"}[text.kind]
    return (
        f"A CLIP model: ViT (width {image.width}, {image.layers} layers, patch {image.patch}, {image.image_size} px) "
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


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, bytes]:
    """What transformers needs beside `tokenizer.json`."""
    if tokenizer.spec.kind == "wordpiece":
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": tokenizer.spec.lowercase,
            **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
        }
    else:
        # Padding with the end token instead of CLIP's 0 changes no feature: attention is causal and the first end
        # token is taken. Token 0 is an exclamation mark, which as a special token would be cut out of words.
        begin, end = BPE_SPECIAL
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": end, "bos_token": begin, "eos_token": end}
        config["unk_token"] = end
    config["model_max_length"] = tokenizer.context
    return {"tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}
