"""A trained model as a folder that other software loads, with a model card.

- `open_clip`: `open_clip_config.json`, `open_clip_model.safetensors`, the tokenizer, for a BERT tower its
  `config.json`. open_clip 3.3 takes a BERT's config from `hf_model_name`, which it does not look for in the folder it
  loads: the card says what that means.
- `hf`: Hugging Face's `CLIPModel` with processor and tokenizer; it has no BERT.
- `unimed`: a file for the code of UniMed-CLIP and MMKD-CLIP, whose names of weights it has; beside it BERT alone, which
  that code reads first.

Each holds `README.md` (the card) and `mmkd_spec.json` with what foreign configs have no place for: name, licence,
source, modalities, and whether pictures become RGB before resizing.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mmkd_jax import io, licences, loading, model_card
from mmkd_jax.errors import InputError
from mmkd_jax.models import folders, open_clip, pickles, state_dict, transformers_clip, weights
from mmkd_jax.models.dual_encoder import Params
from mmkd_jax.models.state_dict import Tensors
from mmkd_jax.specs import ModelSpec
from mmkd_jax.tokenizers import BPE_SPECIAL, Tokenizer


def export_model(
    spec: ModelSpec,
    params: Params,
    tokenizer: Tokenizer,
    out: str | os.PathLike,
    *,
    form: str = "open_clip",
    card: Mapping[str, Any] | None = None,
    hub: str = "",
) -> epath.Path:
    """Writes a model as a folder, under a temporary name until it is complete.

    Args:
      spec: of the model.
      params: `{"image", "text", "logit_scale"}`; anything else (heads) is left out.
      tokenizer: of the model.
      out: the folder, which must not exist.
      form: a key of `FORMS`.
      card: what the model card tells: any of `model_card.SECTIONS`; each a text, a mapping, or a list of mappings.
      hub: the name that the folder will have on a hub; its own place without it.

    Returns:
      The folder.

    Raises:
      InputError: `out` exists or cannot be written, the form has no such model, or the tokenizer is not the model's.
    """
    out = io.as_path(out)
    if out.exists():
        raise InputError(f"{out} exists; choose another folder or remove it")
    model_card.check(card or {})
    if tokenizer.vocab_size != spec.text.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} tokens, {spec.name} has {spec.text.vocab_size}")
    place = hub or os.fspath(out)
    layout, file, write, configs = FORMS[form]
    records = configs(spec, tokenizer, place)
    tensors = state_dict.from_params(spec, {name: params[name] for name in ("image", "text", "logit_scale")}, layout)
    temporary = io.make_workdir(io.temporary_name(out))
    try:
        write(temporary / file, tensors)
        for name, record in {**records, folders.OWN_SPEC: spec.to_dict()}.items():
            io.write_json(temporary / name, record)
        for name, data in {**tokenizer.files(), **_tokenizer_config(tokenizer)}.items():
            io.write_bytes(temporary / name, data)
        library, how = loading.of(form, spec, os.fspath(out), place)
        io.write_text(temporary / "README.md", model_card.text(spec, card or {}, library, how))
        temporary.rename(out)
    except BaseException:
        temporary.rmtree(missing_ok=True)
        raise
    return out


def export_checkpoint(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    form: str = "open_clip",
    results: Sequence[Mapping[str, Any]] | None = None,
    card: Mapping[str, Any] | None = None,
    hub: str = "",
    use: str = "research",
    accept_licences: bool = False,
) -> epath.Path:
    """Exports a checkpoint of ours; its record fills the card's data, teachers and recipe.

    Args:
      checkpoint: a run's folder or one of its checkpoints.
      out: the folder, which must not exist.
      form: see `export_model`.
      results: rows of `results.json` for the card.
      card: further parts of the card, or other ones instead.
      hub: see `export_model`.
      use: what the model is meant for; see `licences.conflicts`.
      accept_licences: export although licences of teachers or data forbid it; the card then says so.

    Raises:
      InputError: see `export_model`; there is no checkpoint; or licences forbid the export.
    """
    from mmkd_jax import api

    student = api.load(checkpoint)
    data = dict(student.meta["data"])
    terms = data.pop("licences", {"teachers": {}, "data": {}})
    found = licences.conflicts(licences.of_checkpoint(student.meta), use)
    if found and not accept_licences:
        raise InputError(f"{'; '.join(found)}; export with --accept-licences if you have another permission")
    meant = f"{model_card.RESEARCH} Meant for {use} use."
    parts: dict[str, Any] = {
        "use": " ".join([meant, *(f"Exported although {line}." for line in found)]),
        "data": {**data, **({"licences": terms["data"]} if terms["data"] else {}), **_began(student.meta)},
        "teachers": [{"name": name, "licence": licence} for name, licence in terms["teachers"].items()],
        "recipe": {key: value for key, value in student.meta["config"].items() if key != "model"},
        "results": [{column: row.get(column, "") for column in model_card.RESULT_COLUMNS} for row in results or ()],
    }
    parts = {name: part for name, part in {**parts, **(card or {})}.items() if part}
    return export_model(student.spec, student.params, student.tokenizer, out, form=form, card=parts, hub=hub)


def _began(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of the weights that a student began with."""
    return {"began with": meta["inherited"]} if meta.get("inherited") else {}


def _open_clip(spec: ModelSpec, tokenizer: Tokenizer, place: str) -> dict[str, Any]:
    records = {open_clip.CONFIG: open_clip.to_config(spec, place)}
    return records | ({open_clip.BERT_CONFIG: open_clip.bert_config(spec.text)} if spec.text.kind == "bert" else {})


def _transformers(spec: ModelSpec, tokenizer: Tokenizer, place: str) -> dict[str, Any]:
    return {
        transformers_clip.CONFIG: transformers_clip.to_config(spec, tokenizer.begin, tokenizer.end),
        transformers_clip.PREPROCESSOR: transformers_clip.to_preprocessor(spec.preprocess),
    }


def _unimed(spec: ModelSpec, tokenizer: Tokenizer, place: str) -> dict[str, Any]:
    return {open_clip.BERT_CONFIG: open_clip.bert_config(spec.text)}


def _write_unimed(path: epath.Path, tensors: Tensors) -> None:
    """The file, and BERT as transformers' `AutoModel.from_pretrained` wants it, whose values the file then replaces."""
    prefix = "text_encoder.transformer."
    bert = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    weights.write_tensors(path.parent / "model.safetensors", bert)
    pickles.write(path, tensors)


# Form -> layout, name of the file, what writes it, and what makes the configs beside it.
FORMS: dict[str, tuple[str, str, Callable[[epath.Path, Tensors], None], Callable[..., dict[str, Any]]]] = {
    "open_clip": ("open_clip", weights.WEIGHTS, weights.write_tensors, _open_clip),
    "hf": ("transformers_clip", "model.safetensors", weights.write_tensors, _transformers),
    "unimed": ("unimed", weights.UNIMED, _write_unimed, _unimed),
}


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
