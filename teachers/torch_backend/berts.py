"""transformers' `BertModel` and the ways in which PMC-CLIP's and MedCLIP's code make one vector of its states."""

from typing import Any

from mmkd_jax.models import open_clip
from mmkd_jax.specs import TextTower
from teachers.torch_backend.libraries import need


def bert(text: TextTower) -> Any:
    """A `BertModel` of the tower's sizes, with its pooler where the tower uses it."""
    transformers = need("transformers")
    config = transformers.BertConfig(**open_clip.bert_config(text))
    return transformers.BertModel(config, add_pooling_layer=text.pooling == "pooler")


def pooled(model: Any, text: TextTower, ids: Any, mask: Any) -> Any:
    """int64 ids and mask `[n, length]` to float32 `[n, width]`.

    MedCLIP's mean runs over the padding of a batch as well. `masked` stands for what its code gives one caption at a
    time, so each is run alone and unpadded here.
    """
    torch = need("torch")
    if text.pooling == "layers" and text.padding == "masked":
        alone = [row[None, : kept.sum()] for row, kept in zip(ids, mask, strict=True)]
        return torch.cat([_layers(model(input_ids=row, output_hidden_states=True)) for row in alone])
    seen = torch.ones_like(mask) if text.padding == "attended" else mask
    output = model(input_ids=ids, attention_mask=seen, output_hidden_states=text.pooling == "layers")
    if text.pooling == "layers":
        return _layers(output)
    return output.pooler_output if text.pooling == "pooler" else output.last_hidden_state[:, 0]


def _layers(output: Any) -> Any:
    """The mean over tokens and over the states after layers 1, 2 and last, in MedCLIP's order of means."""
    states = need("torch").stack([output.hidden_states[layer] for layer in (1, 2, -1)], dim=1)
    return states.mean(2).mean(1)
