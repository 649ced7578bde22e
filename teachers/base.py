"""What a teacher is whatever runs its towers: what feeds them, and what identifies it."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmkd_jax import io, preprocess, tokenizers
from mmkd_jax.batch import TextBatch
from mmkd_jax.specs import ModelSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """A teacher without its towers; backends add `backend`, `logit_scale`, `encode_image` and `encode_text`.

    Attributes:
      name: what it is called here; its features go under this name.
      checkpoint: where its weights come from.
      spec: architecture, preprocessing, tokenizer kind, licence.
      tokenizer: texts to `TextBatch`.
      weights_hash: SHA-256 of the weights' file, or of the parameters of a checkpoint of ours.
    """

    name: str
    checkpoint: str
    spec: ModelSpec
    tokenizer: tokenizers.Tokenizer
    weights_hash: str

    @functools.cached_property
    def preprocess_hash(self) -> str:
        """Identity of what happens to pictures and texts before the towers."""
        files = {name: io.sha256(data) for name, data in self.tokenizer.files().items()}
        picture, text = dataclasses.asdict(self.spec.preprocess), dataclasses.asdict(self.spec.tokenizer)
        return io.hash_of({"picture": picture, "text": text, "context": self.tokenizer.context, "files": files})

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """A picture as the image tower takes it, float32 `[S, S, 3]`."""
        return preprocess.normalise(preprocess.eval_image(image, self.spec.preprocess), self.spec.preprocess)

    def tokenize(self, texts: Sequence[str]) -> TextBatch:
        """Texts as the text tower takes them, int32 `[n, context]` each."""
        return self.tokenizer(texts)
