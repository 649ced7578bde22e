"""Published names of ResNets: OpenAI's `ModifiedResNet` and torchvision's `ResNet`, which name their blocks alike."""

from mmkd_jax.models.relations import LINEAR, QKV, QKV_BIAS, SAME, Entry, Relation, entry, linear, stacked
from mmkd_jax.specs import ModelSpec

# [out, in, k, k] of torch's Conv2d to [k, k, in, out].
CONV2D = Relation(
    lambda theirs, shape: theirs[0].transpose(2, 3, 1, 0).reshape(shape),
    lambda ours, _: [ours.transpose(3, 2, 0, 1)],
)
BATCH_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def conv_norm(path: str, conv: str, norm: str) -> list[Entry]:
    """A convolution and its BatchNorm."""
    statistics = [entry(f"{path}/norm/{ours}", SAME, f"{norm}.{theirs}") for ours, theirs in BATCH_NORM.items()]
    return [entry(f"{path}/conv/kernel", CONV2D, f"{conv}.weight"), *statistics]


def _three(path: str, key: str) -> list[Entry]:
    """Three convolutions in a row, as the stem and each block have."""
    names = ("first", "second", "third")
    return [
        item for i, name in enumerate(names, 1) for item in conv_norm(f"{path}/{name}", f"{key}conv{i}", f"{key}bn{i}")
    ]


def _stages(spec: ModelSpec, key: str) -> list[Entry]:
    entries = []
    for index, depth in enumerate(spec.image.stages):
        ours, theirs = f"image/stage{index}", f"{key}layer{index + 1}"
        shortcut = f"{theirs}.0.downsample"
        entries += _three(f"{ours}/first", f"{theirs}.0.")
        entries += conv_norm(f"{ours}/first/shortcut", f"{shortcut}.0", f"{shortcut}.1")
        if depth > 1:
            entries += stacked(_three(f"{ours}/rest", f"{theirs}.{{i}}."), range(1, depth))
    return entries


def modified_resnet(spec: ModelSpec) -> list[Entry]:
    """OpenAI's and open_clip's `ModifiedResNet`, under `visual.`; PMC-CLIP names it the same."""
    pool = "visual.attnpool"
    pair = [f"{pool}.{name}_proj" for name in ("k", "v")]
    return [
        *_three("image/stem", "visual."),
        *_stages(spec, "visual."),
        entry("image/pool/positions", SAME, f"{pool}.positional_embedding"),
        entry("image/pool/query/kernel", QKV, f"{pool}.q_proj.weight"),
        entry("image/pool/query/bias", QKV_BIAS, f"{pool}.q_proj.bias"),
        entry("image/pool/key_value/kernel", QKV, *(f"{name}.weight" for name in pair)),
        entry("image/pool/key_value/bias", QKV_BIAS, *(f"{name}.bias" for name in pair)),
        *linear("image/projection", f"{pool}.c_proj"),
    ]


def medclip_resnet(spec: ModelSpec) -> list[Entry]:
    """torchvision's `ResNet` under `vision_model.model.`; MedCLIP's head takes the place of its `fc`."""
    key = "vision_model.model."
    return [
        *conv_norm("image/stem", f"{key}conv1", f"{key}bn1"),
        *_stages(spec, key),
        entry("image/projection/kernel", LINEAR, f"{key}fc.weight"),
    ]
