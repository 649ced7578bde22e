"""Training input: the global batch as a function of the step, executed by Grain.

Which rows, which view, which caption: all of it is arithmetic on (set, row index, seed, step), so that neither
hosts, threads nor restarts matter, and restoring means computing from the step.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmkd_jax import preprocess
from mmkd_jax.batch import TextBatch
from mmkd_jax.data.features import read_together
from mmkd_jax.data.order import Order
from mmkd_jax.data.pairs import Pair, PairsSet
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.data.selection import Selection
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError

CAPTIONS = ("first", "random")
_TOKENISED = 1 << 14  # captions kept in memory


class Batches:
    """Batches of a set for one process.

    Args:
      pairs: the set.
      batch: rows of the global batch.
      seed: decides order, views and captions.
      policy: how views are cut; with features it must be theirs.
      image_size: px.
      tokenizer: `texts -> TextBatch` with `int32 [n, context]`.
      rows: which rows to use; by default all.
      features: stored features by teacher.
      selection: which of them a pair keeps; by default all.
      block, window: of the block shuffle, see `order.Order`.
      caption: `first` of a pair, or a `random` one a visit.
      process: (index, count); the process's slice of a batch is the index-th of count equal parts.

    Raises:
      InputError: the arguments contradict each other.
    """

    def __init__(
        self,
        pairs: PairsSet,
        *,
        batch: int,
        seed: int,
        policy: ViewPolicy,
        image_size: int,
        tokenizer,
        rows: RowIndex | None = None,
        features: dict[str, Any] | None = None,
        selection: Selection | None = None,
        block: int = 256,
        window: int = 16,
        caption: str = "first",
        process: tuple[int, int] = (0, 1),
    ):
        index, count = process
        if batch < 1 or batch % count:
            raise InputError(f"a batch of {batch} cannot be divided among {count} processes; make it a multiple")
        if caption not in CAPTIONS:
            raise InputError(f"caption {caption!r} is not one of {', '.join(CAPTIONS)}")
        self.pairs, self.batch_size, self.seed, self.policy = pairs, batch, seed, policy
        self.image_size, self.caption, self.features = image_size, caption, dict(sorted((features or {}).items()))
        self._selection = None if selection is None else selection.check(pairs, list(self.features))
        self._rows = None if rows is None else pairs.checked(rows)
        self.size = len(pairs) if rows is None else len(rows)
        if not self.size:
            raise InputError("the row index is empty; there is nothing to train on")
        self._order = Order(self.size, seed, block, window)
        self._slice = slice(index * (batch // count), (index + 1) * (batch // count))
        self._views = self._common_views()
        self._tokenise = functools.lru_cache(_TOKENISED)(lambda text: tokenizer([text]))

    @property
    def identity(self) -> dict[str, Any]:
        """What the batches are made of: hashes of the set, the row index and the features, and the order's numbers."""
        return {
            "set": self.pairs.hash,
            "captions": self.pairs.manifest["captions_hash"],
            "rows": None if self._rows is None else self._rows.hash,
            "size": self.size,
            "features": {name: f.hash for name, f in self.features.items()},
            **({} if self._selection is None else {"selection": self._selection.hash}),
            "policy": self.policy.hash,
            "order": [self.batch_size, self.seed, self._order.block, self._order.window, self.caption],
        }

    def ids(self, step: int) -> list[str]:
        """Ids of the whole global batch of a step, in order."""
        return self.pairs.ids(self._global(step)[0])

    def batch(self, step: int) -> dict[str, Any]:
        """This process's slice of the global batch of `step`.

        Returns:
          `row` int64 `[b]`; `visit` int64 `[b]`; `image` uint8 `[b, S, S, 3]`; `text` TextBatch,
          int32 `[b, context]`; `modality` int32 `[b]`; `targets`: by teacher `image` and `text` `[b, width]` in
          the stored type, `present` bool `[b]`.

        Raises:
          InputError: a record is damaged; the message names it.
        """
        rows, visits = (part[self._slice] for part in self._global(step))
        pairs = self.pairs.read_many(rows)
        views = np.asarray([self._view(pair.id, int(v)) for pair, v in zip(pairs, visits)], np.int64)
        chosen = np.asarray([self._caption(pair, int(v)) for pair, v in zip(pairs, visits)], np.int64)
        texts = [self._tokenise(pair.captions[c]) for pair, c in zip(pairs, chosen)]
        return {
            "row": rows,
            "visit": visits,
            "image": np.stack([self._image(pair, int(k)) for pair, k in zip(pairs, views)]),
            "text": TextBatch(*(np.concatenate(parts) for parts in zip(*texts))),
            "modality": self.pairs.table["modality"][rows].astype(np.int32),
            "targets": self._targets(rows, views, chosen),
        }

    def iterate(
        self, start: int, stop: int, threads: int = 2, prefetch: int = 2
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Steps `start` to `stop` with their batches, made ahead by threads.

        Args:
          start: first step.
          stop: step after the last.
          threads: threads that make batches; 0 makes them where they are asked for.
          prefetch: batches that are made ahead; at least one a thread.
        """
        import grain

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads) if threads else 0)
        steps = grain.MapDataset.range(start, stop).map(lambda step: (int(step), self.batch(int(step))))
        yield from steps.to_iter_dataset(options)

    def _global(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the set and visits of the whole batch."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        places, visits = self._order.at(positions)
        return places if self._rows is None else self._rows.rows[places], visits

    def _view(self, id: str, visit: int) -> int:
        """Number of the view: one a visit, or going round the stored ones from a start that depends on the pair."""
        return visit if self._views is None else (_draw("view", self.seed, id) + visit) % self._views

    def _caption(self, pair: Pair, visit: int) -> int:
        if not pair.captions:
            raise InputError(f"pair {pair.id} has no caption; leave it out with a row index")
        return 0 if self.caption == "first" else _draw("caption", self.seed, pair.id, visit) % len(pair.captions)

    def _image(self, pair: Pair, view: int) -> np.ndarray:
        try:
            return self.policy.render(preprocess.decode(pair.image), pair.id, view, self.image_size)
        except InputError as error:
            raise InputError(f"pair {pair.id} of {self.pairs.path}: {error}") from error

    def _targets(self, rows: np.ndarray, views: np.ndarray, captions: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        """What the teachers say of the rows, as far as the selection keeps it."""
        found = dict(zip(self.features, read_together(list(self.features.values()), rows, views, captions)))
        if self._selection is not None:
            for name, one in found.items():
                one["present"] = one["present"] & self._selection.of(name)[rows]
        return found

    def _common_views(self) -> int | None:
        """Number of stored views, None without features."""
        for name, stored in self.features.items():
            if stored.policy.hash != self.policy.hash:
                raise InputError(
                    f"the features of {name!r} have the view policy {stored.policy.to_dict()}, training "
                    f"asks for {self.policy.to_dict()}; use theirs or emit again"
                )
        counts = {name: stored.views for name, stored in self.features.items()}
        if len(set(counts.values())) > 1:
            raise InputError(f"teachers have different numbers of views ({counts}); emit with the same --views")
        return next(iter(counts.values()), None)


def _draw(*key) -> int:
    """A number that depends on the key alone, below 2**63."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
