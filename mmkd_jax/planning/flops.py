"""Useful FLOPs of training in closed form: what the model needs, whatever a program does beside.

Matrix products and convolutions only, a multiply-add counts two. The backward pass costs twice the forward pass,
except where no gradient is wanted: of pictures, of stored features. Nothing is added for what a compiler or a remat
policy computes again, so that useful FLOPs over time and peak is the utilisation of PaLM (arXiv 2204.02311, appendix
B). Texts count with the tokens that they really have: padding is work, but not useful.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax.image_towers import ImageTower, ResNetTower, SwinTower
from mmkd_jax.models.heads import TOWERS
from mmkd_jax.specs import ModelSpec, TextTower


def model_flops(config: ConfigDict, *, text_tokens: float | None = None, teachers: Mapping[str, int] = {}) -> float:
    """FLOPs of one pair, forward and backward, in a step of `config`.

    Args:
      config: of stage 1 or 2 (fields `model`, `batch`, `task`, `loss`, and `recipe` in stage 2).
      text_tokens: mean number of tokens of a caption without padding; None takes the whole context.
      teachers: stage 2: width of each teacher's targets by name.
    """
    return sum(by_part(config, text_tokens=text_tokens, teachers=teachers).values())


def by_part(
    config: ConfigDict, *, text_tokens: float | None = None, teachers: Mapping[str, int] = {}
) -> dict[str, float]:
    """The same by part: `image`, `text`, `losses`, and in stage 2 `distillation`.

    Pictures of which the first steps leave patches out count whole, as they are in the steps after those.
    """
    spec = ModelSpec.from_dict(configs.to_dict(config.model))
    parts = {
        "image": image_flops(spec.image, spec.embed),
        "text": text_flops(spec.text, spec.embed, text_tokens),
        "losses": sum(6.0 * config.batch * width for width in (spec.embed, *config.loss.widths)),
    }
    if config.task == "distill":
        parts["distillation"] = _distillation(config, spec, teachers)
    return parts


def image_flops(tower: ImageTower | ResNetTower | SwinTower, embed: int, dropped: float = 0.0) -> float:
    """FLOPs of one picture and its projection, forward and backward, without the share `dropped` of its patches."""
    first, rest = {"vit": _vit, "swin": _swin}.get(tower.kind, _resnet)(tower, embed, dropped)
    return 2.0 * first + 3.0 * rest  # the picture itself gets no gradient


def text_flops(tower: TextTower, embed: int, tokens: float | None = None) -> float:
    """FLOPs of one caption of so many tokens, forward and backward; causal attention counts as if it saw all."""
    tokens = tower.context if tokens is None else tokens
    pooler = 2 * tower.width**2 if tower.pooling == "pooler" else 0
    middle = (tower.width + embed) // 2
    projection = 2 * tower.width * embed if tower.projection == "linear" else 2 * middle * (tower.width + embed)
    return 3.0 * (_blocks(tower.layers, tokens, tower.width, tower.mlp_width) + pooler + projection)


def _blocks(layers: int, tokens: float, width: int, hidden: float, seen: float | None = None) -> float:
    """Forward FLOPs of transformer blocks whose tokens attend to `seen` others (all of them unless given)."""
    seen = tokens if seen is None else seen
    return layers * tokens * (2 * 4 * width * width + 2 * 2 * width * hidden + 2 * 2 * seen * width)


def _vit(tower: ImageTower, embed: int, dropped: float) -> tuple[float, float]:
    """Forward FLOPs of the patch embedding, and of the rest."""
    whole = (tower.image_size // tower.patch) ** 2
    patches = max(1, round(whole * (1 - dropped)))
    rest = _blocks(tower.layers, patches + 1, tower.width, tower.mlp_width) + 2 * tower.width * embed
    return 2 * patches * 3 * tower.patch**2 * tower.width, rest


def _swin(tower: SwinTower, embed: int, dropped: float) -> tuple[float, float]:
    side, width = tower.image_size // tower.patch, tower.width
    first = 2 * side**2 * 3 * tower.patch**2 * width
    rest = 2 * tower.features * embed
    for stage, depth in enumerate(tower.stages):
        rest += _blocks(depth, side**2, width, int(tower.mlp_ratio * width), tower.window**2)
        if stage + 1 < len(tower.stages):
            side, width = side // 2, 2 * width
            rest += 2 * side**2 * 2 * width * width  # four cells of half the width to one
    return first, rest


def _resnet(tower: ResNetTower, embed: int, dropped: float) -> tuple[float, float]:
    modified, width = tower.kind == "modified_resnet", tower.width
    side = -(-tower.image_size // 2)
    if modified:
        first = _convolution(3, side, 3, width // 2)
        rest = _convolution(3, side, width // 2, width // 2) + _convolution(3, side, width // 2, width)
        side //= 2
    else:
        first, rest = _convolution(7, side, 3, width), 0.0
        side = -(-side // 2)
    inputs = width
    for stage, blocks in enumerate(tower.stages):
        inner, outputs = width * 2**stage, 4 * width * 2**stage
        before, side = side, side if stage == 0 else side // 2 if modified else -(-side // 2)
        for block in range(blocks):
            wide = before if block == 0 else side
            rest += _convolution(1, wide, inputs, inner) + _convolution(3, wide if modified else side, inner, inner)
            rest += _convolution(1, side, inner, outputs) + (inputs != outputs) * _convolution(1, side, inputs, outputs)
            inputs = outputs
    if modified:  # one query attends to the cells and their mean
        rest += 2 * tower.features**2 * (1 + 2 * (side**2 + 1)) + 2 * 2 * (side**2 + 1) * tower.features
    return first, rest + 2 * tower.features * embed


def _convolution(size: int, side: int, inputs: int, outputs: int) -> float:
    """FLOPs of a square convolution with `side` x `side` outputs, those on padding included."""
    return 2.0 * size**2 * side**2 * inputs * outputs


def _distillation(config: ConfigDict, spec: ModelSpec, teachers: Mapping[str, int]) -> float:
    """What stage 2 adds for one pair: masked pictures, heads and comparisons with targets of the global batch."""
    recipe, embed, batch = config.recipe, spec.embed, config.batch
    total = image_flops(spec.image, embed, recipe.mask) if recipe.mask else 0.0
    if recipe.target != "heads":
        return total + 2 * 4.0 * batch * embed  # two comparisons, in each of which one side gets a gradient
    for width in teachers.values():
        linear = 2 * embed * width if recipe.head == "linear" else 2 * 2 * embed * (embed + width)
        total += len(TOWERS) * 3.0 * linear
        if recipe.affinity_weight:
            total += 6.0 * batch * embed + 2.0 * batch * width
    return total
