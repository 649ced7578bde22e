"""Speed of a teacher's two backends, with the same random weights and inputs, turn by turn in one run."""

import dataclasses
import os
import statistics
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mmkd_jax import timing
from mmkd_jax.batch import TextBatch
from mmkd_jax.image_towers import ImageTower, ResNetTower, SwinTower
from mmkd_jax.models import state_dict
from mmkd_jax.specs import ModelSpec
from teachers import Teacher, specs, torch_backend
from teachers.torch_backend import families
from teachers.torch_backend.libraries import need
from teachers.verify import relative_difference

# One of each family: CLIP in open_clip's and in transformers' names, ViT + BERT of OpenAI's and of timm's kind,
# ResNet with attention pooling, Swin, plain ResNet.
FAMILIES = ("QuiltNet-B-16", "PLIP", "UniMed-CLIP", "BiomedCLIP", "PMC-CLIP", "MedCLIP-ViT", "MedCLIP-ResNet")
LENGTHS = 10, 40  # tokens of a caption, before padding
TEXTS = 4  # for each picture: the flax backend sorts them by length before it fills its batches
TIMM_TINY = ImageTower(192, 12, 3, 16, 224, 768, "gelu", 1e-6, False, True, "timm")


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast one tower of a teacher is.

    Attributes:
      teacher: its name.
      tower: `image` or `text`.
      flax, torch: pictures or texts a second, one number a round.
      difference: the largest relative difference of their features.
    """

    teacher: str
    tower: str
    flax: tuple[float, ...]
    torch: tuple[float, ...]
    difference: float

    @property
    def ratios(self) -> list[float]:
        """Speed of flax over that of torch in each round: above one, flax is faster."""
        return [ours / theirs for ours, theirs in zip(self.flax, self.torch, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of `ratios`."""
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        cells = map(timing.spread, (self.flax, self.torch, self.ratios))
        return f"{self.teacher:20} {self.tower:6}" + "".join(f"{cell:24}" for cell in cells) + f"{self.difference:.0e}"


HEADER = f"{'teacher':20} {'tower':6}{'flax /s':24}{'torch /s':24}{'flax / torch':24}difference"


def measure(names: Sequence[str], *, batch: int = 8, rounds: int = 5, small: bool = False) -> Iterator[Speed]:
    """Measures each teacher's towers in float32, after one call that is not counted.

    Args:
      names: of records; all of `FAMILIES` if empty.
      batch: pictures or texts at a time, texts as each backend takes them in emission (torch at the full context).
      rounds: of both backends.
      small: towers of the same kinds, in seconds instead of minutes.

    Raises:
      InputError: a name is unknown, or torch or a reference library is missing.
    """
    need("torch")
    for facts in [specs.find(name) for name in names or FAMILIES]:
        spec = shrunk(facts.spec) if small else facts.spec
        ours, theirs = both(spec, facts.layout, batch)
        for tower, inputs in (("image", pictures(spec, batch)), ("text", texts(spec, TEXTS * batch))):
            yield _measure(ours, theirs, tower, inputs, rounds)


def both(spec: ModelSpec, layout: str, batch: int, tokenizer=None) -> tuple[Teacher, torch_backend.TorchTeacher]:
    """A teacher with random weights by this project and by the reference libraries."""
    towers = families.build(spec, layout)
    tensors = {key: value.cpu().numpy() for key, value in towers.model.state_dict().items()}
    common = {"name": spec.name, "checkpoint": "", "spec": spec, "tokenizer": tokenizer, "weights_hash": ""}
    ours = Teacher(params=jax.device_put(state_dict.to_params(spec, tensors)), micro_batch=batch, **common)
    return ours, torch_backend.TorchTeacher(towers=towers, micro_batch=batch, **common)


def _measure(ours: Teacher, theirs: torch_backend.TorchTeacher, tower: str, inputs, rounds: int) -> Speed:
    encode = {"flax": getattr(ours, f"encode_{tower}"), "torch": getattr(theirs, f"encode_{tower}")}
    difference = relative_difference(encode["flax"](inputs), encode["torch"](inputs))
    seconds = timing.interleaved({name: lambda f=f: f(inputs) for name, f in encode.items()}, rounds)
    count = len(inputs if tower == "image" else inputs.ids)
    rates = {name: tuple(count / s for s in values) for name, values in seconds.items()}
    return Speed(ours.name, tower, rates["flax"], rates["torch"], difference)


def setting(batch: int, rounds: int) -> str:
    """What a measurement was made with: devices, cores, versions."""
    torch, device = need("torch"), jax.devices()[0]
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return (
        f"float32, batches of {batch}, {rounds} rounds: median (least-largest)\n"
        f"jax {jax.__version__} on {device.device_kind}; torch {torch.__version__} on {cuda}; {os.cpu_count()} cores"
    )


def shrunk(spec: ModelSpec) -> ModelSpec:
    """A model of the same kind that runs in milliseconds."""
    text = {"width": 64, "layers": 2, "heads": 2, "mlp_width": 128, "vocab_size": 1000, "positions": 80, "context": 77}
    image = spec.image
    if isinstance(image, SwinTower):
        image = SwinTower(width=24, stages=(2, 2), heads=3, window=4, image_size=64)
    elif isinstance(image, ResNetTower):
        heads = {"modified_resnet": 8, "resnet": 0}[image.kind]
        image = dataclasses.replace(image, stages=(1, 1, 1, 1), heads=heads, image_size=64)
    elif image.layout == "timm":
        image = TIMM_TINY
    else:
        image = dataclasses.replace(image, width=64, layers=2, heads=2, patch=16, image_size=64, mlp_width=128)
    return dataclasses.replace(
        spec,
        image=image,
        text=dataclasses.replace(spec.text, **text),
        embed=32,
        preprocess=dataclasses.replace(spec.preprocess, size=image.image_size),
    )


def pictures(spec: ModelSpec, n: int) -> np.ndarray:
    """Noise as an image tower takes it, float32 `[n, S, S, 3]`."""
    return np.random.default_rng(0).normal(size=(n, *2 * (spec.image.image_size,), 3)).astype(np.float32)


def texts(spec: ModelSpec, n: int) -> TextBatch:
    """Captions of `LENGTHS` random tokens, the last of them the end token, padded to the context."""
    rng, text = np.random.default_rng(1), spec.text
    last = rng.integers(*LENGTHS, size=n)[:, None] - 1
    positions = np.tile(np.arange(text.context, dtype=np.int32), (n, 1))
    ids = rng.integers(1, text.vocab_size - 1, size=positions.shape)
    ids = np.select([positions < last, positions == last], [ids, text.vocab_size - 1], 0).astype(np.int32)
    mask = (ids > 0).astype(np.int32)
    return TextBatch(ids, mask, positions, mask)
