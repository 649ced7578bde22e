"""Features of rows and texts, computed once per encoder in micro-batches of a fixed size, by all processes together."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from mmkd_jax import preprocess
from mmkd_jax.errors import InputError

LAYERS = ("embedding", "pooled")


class Features:
    """Unit-norm-free float32 features of one encoder, kept by row and by text.

    The last micro-batch is filled up with its last element, so that the encoder sees one shape only and a feature
    does not depend on what else is evaluated. Of several processes, which must ask for the same things in the same
    order, each computes its part of what is missing and gets the others'.
    """

    def __init__(self, encoder, pairs, micro_batch: int = 64):
        if micro_batch < 1:
            raise InputError(f"the micro-batch must be at least 1, got {micro_batch}")
        self.encoder, self.pairs, self.micro_batch = encoder, pairs, micro_batch
        self._images: dict[str, dict[int, np.ndarray]] = {layer: {} for layer in LAYERS}
        self._texts: dict[str, np.ndarray] = {}
        self._captions: dict[int, list[str]] = {}

    def add_rows(self, rows: Iterable[np.ndarray], layer: str = "embedding") -> None:
        """Computes what is missing of these rows in one go, in the order of the pairs set."""
        if layer not in LAYERS:
            raise InputError(f"feature layer {layer!r} is not one of {', '.join(LAYERS)}")
        known, rows = self._images[layer], list(rows)
        missing = sorted({int(row) for part in rows for row in part} - set(known))
        projected = {} if layer == "embedding" else {"projected": False}
        self._fill(missing, known, lambda images: self.encoder.encode_image(images, **projected), self._decode)

    def images(self, rows: np.ndarray, layer: str = "embedding") -> np.ndarray:
        """Image features of `rows`, float32 `[n, width]`."""
        self.add_rows([rows], layer)
        return np.stack([self._images[layer][int(row)] for row in rows])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Text features, float32 `[m, embed]`; equal texts have the very same feature."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        self._fill(missing, self._texts, self.encoder.encode_text, lambda text: text)
        return np.stack([self._texts[text] for text in texts])

    def captions(self, row: int) -> list[str]:
        """The captions of a row, from the record that its image was decoded from."""
        if int(row) not in self._captions:
            self._captions[int(row)] = list(self.pairs.read(int(row)).captions)
        return self._captions[int(row)]

    def _decode(self, row: int):
        pair = self.pairs.read(row)
        self._captions[row] = list(pair.captions)
        return preprocess.decode(pair.image)

    def _fill(self, keys: list, known: dict, encode: Callable, read: Callable) -> None:
        if not keys:
            return
        index, count = jax.process_index(), jax.process_count()
        keys = keys + keys[-1:] * (-len(keys) % count)  # as many for each process
        features = self._encoded(keys[index::count], encode, read)
        if count > 1:
            features = multihost_utils.process_allgather(features).swapaxes(0, 1).reshape(len(keys), -1)
        known.update(zip(keys, features))

    def _encoded(self, keys: list, encode: Callable, read: Callable) -> np.ndarray:
        name, parts = self.encoder.name, []
        for start in tqdm(range(0, len(keys), self.micro_batch), desc=f"encode {name}", leave=False, disable=None):
            inputs = [read(key) for key in keys[start : start + self.micro_batch]]
            filled = inputs + [inputs[-1]] * (self.micro_batch - len(inputs))
            features = np.asarray(encode(filled), np.float32)
            if features.ndim != 2 or len(features) != len(filled):
                raise InputError(f"{name} gave features of shape {features.shape} for {len(filled)} inputs")
            if not np.isfinite(features).all() or not np.linalg.norm(features, axis=1).all():
                raise InputError(f"{name} gave features that are not finite or zero; its weights are damaged")
            parts.append(features[: len(inputs)])
        return np.concatenate(parts)


def unit(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32."""
    features = np.asarray(features, np.float32)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)
