"""Published names of Swin transformers: transformers' `SwinModel` before version 5, and how later names map to them."""

import re

from mmkd_jax.models.relations import CONV, LINEAR, OUT, SAME, Entry, entry, linear, norm, qkv, stacked
from mmkd_jax.specs import ModelSpec

# Names of a block's parts in transformers 5 and as files have them that were made before (MedCLIP's).
RENAMED = {
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.o_proj": "attention.output.dense",
    "attention.relative_position_bias.relative_position_bias_table": "attention.self.relative_position_bias_table",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_NEW = re.compile(rf"(\.blocks\.\d+\.)({'|'.join(map(re.escape, RENAMED))})(?=\.|$)")


def first_names(key: str) -> str:
    """A key of transformers 5 under the name that it had before; any other key as it is."""
    return _NEW.sub(lambda match: match[1] + RENAMED[match[2]], key)


def _block(path: str, key: str) -> list[Entry]:
    attention = [f"{key}.attention.self.{name}" for name in ("query", "key", "value")]
    return [
        *norm(f"{path}/norm1", f"{key}.layernorm_before"),
        *norm(f"{path}/norm2", f"{key}.layernorm_after"),
        *qkv(f"{path}/attention/qkv", tuple(f"{a}.weight" for a in attention), tuple(f"{a}.bias" for a in attention)),
        *linear(f"{path}/attention/out", f"{key}.attention.output.dense", OUT),
        entry(f"{path}/attention/offsets", SAME, f"{key}.attention.self.relative_position_bias_table"),
        *linear(f"{path}/mlp/up", f"{key}.intermediate.dense"),
        *linear(f"{path}/mlp/down", f"{key}.output.dense"),
    ]


def medclip_swin(spec: ModelSpec) -> list[Entry]:
    """`SwinModel` under `vision_model.model.`, and MedCLIP's linear head."""
    key, table = "vision_model.model", "vision_model.model.embeddings"
    entries = [
        *linear("image/patch", f"{table}.patch_embeddings.projection", CONV),
        *norm("image/embed_norm", f"{table}.norm"),
    ]
    for stage, depth in enumerate(spec.image.stages):
        ours, theirs = f"image/stage{stage}", f"{key}.encoder.layers.{stage}"
        entries += stacked(_block(f"{ours}/plain", f"{theirs}.blocks.{{i}}"), range(0, depth, 2))
        entries += stacked(_block(f"{ours}/shifted", f"{theirs}.blocks.{{i}}"), range(1, depth, 2))
        if stage + 1 < len(spec.image.stages):
            entries += norm(f"image/merge{stage}/norm", f"{theirs}.downsample.norm")
            entries.append(
                entry(f"image/merge{stage}/reduction/kernel", LINEAR, f"{theirs}.downsample.reduction.weight")
            )
    head = entry("image/projection/kernel", LINEAR, "vision_model.projection_head.weight")
    return [*entries, *norm("image/norm", f"{key}.layernorm"), head]
