"""Small torch models of open_clip, timm and transformers with non-trivial weights, and what to compare them with.

Default biases of zero and norms of one hide swapped or forgotten parameters, so every one is made random.
"""

import numpy as np
import pytest
import torchvision_stub

torch = pytest.importorskip("torch", reason="torch, which the reference models need, is not installed")
torchvision_stub.install()
open_clip = pytest.importorskip("open_clip", reason="open_clip, the reference, is not installed")
pytest.importorskip("timm", reason="timm, the reference, is not installed")

from open_clip.hf_model import HFTextEncoder  # noqa: E402
from transformers import BertConfig, CLIPConfig, CLIPModel  # noqa: E402

from mmkd_jax.batch import TextBatch  # noqa: E402
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower, TokenizerSpec  # noqa: E402

TOLERANCE = 2e-5
EMBED, SIZE, VOCAB, CONTEXT = 48, 32, 97, 12


def clip_spec(activation="gelu", **image) -> ModelSpec:
    """ViT with CLIP text, of odd sizes so that no two axes can be mistaken for one another."""
    return ModelSpec(
        name="small clip",
        image=ImageTower(64, 3, 4, 8, SIZE, 160, activation=activation, **image),
        text=TextTower("clip", 40, 2, 5, 120, VOCAB, CONTEXT, CONTEXT, activation, 1e-5, "linear"),
        embed=EMBED,
        preprocess=Preprocess(size=SIZE),
        tokenizer=TokenizerSpec("bpe"),
    )


def bert_tower(**changes) -> TextTower:
    """A small BERT."""
    values = {"width": 40, "layers": 2, "heads": 5, "mlp_width": 72, "vocab_size": VOCAB, "positions": 20}
    return TextTower(**{"kind": "bert", "context": CONTEXT, **values, **changes})


def bert_spec(**text) -> ModelSpec:
    """OpenAI's ViT with BERT, the form of UniMed-CLIP and of the student."""
    image = ImageTower(64, 3, 4, 8, SIZE, 160, activation="quick_gelu")
    return ModelSpec(name="small bert", image=image, text=bert_tower(**text), embed=EMBED, preprocess=Preprocess(SIZE))


def timm_spec() -> ModelSpec:
    """timm's smallest named ViT with BERT, the form of BiomedCLIP."""
    image = ImageTower(192, 12, 3, 16, 224, 768, "gelu", 1e-6, False, True, "timm")
    return ModelSpec(name="small timm", image=image, text=bert_tower(), embed=EMBED)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Makes every parameter random: vectors far from zero and one, matrices larger than by default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("logit_scale"):
                value.fill_(3.3)
            elif value.ndim <= 1:
                value.copy_(0.3 * noise + (1.0 if "norm" in name.lower() or "ln_" in name else 0.0) * (value != 0))
            else:
                value.copy_(noise * value[0].numel() ** -0.5 * 1.3)
    return module.eval()


def open_clip_clip(spec: ModelSpec) -> torch.nn.Module:
    """open_clip's `CLIP` of `spec`."""
    image, text = spec.image, spec.text
    return randomise(
        open_clip.model.CLIP(
            spec.embed,
            {
                "layers": image.layers,
                "width": image.width,
                "head_width": image.width // image.heads,
                "patch_size": image.patch,
                "image_size": image.image_size,
                "mlp_ratio": image.mlp_width / image.width,
            },
            {
                "context_length": text.positions,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
                "mlp_ratio": text.mlp_width / text.width,
            },
            quick_gelu=image.activation == "quick_gelu",
        )
    )


def bert_config(text: TextTower) -> BertConfig:
    """transformers' record of a BERT."""
    return BertConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        intermediate_size=text.mlp_width,
        max_position_embeddings=text.positions,
        hidden_act=text.activation,
        layer_norm_eps=text.norm_epsilon,
        pad_token_id=0,
    )


class CustomText(torch.nn.Module):
    """An image tower of open_clip beside its `HFTextEncoder`, built from a config instead of a hub's name."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        image, text = spec.image, spec.text
        if image.layout == "timm":
            vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}
        else:
            vision = {
                "layers": image.layers,
                "width": image.width,
                "head_width": image.width // image.heads,
                "patch_size": image.patch,
                "image_size": image.image_size,
                "mlp_ratio": image.mlp_width / image.width,
            }
        self.visual = open_clip.model._build_vision_tower(spec.embed, vision, image.activation == "quick_gelu")
        self.text = HFTextEncoder(
            "", spec.embed, bert_config(text), pooler_type="cls_last_hidden_state_pooler", proj_type=text.projection
        )
        # AutoModel.from_config builds BERT's own pooler, which a dual encoder's files do not hold.
        self.text.transformer.pooler = None
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))
        randomise(self)

    def encode_image(self, images):
        return self.visual(images)

    def encode_text(self, ids):
        return self.text(ids)


def transformers_clip(spec: ModelSpec) -> CLIPModel:
    """Hugging Face's `CLIPModel` of `spec`."""
    image, text = spec.image, spec.text
    common = {"hidden_act": image.activation, "projection_dim": spec.embed, "attn_implementation": "eager"}
    config = CLIPConfig(
        vision_config={
            "hidden_size": image.width,
            "intermediate_size": image.mlp_width,
            "num_hidden_layers": image.layers,
            "num_attention_heads": image.heads,
            "image_size": image.image_size,
            "patch_size": image.patch,
            **common,
        },
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": text.mlp_width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.positions,
            "eos_token_id": text.vocab_size - 1,
            "bos_token_id": text.vocab_size - 2,
            "pad_token_id": 0,
            **common,
        },
        projection_dim=spec.embed,
    )
    return randomise(CLIPModel(config))


def tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A model's state dict as NumPy."""
    return {key: value.detach().numpy() for key, value in model.state_dict().items()}


def pictures(spec: ModelSpec, n: int = 3) -> np.ndarray:
    """Normalised pictures float32 `[n, H, W, 3]`."""
    size = spec.image.image_size
    return np.random.default_rng(1).normal(size=(n, size, size, 3)).astype(np.float32)


def texts(spec: ModelSpec, n: int = 5) -> TextBatch:
    """Token rows of different lengths, padded with 0, each ending in the highest id."""
    rng = np.random.default_rng(2)
    length = spec.text.context
    ids = np.zeros((n, length), np.int32)
    lengths = [length, *rng.integers(3, length, size=n - 1)]
    for row, size in zip(ids, lengths, strict=True):
        row[: size - 1] = rng.integers(1, spec.text.vocab_size - 1, size=size - 1)
        row[size - 1] = spec.text.vocab_size - 1
    mask = (ids != 0).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (n, 1))
    return TextBatch(ids, mask, positions, mask)


def relative_error(ours, theirs) -> float:
    """Largest difference over the largest reference value."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def torch_images(images: np.ndarray) -> torch.Tensor:
    """`[n, H, W, 3]` as torch wants it."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
