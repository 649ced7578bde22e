"""Views of a picture: view k of a pair is a function of (policy, id, k), for every teacher and the student alike."""

import dataclasses
import functools
import hashlib
import math
from typing import Any

import numpy as np
from PIL import Image

from mmkd_jax import io, preprocess, specs
from mmkd_jax.errors import InputError, near

KINDS = ("random_resized_crop", "center")
_TRIES = 10


@dataclasses.dataclass(frozen=True)
class ViewPolicy:
    """How views are cut.

    Attributes:
      kind: `random_resized_crop` (torchvision's `RandomResizedCrop.get_params`: area and log aspect ratio uniform,
        ten tries, then the largest centre crop within the ratio bounds), or `center` (evaluation's preprocessing:
        every view is the same).
      scale: smallest and largest area of a crop, as a fraction of the picture.
      ratio: smallest and largest width / height.
      seed: another seed gives other crops.
    """

    kind: str = "random_resized_crop"
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "scale", tuple(float(v) for v in self.scale))
        object.__setattr__(self, "ratio", tuple(float(v) for v in self.ratio))
        if self.kind not in KINDS:
            raise InputError(f"unknown kind of view {self.kind!r}; {near(self.kind, KINDS)}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"scale {self.scale} is not (low, high) within (0, 1]")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(f"ratio {self.ratio} is not (low, high) above 0")

    @functools.cached_property
    def hash(self) -> str:
        """Identity of all views under this policy."""
        return io.hash_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without what does not matter for the kind; `from_dict` inverts it."""
        if self.kind == "center":
            return {"kind": "center"}
        return {"kind": self.kind, "scale": list(self.scale), "ratio": list(self.ratio), "seed": self.seed}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "ViewPolicy":
        """The policy of a JSON-like record.

        Raises:
          InputError: a field is unknown or a value is out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in record:
            if name not in names:
                raise InputError(f"a view policy has no field {name!r}; {near(name, names)}")
        return cls(**record)

    def box(self, id: str, k: int, width: int, height: int) -> tuple[int, int, int, int]:
        """Crop of view `k` of the pair `id` in a picture of `width` x `height` px: (left, top, right, bottom).

        For `center` it is the square on the shorter side.
        """
        if self.kind == "center":
            side = min(width, height)
            left, top = round((width - side) / 2), round((height - side) / 2)
            return left, top, left + side, top + side
        for attempt in range(_TRIES):
            u = _uniforms(self.hash, id, k, attempt)
            area = width * height * (self.scale[0] + u[0] * (self.scale[1] - self.scale[0]))
            low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
            ratio = math.exp(low + u[1] * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(u[2] * (width - w + 1)), int(u[3] * (height - h + 1))
                return left, top, left + w, top + h
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def render(self, image: Image.Image, id: str, k: int, size: int) -> np.ndarray:
        """Pixels of view `k`: crop, then bicubic resize with antialiasing, in RGB.

        Args:
          image: the decoded picture.
          id: of the pair.
          k: number of the view, from 0.
          size: side of the result, px.

        Returns:
          uint8 `[size, size, 3]`.
        """
        if self.kind == "center":
            return preprocess.eval_image(image, specs.Preprocess(size=size))
        if image.mode != "L":  # grey is resized as one channel: the same values for a third of the work
            image = image.convert("RGB")
        view = image.crop(self.box(id, k, *image.size)).resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(view.convert("RGB"))


def _uniforms(policy: str, id: str, k: int, attempt: int) -> list[float]:
    """Four numbers uniform in [0, 1), a function of the arguments on every machine."""
    digest = hashlib.blake2b(f"{policy}/{id}/{k}/{attempt}".encode(), digest_size=32).digest()
    return [(int.from_bytes(digest[i : i + 8], "little") >> 11) / 2.0**53 for i in range(0, 32, 8)]
