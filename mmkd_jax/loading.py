"""How other software loads an exported folder: the part of a model card that its tests run."""

from mmkd_jax.specs import ModelSpec

_OPEN_CLIP = """```python
import open_clip

folder = "{folder}"
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{{folder}}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{{folder}}")
```"""
_OPEN_CLIP_MOVED = """open_clip reads the text tower's `config.json` from `hf_model_name` in `open_clip_config.json`,
which is `{place}`. Anywhere else, name the folder when loading:

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
_OPEN_CLIP_HUB = """To publish the folder on a hub, set `hf_model_name` and `hf_tokenizer_name` (where they are present)
in `open_clip_config.json` to the name that it gets there."""
_TRANSFORMERS = """```python
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

place = "{place}"
model = CLIPModel.from_pretrained(place)
processor = CLIPImageProcessorPil.from_pretrained(place)
tokenizer = AutoTokenizer.from_pretrained(place)
```

Tokenize with `padding=True, truncation=True`."""
_MENDED = """The model saw texts that ftfy had mended and whose HTML entities were resolved. Texts with curled quotes,
ligatures or entities have the same features only if `html.unescape(ftfy.fix_text(text))` goes before the tokenizer."""
_UNIMED = """With the code of [UniMed-CLIP](https://github.com/mbzuai-oryx/UniMed-CLIP) or
[MMKD-CLIP](https://github.com/wangshansong1/MMKD-CLIP), in their folder `src`:

```python
from open_clip import HFTokenizer, create_model_and_transforms

folder = "{folder}"
model, _, preprocess = create_model_and_transforms(
    "{model}",
    f"{{folder}}/unimed_clip.pt",
    force_quick_gelu=True,
    mean={mean},
    std={std},
    inmem=True,
    text_encoder_name=folder,
)
tokenizer = HFTokenizer(folder, context_length={context})
```

They take weights that do not fit without a word: `{model}` must be a model of these sizes among their configs."""


def of(form: str, spec: ModelSpec, folder: str, place: str) -> tuple[str, str]:
    """The library's name on hubs, and how to load the folder, in Markdown.

    Args:
      form: a form of export.
      spec: of the model.
      folder: where it was written.
      place: where it will be: a name on a hub, or the same.
    """
    if form == "hf":
        mended = "\n\n" + _MENDED if spec.tokenizer.repair else ""
        return "transformers", _TRANSFORMERS.format(place=place) + mended
    if form == "unimed":
        p = spec.preprocess
        model = f"ViT-B-{spec.image.patch}-quickgelu"
        return "open_clip", _UNIMED.format(
            folder=folder, model=model, mean=p.mean, std=p.std, context=spec.text.context
        )
    moved = [_OPEN_CLIP_MOVED.format(place=place)] if spec.text.kind == "bert" else []
    return "open_clip", "\n\n".join([_OPEN_CLIP.format(folder=folder), *moved, _OPEN_CLIP_HUB])
