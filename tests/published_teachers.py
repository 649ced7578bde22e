"""A small teacher of every family as its authors' code builds it: weights under the published names, and features.

Everything here is the reference libraries' own: names and features owe nothing to this project's layouts and towers.
"""

import dataclasses
import pathlib
import string
from collections.abc import Callable

import model_references as ref
import numpy as np
import torch
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import save_file
from timm.models.resnet import Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from transformers import BertModel, SwinConfig, SwinModel

from mmkd_jax import tokenizers
from mmkd_jax.specs import ModelSpec, Preprocess, ResNetTower, SwinTower
from teachers.specs import Facts, known

CAPTIONS = ["a chest x-ray", "ct", "h&e stain: carcinoma of the breast, grade 2", "no lesion is seen here"]
BPE = 520  # 512 bytes, two special tokens, six merges
SWIN = SwinTower(width=12, stages=(2, 2), heads=3, window=3, patch=2, image_size=12)
MODIFIED = ResNetTower("modified_resnet", 12, (2, 1, 1, 1), 8, 64)
PLAIN = ResNetTower("resnet", 64, (1, 1, 1, 1), 0, 64)


@dataclasses.dataclass(frozen=True, eq=False)
class Published:
    """A teacher of another project.

    Attributes:
      spec: what its record says.
      tensors: its state dict.
      image: `[n, 3, S, S]` to features.
      text: ids and mask `[n, length]` to features.
    """

    spec: ModelSpec
    tensors: dict[str, torch.Tensor]
    image: Callable
    text: Callable

    def features(self, images: np.ndarray, text) -> tuple[np.ndarray, np.ndarray]:
        """Of pictures `[n, S, S, 3]` and tokens."""
        ids, mask = torch.from_numpy(text.ids).long(), torch.from_numpy(text.mask).long()
        with torch.no_grad():
            return self.image(ref.torch_images(images)).numpy(), self.text(ids, mask).numpy()


def open_clip(spec: ModelSpec) -> Published:
    """BMC-CLIP, QuiltNet, GenMedCLIP, PubMedCLIP."""
    model = ref.open_clip_clip(spec)
    return Published(spec, model.state_dict(), model.encode_image, lambda ids, mask: model.encode_text(ids))


def custom_text(spec: ModelSpec, prefix: str = "text.") -> Published:
    """BiomedCLIP; UniMed-CLIP with its prefix."""
    model = ref.CustomText(spec)
    tensors = {key.replace("text.", prefix, 1): value for key, value in model.state_dict().items()}
    return Published(spec, tensors, model.encode_image, lambda ids, mask: model.encode_text(ids))


def transformers_clip(spec: ModelSpec) -> Published:
    """PLIP."""
    model = ref.transformers_clip(spec)

    def image(pictures):
        return model.visual_projection(model.vision_model(pictures).pooler_output)

    return Published(
        spec,
        model.state_dict(),
        image,
        lambda ids, mask: model.text_projection(model.text_model(ids, attention_mask=mask).pooler_output),
    )


def pmc_clip(spec: ModelSpec) -> Published:
    """PMC-CLIP, with what only its training used in the file as well."""
    tower, width = spec.image, spec.text.width
    visual = randomise(ModifiedResNet(tower.stages, spec.embed, tower.heads, tower.image_size, tower.width))
    bert = ref.randomise(BertModel(ref.bert_config(spec.text)))
    matrix = torch.randn(width, spec.embed, generator=torch.Generator().manual_seed(3)) * width**-0.5

    def text(ids, mask):
        output = bert(ids, attention_mask=torch.ones_like(mask) if spec.text.padding == "attended" else mask)
        return (output.pooler_output if spec.text.pooling == "pooler" else output.last_hidden_state[:, 0]) @ matrix

    towers = under("visual.", visual) | under("text_encoder.", bert)
    unused = {"fusion_module.layers.0.weight": matrix, "mlm_projection": matrix, "ln_final.bias": matrix[0]}
    return Published(spec, {**towers, **unused, "text_projection": matrix, **scale()}, visual, text)


def medclip(spec: ModelSpec) -> Published:
    """MedCLIP in both variants."""
    bert = ref.randomise(BertModel(ref.bert_config(spec.text)))
    head = ref.randomise(torch.nn.Linear(spec.text.width, spec.embed, bias=False), 5)
    if spec.image.kind == "swin":
        model, final = ref.randomise(SwinModel(swin_config(spec.image))), head_of(spec.image.features, spec.embed)
        vision = under("vision_model.model.", model) | under("vision_model.projection_head.", final)
        image = lambda pictures: final(model(pictures).pooler_output)  # noqa: E731
    else:
        model = TimmResNet(Bottleneck, spec.image.stages)
        model.fc = torch.nn.Linear(spec.image.features, spec.embed, bias=False)
        image = randomise(model)
        vision = under("vision_model.model.", model)

    def mean(ids, mask):
        states = bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return (states[1].mean(1) + states[2].mean(1) + states[-1].mean(1)) / 3

    def text(ids, mask):
        if spec.text.padding == "pooled":
            return head(mean(ids, mask))
        rows = [mean(row[None, : kept.sum()], None) for row, kept in zip(ids, mask, strict=True)]
        return head(torch.cat(rows))

    words = under("text_model.model.", bert) | under("text_model.projection_head.", head)
    return Published(spec, {**vision, **words, **scale()}, image, text)


