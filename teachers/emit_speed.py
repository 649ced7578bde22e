"""Speed of a whole emission by both backends, turn by turn in one run, and where its time goes."""

import contextlib
import dataclasses
import io as std_io
import itertools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

import teachers
from mmkd_jax import io, timing, tokenizers
from mmkd_jax.data.pairs import PairsSet
from teachers import BACKENDS, costs, specs, speed
from teachers.emit import emit
from teachers.progress import Meter
from teachers.torch_backend.libraries import need

PICTURE = 512  # px a side, JPEG
PICTURES = 16  # different ones
VOCABULARY = 1000  # tokens of a teacher with random weights
TEXT = (
    "axial ct of the chest with a nodule in the left lower lobe frontal radiograph shows effusion and enlarged heart "
    "biopsy stained with haematoxylin eosin glands stroma tumour cells magnification arrow mri t2 weighted image brain "
    "lesion fundus photograph optic disc haemorrhage ultrasound patient years old male female"
)  # words of captions


@dataclasses.dataclass(frozen=True)
class Parts:
    """Seconds for a pair: of the whole, and of its parts; one number a round.

    Attributes:
      whole: all of it, the files included.
      decode, preprocess, encode: of the picture; pictures and captions; by the towers.
    """

    whole: tuple[float, ...]
    decode: tuple[float, ...]
    preprocess: tuple[float, ...]
    encode: tuple[float, ...]

    @property
    def host(self) -> tuple[float, ...]:
        """What is left: reading pairs, normalising, statistics, hashing, framing, writing."""
        return tuple(w - sum(parts) for w, *parts in zip(self.whole, self.decode, self.preprocess, self.encode))


@dataclasses.dataclass(frozen=True)
class EmitSpeed:
    """How fast one teacher's features are emitted.

    Attributes:
      teacher: its name.
      flax, torch: by either backend.
    """

    teacher: str
    flax: Parts
    torch: Parts

    @property
    def ratios(self) -> list[float]:
        """Speed of flax over that of torch in each round: above one, flax is faster."""
        return [theirs / ours for ours, theirs in zip(self.flax.whole, self.torch.whole, strict=True)]

    def __str__(self) -> str:
        rates = [[1 / s for s in parts.whole] for parts in (self.flax, self.torch)]
        text = f"{self.teacher:20} " + "".join(f"{timing.spread(cell):24}" for cell in (*rates, self.ratios))
        for part in ("decode", "preprocess", "encode", "host"):
            two = (1e3 * statistics.median(getattr(parts, part)) for parts in (self.flax, self.torch))
            text += f"{' | '.join(f'{ms:.3g}' for ms in two):18}"
        return text.rstrip()


HEADER = (
    f"{'teacher':20} {'flax pairs/s':24}{'torch pairs/s':24}{'flax / torch':24}"
    f"{'decode':18}{'preprocess':18}{'encode':18}host, ms a pair: flax | torch"
)


def measure(
    names: Sequence[str], *, rows: int = 64, batch: int = 8, rounds: int = 3, small: bool = False
) -> Iterator[EmitSpeed]:
    """Emits one view of made-up pairs with each teacher, one at a time, after one emission that is not counted.

    Args:
      names: of records, for random weights, or NAME=WEIGHTS; all of `speed.FAMILIES` if empty.
      rows: pairs, each of a picture of `PICTURE` px and a caption.
      batch: pictures or texts at a time.
      rounds: of both backends.
      small: towers of the same kinds, in seconds instead of minutes; of random weights only.

    Raises:
      InputError: a name is unknown, weights cannot be read, or torch or a reference library is missing.
    """
    need("torch")
    named = [name.partition("=")[::2] for name in names or speed.FAMILIES]
    for name, weights in named:  # before anything takes long
        if not weights:
            specs.find(name)
    with tempfile.TemporaryDirectory() as folder:
        pairs = _pairs(io.as_path(folder) / "pairs", rows)
        for name, weights in named:
            yield _measure(name, _both(name, weights, batch, small, pairs), pairs, rounds)


def _both(name: str, weights: str, batch: int, small: bool, pairs: PairsSet) -> dict[str, Any]:
    """The teacher by backend."""
    if weights:
        return {backend: teachers.load(name, weights, backend, batch) for backend in BACKENDS}
    facts = specs.find(name)
    spec = speed.shrunk(facts.spec) if small else facts.spec
    captions = [pair.captions[0] for pair in pairs.read_many(range(len(pairs)))]
    made = tokenizers.train(spec.tokenizer, captions, vocab_size=VOCABULARY, context=spec.text.context)
    return dict(zip(BACKENDS, speed.both(spec, facts.layout, batch, made), strict=True))


def _measure(name: str, by_backend: Mapping[str, Any], pairs: PairsSet, rounds: int) -> EmitSpeed:
    meters: dict[str, list[Meter]] = {backend: [] for backend in by_backend}
    with tempfile.TemporaryDirectory() as folder:
        number = itertools.count()

        def once(backend: str) -> None:
            meters[backend].append(Meter())
            out = io.as_path(folder) / str(next(number))
            with contextlib.redirect_stderr(std_io.StringIO()):  # lines of progress
                emit({name: by_backend[backend]}, pairs, out, policy=costs.POLICY, meter=meters[backend][-1])

        calls = {backend: lambda backend=backend: once(backend) for backend in by_backend}
        seconds = timing.interleaved(calls, rounds)
    count = len(pairs)
    found = {}
    for backend, whole in seconds.items():
        parts = {p: tuple(meter.of(p) / count for meter in meters[backend][1:]) for p in costs.APART}
        found[backend] = Parts(whole=tuple(s / count for s in whole), **parts)
    return EmitSpeed(name, **found)


def _pairs(folder, rows: int) -> PairsSet:
    """Pictures of smooth colour with some noise, and captions of 10 to 30 words."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((PICTURE, PICTURE))
        noisy = np.asarray(coarse, np.float32) + rng.normal(0, 8, (PICTURE, PICTURE, 3))
        pictures.append(costs.encoded(noisy.clip(0, 255).astype(np.uint8), "jpeg"))
    captions = [" ".join(rng.choice(TEXT.split(), size=rng.integers(10, 31))) for _ in range(rows)]
    return costs.made_up(folder, pictures, captions)
