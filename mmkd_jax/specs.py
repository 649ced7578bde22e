"""What a dual encoder is, as data: the record that weights alone do not tell.

Activation, head count, LayerNorm epsilon, pooling, attention mask, tokenizer and preprocessing are not in a state
dict, and a wrong one still gives plausible features. The spec of a teacher, of the student and of an exported model
have this one form; a checkpoint carries it, so that it can be loaded without anything else.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmkd_jax import io
from mmkd_jax.errors import InputError, near
from mmkd_jax.image_towers import ACTIVATIONS, IMAGE_TOWERS, ImageTower, ResNetTower, SwinTower, require

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
POOLINGS = ("token", "pooler", "layers")
PADDINGS = ("masked", "attended", "pooled")


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A text transformer: `bert` (post-norm, bidirectional, class token) or `clip` (pre-norm, causal, end token).

    `projection`: `linear` is one matrix without bias; `mlp` is width -> (width + embed) / 2 -> embed without biases,
    exact GELU between. `positions` is the length of the position table, `context` the number of tokens in use.

    BERTs differ in two more things. `pooling`: `token` is the class token of the last hidden state, `pooler` that
    token through BERT's own pooler (dense and tanh), `layers` the mean over tokens and over the states after layers
    1, 2 and last (MedCLIP). `padding`: `masked` keeps padding out of everything, so that a caption's vector does not
    depend on it; `attended` has no mask at all; `pooled` masks attention but counts padding in the mean over tokens.
    """

    kind: str = "bert"
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    vocab_size: int = 30522
    positions: int = 512
    context: int = 256
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    projection: str = "mlp"
    dropout: float = 0.1
    pooling: str = "token"
    padding: str = "masked"

    def __post_init__(self):
        require(self.kind in ("bert", "clip"), f"text tower kind {self.kind!r} is not one of bert, clip")
        require(self.pooling in POOLINGS, f"pooling {self.pooling!r} is not one of {', '.join(POOLINGS)}")
        require(self.padding in PADDINGS, f"padding {self.padding!r} is not one of {', '.join(PADDINGS)}")
        require(
            self.kind == "bert" or (self.pooling, self.padding) == ("token", "masked"),
            f"pooling {self.pooling!r} with padding {self.padding!r} in CLIP's text tower: only BERT has these",
        )
        require(
            self.padding != "pooled" or self.pooling == "layers",
            f"padding 'pooled' counts in a mean over tokens, which pooling {self.pooling!r} does not take",
        )
        require(
            self.pooling != "layers" or self.layers >= 2,
            f"pooling 'layers' takes the states after layers 1 and 2; the tower has {self.layers}",
        )
        require(self.projection in ("linear", "mlp"), f"projection {self.projection!r} is not one of linear, mlp")
        require(self.activation in ACTIVATIONS, f"activation {self.activation!r} is not one of {ACTIVATIONS}")
        require(self.width % self.heads == 0, f"text width {self.width} is not a multiple of {self.heads} heads")
        require(self.context <= self.positions, f"context {self.context} exceeds the {self.positions} positions")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """From a picture to the tower's input: a square of `size` px, scaled to [0, 1], normalised.

    `frame` says how it becomes a square: `crop` resizes the shortest side and takes the centre; `square` puts the
    picture into the middle of a black square, of at least `size` px, and resizes that (MedCLIP). `greyscale` pictures
    have three equal channels. `rgb_first` says whether the picture becomes RGB before resizing (transformers) or after
    (open_clip); it matters for palette images only.
    """

    size: int = 224
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    rgb_first: bool = False
    frame: str = "crop"
    greyscale: bool = False

    def __post_init__(self):
        require(self.frame in ("crop", "square"), f"frame {self.frame!r} is not one of crop, square")
        require(
            self.interpolation in ("bicubic", "bilinear"),
            f"interpolation {self.interpolation!r} is not one of bicubic, bilinear",
        )


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """`wordpiece` (BERT) or `bpe` (CLIP); `lowercase` as the vocabulary was made.

    `repair` says whether ftfy mends the text and HTML entities are resolved first, as OpenAI and open_clip do;
    transformers' tokenizers do not, which matters for curled quotes, ligatures and entities.
    """

    kind: str = "wordpiece"
    lowercase: bool = True
    repair: bool = True

    def __post_init__(self):
        require(self.kind in ("wordpiece", "bpe"), f"tokenizer kind {self.kind!r} is not one of wordpiece, bpe")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A dual encoder with all that is needed to feed it. The defaults are the full-size student of MMKD-CLIP."""

    name: str = "student"
    image: ImageTower | ResNetTower | SwinTower = dataclasses.field(default=ImageTower())
    text: TextTower = TextTower()
    embed: int = 512
    preprocess: Preprocess = Preprocess()
    tokenizer: TokenizerSpec = TokenizerSpec()
    license: str = "unknown"
    source: str = ""
    modalities: tuple[str, ...] = ()

    def __post_init__(self):
        require(
            self.preprocess.size == self.image.image_size,
            f"preprocessing gives {self.preprocess.size} px, the image tower takes {self.image.image_size} px",
        )
        wanted = {"bert": "wordpiece", "clip": "bpe"}[self.text.kind]
        require(
            self.tokenizer.kind == wanted,
            f"a {self.text.kind} text tower takes a {wanted} tokenizer, not {self.tokenizer.kind}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form; `from_dict` inverts it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "ModelSpec":
        """The spec of a JSON-like record.

        Raises:
          InputError: a field is unknown, or values contradict each other.
        """
        return _build(cls, record, "spec")

    @property
    def hash(self) -> str:
        """Identity of the architecture, preprocessing and tokenizer kind (not of weights)."""
        return io.hash_of(self.to_dict())


_PARTS = {"text": TextTower, "preprocess": Preprocess, "tokenizer": TokenizerSpec}


def _image_class(record: Mapping[str, Any], where: str):
    kind = record.get("kind", "vit")
    if kind not in IMAGE_TOWERS:
        raise InputError(f"{where} has no kind {kind!r}; {near(kind, IMAGE_TOWERS)}")
    return IMAGE_TOWERS[kind]


def _build(cls, record: Mapping[str, Any], where: str):
    names = {field.name for field in dataclasses.fields(cls)}
    values = {}
    for name, value in record.items():
        if name not in names:
            raise InputError(f"{where} has no field {name!r}; {near(name, names)}")
        if cls is ModelSpec and name == "image":
            value = _build(_image_class(value, f"{where}.image"), value, f"{where}.image")
        elif cls is ModelSpec and name in _PARTS:
            value = _build(_PARTS[name], value, f"{where}.{name}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
