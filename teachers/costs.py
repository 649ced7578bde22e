"""What emission and reading cost beside the work that they are there for: processor time, with teachers at no cost."""

import contextlib
import dataclasses
import io as std_io
import os
import tempfile
import time
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from PIL import Image

from mmkd_jax import io, timing
from mmkd_jax.batch import TextBatch
from mmkd_jax.data.batches import Batches
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.pairs import Pair, PairsSet, PairsWriter, pair_id
from mmkd_jax.data.views import ViewPolicy
from teachers.emit import emit
from teachers.progress import Meter

WIDTHS = (512,) * 7 + (768,) * 2  # of nine teachers' features, as those of MMKD-CLIP
APART = ("decode", "preprocess", "encode")  # parts of emission that are not its own
POLICY = ViewPolicy()
BATCH = 1024  # rows that training reads at a time, as configs/stage1_clip.py has it


class Instant:
    """A teacher that answers at once, with the same vectors every time."""

    logit_scale, backend, weights_hash, preprocess_hash = 100.0, "none", "none", "none"

    def __init__(self, width: int):
        self.spec = SimpleNamespace(embed=width, license="CC0", preprocess=SimpleNamespace(size=8))
        self._answers = np.random.default_rng(width).normal(size=(1 << 12, width)).astype(np.float32)

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Nothing to look at."""
        return np.zeros(1, np.float32)

    def tokenize(self, texts: list[str]) -> list[str]:
        """The texts as they are."""
        return texts

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """One vector each, `[n, width]`."""
        return self._answers[np.arange(len(images)) % len(self._answers)]

    def encode_text(self, texts: list[str]) -> np.ndarray:
        """One vector each, `[n, width]`."""
        return self._answers[np.arange(len(texts)) % len(self._answers)]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Milliseconds of the processor for 1,000 pairs, one number a round.

    Attributes:
      storing: beside `APART`, for each teacher.
      reading: of all nine feature sets.
    """

    storing: tuple[float, ...]
    reading: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"storing, for 1,000 pairs and teacher: {timing.spread(self.storing)} ms\n"
            f"reading nine feature sets, for 1,000 pairs: {timing.spread(self.reading)} ms"
        )


def measure(rows: int, rounds: int) -> Costs:
    """Both costs for a set of so many pairs, after one small round that is not counted.

    Work of others on the same cores makes the processor's own time longer too: the least number is nearest to the cost.
    """
    found: dict[str, list[float]] = {"storing": [], "reading": []}
    with tempfile.TemporaryDirectory() as folder:
        root = io.as_path(folder)
        sets = [tiny_pairs(root / "first", BATCH), *[tiny_pairs(root / "pairs", rows)] * rounds]
        for number, pairs in enumerate(sets):
            out = root / f"features{number}"
            with contextlib.redirect_stderr(std_io.StringIO()):  # lines of progress
                found["storing"].append(storing(pairs, out))
            found["reading"].append(reading(pairs, out))
            out.rmtree()
    return Costs(*(tuple(values[1:]) for values in found.values()))


def tiny_pairs(folder: str | os.PathLike, rows: int) -> PairsSet:
    """A set of so many pairs of a picture of 8 x 8 px and a caption."""
    picture = encoded(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8), "png")
    return made_up(folder, [picture], [f"caption of picture {row}" for row in range(rows)])


def made_up(folder: str | os.PathLike, pictures: Sequence[bytes], captions: Sequence[str]) -> PairsSet:
    """A set of a pair for each caption, which share the pictures in turn."""
    with PairsWriter(folder, "bench", shards=1) as writer:
        for row, caption in enumerate(captions):
            writer.add(Pair(pair_id("bench", str(row)), pictures[row % len(pictures)], [caption]))
        return writer.finish(rows={}, classes={})


def encoded(pixels: np.ndarray, codec: str) -> bytes:
    """A picture's file."""
    buffer = std_io.BytesIO()
    Image.fromarray(pixels).save(buffer, codec)
    return buffer.getvalue()


def storing(pairs: PairsSet, out: str | os.PathLike) -> float:
    """Milliseconds of the processor that emission takes for 1,000 pairs and teacher, beside `APART`.

    Args:
      pairs: the set.
      out: folder for the features of nine teachers; must not exist.
    """
    teachers = {f"teacher{i}": Instant(width) for i, width in enumerate(WIDTHS)}
    meter = Meter(time.process_time)
    begin = time.process_time()
    emit(teachers, pairs, out, policy=POLICY, meter=meter)
    own = time.process_time() - begin - meter.of(*APART)
    return 1e6 * own / len(pairs) / len(teachers)


def reading(pairs: PairsSet, features: str | os.PathLike) -> float:
    """Milliseconds of the processor that reading nine feature sets adds to 1,000 pairs of training's input.

    One pass in the order of the block shuffle, with nothing in memory at its beginning.

    Args:
      pairs: the set.
      features: the folder that `storing` wrote.
    """
    sets = {f"teacher{i}": FeatureSet.open(io.as_path(features) / f"teacher{i}", pairs) for i in range(len(WIDTHS))}
    batches = _Timed(pairs, batch=BATCH, seed=0, policy=POLICY, image_size=8, tokenizer=_no_tokens, features=sets)
    steps = len(pairs) // BATCH
    for step in range(steps):
        batches.batch(step)
    return 1e6 * batches.seconds / (steps * BATCH)


class _Timed(Batches):
    """Batches that count the seconds of reading targets."""

    seconds = 0.0

    def _targets(self, *arguments) -> dict[str, dict[str, np.ndarray]]:
        begin = time.thread_time()
        found = super()._targets(*arguments)
        self.seconds += time.thread_time() - begin
        return found


def _no_tokens(texts: list[str]) -> TextBatch:
    return TextBatch(*np.zeros((4, len(texts), 1), np.int32))
