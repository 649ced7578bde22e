"""Image towers of PMC-CLIP and MedCLIP in the reference libraries."""

from collections.abc import Callable
from typing import Any

from mmkd_jax.errors import InputError
from mmkd_jax.image_towers import SwinTower
from mmkd_jax.specs import ModelSpec
from teachers.torch_backend.libraries import need

SWIN = "vision_model.model."


def modified_resnet(spec: ModelSpec) -> Any:
    """open_clip's `ModifiedResNet`, which has the head count as an argument."""
    tower = spec.image
    _require(len(tower.stages) == 4 and tower.norm_epsilon == 1e-5, "open_clip", spec)
    resnet = need("open_clip.modified_resnet").ModifiedResNet
    return resnet(list(tower.stages), spec.embed, tower.heads, tower.image_size, tower.width)


def medclip(spec: ModelSpec) -> tuple[dict[str, Any], Callable, Callable]:
    """MedCLIP's `vision_model` as named modules, its forward pass, and what gives a file's tensors today's names."""
    if spec.image.kind == "swin":
        return _swin(spec)
    model = _plain_resnet(spec)
    return {"model": model}, model, lambda tensors: tensors


def _plain_resnet(spec: ModelSpec) -> Any:
    """timm's `ResNet`, whose names and arithmetic are torchvision's, with MedCLIP's head in place of its `fc`."""
    tower, torch, library = spec.image, need("torch"), need("timm.models.resnet")
    plain = tower.kind == "resnet" and tower.width == 64 and len(tower.stages) == 4 and tower.norm_epsilon == 1e-5
    _require(plain, "timm", spec)
    model = library.ResNet(library.Bottleneck, tower.stages)
    model.fc = torch.nn.Linear(tower.features, spec.embed, bias=False)
    return model


def _swin(spec: ModelSpec) -> tuple[dict[str, Any], Callable, Callable]:
    transformers = need("transformers")
    config = _swin_config(spec.image)
    model = transformers.SwinModel(config)
    head = need("torch").nn.Linear(spec.image.features, spec.embed, bias=False)

    def rename(tensors):
        """transformers itself reads the names of its earlier versions; a plain `load_state_dict` does not."""
        own = {key.removeprefix(SWIN): value for key, value in tensors.items() if key.startswith(SWIN)}
        if own.keys() <= model.state_dict().keys():
            return tensors
        options = {"config": config, "state_dict": own, "output_loading_info": True}
        read, info = transformers.SwinModel.from_pretrained(None, **options)
        wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
        if wrong:
            raise InputError(f"transformers' Swin does not take these weights of {spec.name}: {wrong}")
        rest = {key: value for key, value in tensors.items() if not key.startswith(SWIN)}
        return rest | {SWIN + key: value for key, value in read.state_dict().items()}

    named = {"model": model, "projection_head": head}
    return named, lambda images: head(model(pixel_values=images).pooler_output), rename


def _swin_config(tower: SwinTower) -> Any:
    return need("transformers").SwinConfig(
        image_size=tower.image_size,
        patch_size=tower.patch,
        embed_dim=tower.width,
        depths=list(tower.stages),
        num_heads=[tower.heads * 2**stage for stage in range(len(tower.stages))],
        window_size=tower.window,
        mlp_ratio=tower.mlp_ratio,
        hidden_act=tower.activation,
        layer_norm_eps=tower.norm_epsilon,
    )


def _require(condition: bool, library: str, spec: ModelSpec) -> None:
    if not condition:
        raise InputError(f"{library} has no such image tower as {spec.name}'s ({spec.image}); take the flax backend")
