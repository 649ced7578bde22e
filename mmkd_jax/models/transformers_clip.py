"""Hugging Face's folders of a `CLIPModel`: `config.json` and `preprocessor_config.json` to and from our spec.

Source: huggingface/transformers 5 `configuration_clip.py`, `image_processing_pil_clip.py`. What a file leaves out has
the value that the library gives it.
"""

from collections.abc import Mapping
from typing import Any

from mmkd_jax.errors import InputError
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower, TokenizerSpec

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
RESAMPLING = {"bilinear": 2, "bicubic": 3}  # PIL's numbers


def to_config(spec: ModelSpec, begin: int, end: int) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
      spec: the model.
      begin, end: ids of the tokens around a text.

    Raises:
      InputError: transformers' `CLIPModel` has no such towers.
    """
    image, text = spec.image, spec.text
    _require(image.kind == "vit" and image.layout == "openai", f"a {image.title} as the image tower")
    _require(image.pre_norm and not image.patch_bias, "a ViT without first LayerNorm or with a patch bias")
    _require(text.kind == "clip", "BERT as the text tower (the formats open_clip and unimed have one)")
    _require(text.projection == "linear", "an MLP after CLIP's text tower")
    _require(end == text.vocab_size - 1, f"an end token {end} that is not the last of {text.vocab_size}")
    vision = {"image_size": image.image_size, "patch_size": image.patch}
    words = {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.positions,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": spec.embed,
        "torch_dtype": "float32",
        "vision_config": {"model_type": "clip_vision_model", **_tower(image), **vision, "projection_dim": spec.embed},
        "text_config": {"model_type": "clip_text_model", **_tower(text), **words, "projection_dim": spec.embed},
    }


def to_preprocessor(p: Preprocess) -> dict[str, Any]:
    """The content of `preprocessor_config.json`.

    Raises:
      InputError: its processor does not prepare pictures so.
    """
    _require(p.frame == "crop" and not p.greyscale, "pictures on black squares or in greyscale")
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": p.size},
        "resample": RESAMPLING[p.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": p.size, "width": p.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }


def to_spec(name: str, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> ModelSpec:
    """The spec that the two files describe.

    Raises:
      InputError: they ask for something that this project does not have.
    """
    _require(config.get("model_type") == "clip", f"a model of type {config.get('model_type')!r}")
    vision, words = config.get("vision_config") or {}, config.get("text_config") or {}
    image = ImageTower(
        width=vision.get("hidden_size", 768),
        layers=vision.get("num_hidden_layers", 12),
        heads=vision.get("num_attention_heads", 12),
        patch=vision.get("patch_size", 32),
        image_size=vision.get("image_size", 224),
        mlp_width=vision.get("intermediate_size", 3072),
        activation=vision.get("hidden_act", "quick_gelu"),
        norm_epsilon=vision.get("layer_norm_eps", 1e-5),
    )
    positions = words.get("max_position_embeddings", 77)
    text = TextTower(
        kind="clip",
        width=words.get("hidden_size", 512),
        layers=words.get("num_hidden_layers", 12),
        heads=words.get("num_attention_heads", 8),
        mlp_width=words.get("intermediate_size", 2048),
        vocab_size=words.get("vocab_size", 49408),
        positions=positions,
        context=positions,
        activation=words.get("hidden_act", "quick_gelu"),
        norm_epsilon=words.get("layer_norm_eps", 1e-5),
        projection="linear",
        dropout=0.0,
    )
    return ModelSpec(
        name=name,
        image=image,
        text=text,
        embed=config.get("projection_dim", 512),
        preprocess=_read_preprocessor(preprocessor or {}, image.image_size),
        tokenizer=TokenizerSpec("bpe", repair=False),
    )


def _tower(part: ImageTower | TextTower) -> dict[str, Any]:
    return {
        "hidden_size": part.width,
        "intermediate_size": part.mlp_width,
        "num_hidden_layers": part.layers,
        "num_attention_heads": part.heads,
        "hidden_act": part.activation,
        "layer_norm_eps": part.norm_epsilon,
    }


def _read_preprocessor(record: Mapping[str, Any], image_size: int) -> Preprocess:
    steps = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize")
    for step in steps:
        _require(record.get(step, True) is not False, f"a preprocessor with {step} off")
    size, crop = record.get("size", image_size), record.get("crop_size", image_size)
    size = size.get("shortest_edge") if isinstance(size, Mapping) else size
    crops = {crop.get("height"), crop.get("width")} if isinstance(crop, Mapping) else {crop}
    _require(size == image_size and crops == {image_size}, f"pictures of {size} px, cut to {crops}")
    numbers = {number: name for name, number in RESAMPLING.items()}
    resample = record.get("resample", RESAMPLING["bicubic"])
    _require(resample in numbers, f"resampling {resample}")
    chosen = {ours: tuple(record[key]) for ours, key in (("mean", "image_mean"), ("std", "image_std")) if key in record}
    return Preprocess(image_size, numbers[resample], rgb_first=True, **chosen)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InputError(f"transformers' CLIPModel and this project have no common form for {what}")
