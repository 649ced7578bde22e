"""Features of rows and texts, computed once per encoder in micro-batches of a fixed size, by all processes together."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from mmkd_jax import preprocess
from mmkd_jax.errors import InputError
from mmkd_jax.evals import cache as caches

LAYERS = ("embedding", "pooled")


class Table:
    """Feature vectors by key, in one array, which at least doubles when it is full."""

    def __init__(self):
        self._places: dict = {}
        self._data = np.zeros((0, 0), np.float32)
        self._room = 0

    def __contains__(self, key) -> bool:
        return key in self._places

    def expect(self, count: int) -> None:
        """Says that so many vectors more may come."""
        self._room = max(self._room, len(self._places) + count)

    def add(self, keys: Sequence, features: np.ndarray) -> None:
        """Adds features `[n, width]` under `keys`, of which none is there."""
        first, stop = len(self._places), len(self._places) + len(keys)
        if stop > len(self._data):
            grown = np.empty((max(stop, 2 * first, self._room), features.shape[1]), np.float32)
            if first:
                grown[:first] = self._data[:first]
            self._data = grown
        self._data[first:stop] = features
        self._places.update(zip(keys, range(first, stop)))

    def take(self, keys: Sequence) -> np.ndarray:
        """Features of `keys` in their order, `[n, width]`; each must have been added."""
        return self._data[np.fromiter(map(self._places.__getitem__, keys), np.int64, len(keys))]


class Features:
    """Unit-norm-free float32 features of one encoder, kept by row and by text.

    The last micro-batch is filled up with its last element, so that the encoder sees one shape only and a feature
    does not depend on what else is evaluated. Of several processes, which must ask for the same things in the same
    order, each computes its part of what is missing and gets the others'.
    """

    def __init__(self, encoder, pairs, micro_batch: int = 64, cache: caches.FeatureCache | None = None):
        if micro_batch < 1:
            raise InputError(f"the micro-batch must be at least 1, got {micro_batch}")
        self.encoder, self.pairs, self.micro_batch, self._cache = encoder, pairs, micro_batch, cache
        self._images = {layer: Table() for layer in LAYERS}
        self._texts = Table()
        self._captions: dict[int, list[str]] = {}

    def add_rows(self, rows: Iterable[np.ndarray], layer: str = "embedding") -> None:
        """Computes what is missing of these arrays of rows, each in the order of the pairs set."""
        if layer not in LAYERS:
            raise InputError(f"feature layer {layer!r} is not one of {', '.join(LAYERS)}")
        projected = {} if layer == "embedding" else {"projected": False}
        known, groups = self._images[layer], [np.unique(np.asarray(one, np.int64)).tolist() for one in rows]
        known.expect(sum(key not in known for group in groups for key in group))
        for part in _parts(groups):
            self._add(
                known, layer, part, lambda images: self.encoder.encode_image(images, **projected),
                self._decode, lambda part: caches.part_of_rows(self.pairs.hash, part),
            )  # fmt: skip

    def images(self, rows: np.ndarray, layer: str = "embedding") -> np.ndarray:
        """Image features of `rows`, float32 `[n, width]`."""
        self.add_rows([rows], layer)
        return self._images[layer].take(np.asarray(rows).tolist())

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Text features, float32 `[m, embed]`; equal texts have the very same feature."""
        for part in _parts([list(dict.fromkeys(texts))]):
            self._add(self._texts, "text", part, self.encoder.encode_text, lambda text: text, caches.part_of_texts)
        return self._texts.take(texts)

    def captions(self, row: int) -> list[str]:
        """The captions of a row, from the record that its image was decoded from."""
        if int(row) not in self._captions:
            self._captions[int(row)] = list(self.pairs.read(int(row)).captions)
        return self._captions[int(row)]

    def _decode(self, row: int):
        pair = self.pairs.read(row)
        self._captions[row] = pair.captions
        try:
            return preprocess.decode(pair.image)
        except InputError as error:
            raise InputError(f"row {row} (id {self.pairs.table['id'][row]}): {error}; exclude it or mend it") from error

    def _add(self, known: Table, layer: str, part: list, encode: Callable, read: Callable, hashed: Callable) -> None:
        """Makes the features of `part` known: from memory, from the cache, or by the encoder."""
        missing = [key for key in part if key not in known]
        if not missing:
            return
        name = hashed(part) if self._cache else ""
        stored = self._cache.read(layer, name, len(part)) if self._cache else None
        if stored is not None:
            new = [place for place, key in enumerate(part) if key not in known]
            known.add(missing, stored if len(new) == len(part) else stored[new])
            return
        features = self._computed(missing, encode, read)
        known.add(missing, features)
        if self._cache:
            self._cache.write(layer, name, features if len(missing) == len(part) else known.take(part))

    def _computed(self, keys: list, encode: Callable, read: Callable) -> np.ndarray:
        index, count = jax.process_index(), jax.process_count()
        wanted, keys = len(keys), keys + keys[-1:] * (-len(keys) % count)  # as many for each process
        features = self._encoded(keys[index::count], encode, read)
        if count > 1:
            features = multihost_utils.process_allgather(features).swapaxes(0, 1).reshape(len(keys), -1)
        return features[:wanted]

    def _encoded(self, keys: list, encode: Callable, read: Callable) -> np.ndarray:
        name, parts = self.encoder.name, []
        for start in tqdm(range(0, len(keys), self.micro_batch), desc=f"encode {name}", leave=False, disable=None):
            here = keys[start : start + self.micro_batch]
            inputs = [read(key) for key in here]
            filled = inputs + [inputs[-1]] * (self.micro_batch - len(inputs))
            features = np.asarray(encode(filled), np.float32)
            if features.ndim != 2 or len(features) != len(filled):
                raise InputError(f"{name} gave features of shape {features.shape} for {len(filled)} inputs")
            parts.append(features[: len(inputs)])
            self._check(here, parts[-1])
        return np.concatenate(parts)

    def _check(self, keys: list, features: np.ndarray) -> None:
        """Refuses vectors that are not finite or zero, and says whose they are."""
        squares = np.einsum("ij,ij->i", features, features)
        if np.isfinite(squares).all() and squares.all():
            return
        bad = keys[int(np.argmin(np.isfinite(squares) & (squares > 0)))]
        what = f"the text {bad[:60]!r}" if isinstance(bad, str) else f"row {bad} (id {self.pairs.table['id'][bad]})"
        raise InputError(
            f"{self.encoder.name} gave features that are not finite or zero, first for {what}; its weights are damaged"
        )


def _parts(groups: Iterable[list]) -> Iterable[list]:
    """Each group in pieces of `cache.PART` at most."""
    return (keys[start : start + caches.PART] for keys in groups for start in range(0, len(keys), caches.PART))


def unit(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32."""
    features = np.asarray(features, np.float32)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)