def of_berts(image, name: str, embed: int = ref.EMBED, **text) -> ModelSpec:
    """A spec with a small BERT and a linear projection."""
    tower = ref.bert_tower(projection="linear", layers=4, **text)
    return ModelSpec(name=name, image=image, text=tower, embed=embed, preprocess=Preprocess(image.image_size))


def bpe(spec: ModelSpec) -> ModelSpec:
    """The spec with as many words as the vocabulary that `write` puts beside it."""
    return dataclasses.replace(spec, text=dataclasses.replace(spec.text, vocab_size=BPE))


FAMILIES: dict[str, tuple[Callable[[ModelSpec], Published], ModelSpec]] = {
    "open_clip": (open_clip, bpe(ref.clip_spec())),
    "openai": (open_clip, bpe(ref.clip_spec("quick_gelu"))),
    "transformers": (transformers_clip, bpe(ref.clip_spec("quick_gelu"))),
    "unimed": (lambda spec: custom_text(spec, "text_encoder."), ref.bert_spec()),
    "biomedclip": (custom_text, ref.timm_spec()),
    "pmc_clip": (pmc_clip, of_berts(MODIFIED, "pmc", padding="attended")),
    "pmc_clip_pooler": (pmc_clip, of_berts(MODIFIED, "pooler", pooling="pooler", padding="attended")),
    "pmc_clip_masked": (pmc_clip, of_berts(MODIFIED, "masked")),
    "medclip_vit": (medclip, of_berts(SWIN, "swin", pooling="layers")),
    "medclip_resnet": (medclip, of_berts(PLAIN, "resnet", pooling="layers", padding="pooled")),
}
RECORDS = {name: Facts(spec, "a file", (known("all of it", "this test"),)) for name, (_, spec) in FAMILIES.items()}
globals().update(RECORDS)  # so that `record` can name them by a dotted path


def record(family: str) -> str:
    """What `teachers.load` calls the family's record."""
    return f"{__name__}.{family}"


def make(family: str) -> Published:
    """The small teacher of a family."""
    build, spec = FAMILIES[family]
    return build(spec)


def write(folder: pathlib.Path, published: Published) -> pathlib.Path:
    """Its weights as safetensors, with a vocabulary beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in published.tensors.items()}, folder / "w.safetensors")
    text = published.spec.text
    if text.kind == "clip":
        made = tokenizers.train(published.spec.tokenizer, CAPTIONS, vocab_size=text.vocab_size, context=text.context)
        assert made.vocab_size == text.vocab_size
        for name, data in made.files().items():
            (folder / name).write_bytes(data)
    else:
        letters = [*string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase), *string.digits, *":,.&-"]
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
        words += [f"[unused{i}]" for i in range(text.vocab_size - len(words))]
        (folder / "vocab.txt").write_text("\n".join(words))
    return folder / "w.safetensors"


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """As `model_references.randomise`, BatchNorm statistics too; queries and keys large enough to tell heads apart."""
    generator = torch.Generator().manual_seed(1)
    ref.randomise(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.copy_(0.7 + 0.6 * torch.rand(module.weight.shape, generator=generator))
                module.running_mean.copy_(0.3 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
        for name, value in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                value.mul_(2.0)
    return model.eval()


def swin_config(tower: SwinTower) -> SwinConfig:
    """transformers' record of a Swin."""
    return SwinConfig(
        image_size=tower.image_size,
        patch_size=tower.patch,
        embed_dim=tower.width,
        depths=list(tower.stages),
        num_heads=[tower.heads * 2**stage for stage in range(len(tower.stages))],
        window_size=tower.window,
        hidden_act=tower.activation,
        layer_norm_eps=tower.norm_epsilon,
    )


def head_of(width: int, embed: int) -> torch.nn.Linear:
    """A projection without bias."""
    return ref.randomise(torch.nn.Linear(width, embed, bias=False), 7)


def under(prefix: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's state dict with a prefix."""
    return {prefix + key: value for key, value in module.state_dict().items()}


def scale() -> dict[str, torch.Tensor]:
    """The logit scale of a file."""
    return {"logit_scale": torch.tensor(3.3)}
