"""Reference towers, one builder for each layout of published names: whose modules run it, and how they are called.

Modules stand under the names that the published files give them, so that a file's keys are theirs.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from mmkd_jax.models import open_clip, transformers_clip
from mmkd_jax.specs import ModelSpec
from teachers.torch_backend import berts, cnns
from teachers.torch_backend.libraries import need


@dataclasses.dataclass(frozen=True, eq=False)
class Towers:
    """Two towers in torch.

    Attributes:
      model: the module that holds both, with `logit_scale`.
      image: float32 `[n, 3, S, S]` to `[n, embed]`.
      text: int64 ids and mask `[n, length]` to `[n, embed]`.
      rename: a file's tensors under the names that the installed library has for them.
    """

    model: Any
    image: Callable[[Any], Any]
    text: Callable[[Any, Any], Any]
    rename: Callable[[dict[str, Any]], dict[str, Any]] = lambda tensors: tensors

    def __post_init__(self):
        self.model.to("cuda" if need("torch").cuda.is_available() else "cpu").eval()

    @property
    def logit_scale(self) -> float:
        """Factor on cosines, exponentiated."""
        return float(self.model.logit_scale.exp())

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """Normalised pictures float32 `[n, S, S, 3]` to float32 `[n, embed]`."""
        with _exact():
            return self.image(self._tensor(images.transpose(0, 3, 1, 2))).cpu().numpy()

    def encode_text(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Token ids and mask int32 `[n, length]` to float32 `[n, embed]`."""
        with _exact():
            return self.text(self._tensor(ids.astype(np.int64)), self._tensor(mask.astype(np.int64))).cpu().numpy()

    def _tensor(self, array: np.ndarray) -> Any:
        return need("torch").from_numpy(np.ascontiguousarray(array)).to(self.model.logit_scale.device)


def build(spec: ModelSpec, layout: str, names: Collection[str] = ()) -> Towers:
    """The towers of `spec` with weights as the libraries initialise them.

    Args:
      spec: the model.
      layout: of the published names; see `mmkd_jax.models.state_dict`.
      names: those of a file, where two modules of a library differ in nothing else.

    Raises:
      InputError: a library is missing, or has no such towers.
    """
    return BUILDERS[layout](spec, names)


@contextlib.contextmanager
def _exact():
    """float32 products in float32: cuDNN's convolutions would otherwise round to TF32."""
    torch = need("torch")
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def _open_clip(spec: ModelSpec, names: Collection[str]) -> Towers:
    """open_clip's `CLIP`, or `CustomTextCLIP` where the text tower is BERT or stands under `text.`."""
    library = need("open_clip.model")
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(open_clip.bert_config(spec.text)))
        config = open_clip.to_config(spec, bert=folder if spec.text.kind == "bert" else "")["model_cfg"]
        if spec.text.kind == "bert":
            need("transformers")
            config["text_cfg"]["hf_model_pretrained"] = False
        apart = spec.text.kind == "bert" or any(name.startswith("text.") for name in names)
        model = (library.CustomTextCLIP if apart else library.CLIP)(**config)
    return Towers(model, model.encode_image, lambda ids, mask: model.encode_text(ids))


def _unimed(spec: ModelSpec, names: Collection[str]) -> Towers:
    """open_clip's `CustomTextCLIP` with the text tower under UniMed-CLIP's name."""
    towers = _open_clip(spec, names)
    model = _named({"visual": towers.model.visual, "text_encoder": towers.model.text}, logit_scale=())
    return Towers(model, towers.image, towers.text)


def _transformers_clip(spec: ModelSpec, names: Collection[str]) -> Towers:
    """transformers' `CLIPModel`; without a mask, as the end token looks at no padding behind it."""
    transformers, words = need("transformers"), spec.text.vocab_size
    config = transformers_clip.to_config(spec, begin=words - 2, end=words - 1)
    model = transformers.CLIPModel(transformers.CLIPConfig(**config))

    def image(pictures):
        return model.visual_projection(model.vision_model(pixel_values=pictures).pooler_output)

    def text(ids, mask):
        return model.text_projection(model.text_model(input_ids=ids).pooler_output)

    return Towers(model, image, text)


def _pmc_clip(spec: ModelSpec, names: Collection[str]) -> Towers:
    """open_clip's `ModifiedResNet` and transformers' `BertModel` with a bare matrix (`src/pmc_clip/model`)."""
    visual, bert = cnns.modified_resnet(spec), berts.bert(spec.text)
    model = _named(
        {"visual": visual, "text_encoder": bert}, logit_scale=(), text_projection=(spec.text.width, spec.embed)
    )
    pooled = functools.partial(berts.pooled, bert, spec.text)
    return Towers(model, visual, lambda ids, mask: pooled(ids, mask) @ model.text_projection)


def _medclip(spec: ModelSpec, names: Collection[str]) -> Towers:
    """transformers' `SwinModel` or a plain ResNet, and `BertModel`, with heads (`medclip/modeling_medclip.py`)."""
    vision, image, rename = cnns.medclip(spec)
    bert = berts.bert(spec.text)
    head = need("torch").nn.Linear(spec.text.width, spec.embed, bias=False)
    text = _named({"model": bert, "projection_head": head})
    model = _named({"vision_model": _named(vision), "text_model": text}, logit_scale=())
    pooled = functools.partial(berts.pooled, bert, spec.text)
    return Towers(model, image, lambda ids, mask: head(pooled(ids, mask)), rename)


def _named(modules: dict[str, Any], **shapes: tuple[int, ...]) -> Any:
    """A module that holds others, and bare parameters, under the given names."""
    torch = need("torch")
    holder = torch.nn.ModuleDict(modules)
    for name, shape in shapes.items():
        holder.register_parameter(name, torch.nn.Parameter(0.02 * torch.randn(shape)))
    return holder


BUILDERS: dict[str, Callable[[ModelSpec, Collection[str]], Towers]] = {
    "open_clip": _open_clip,
    "unimed": _unimed,
    "transformers_clip": _transformers_clip,
    "pmc_clip": _pmc_clip,
    "medclip": _medclip,
}
