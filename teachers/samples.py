"""Verification against the features that were published with MMKD-CLIP: do these weights, run so, give them?

The authors' layout (`MMKDCLIP_DATA` of github.com/wangshansong1/MMKD-CLIP): `meta.jsonl` names for each sample its
picture and caption, and `features/FOLDERID/ID/clips_output.pt` beside the picture holds `TEACHER_img` and
`TEACHER_txt`, float32 of the teacher's own width and unit length, for the teachers that were kept for the sample.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath

import teachers
from mmkd_jax import io, preprocess, tokenizers
from mmkd_jax.errors import InputError
from mmkd_jax.models import folders, pickles
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.models.weights import holds_weights
from mmkd_jax.specs import ModelSpec
from teachers import specs

META, FEATURES = "meta.jsonl", "clips_output.pt"
EQUAL = 0.999  # least cosine of features computed alike; half precision and other decoders cost less
TIE = 0.01, 1e-10  # distances (1 - cosine) that differ by less, of the smaller one and absolutely, are alike
TOWERS = ("image", "text")
_ENDS = {"image": "img", "text": "txt"}  # of the names of features


@dataclasses.dataclass(frozen=True)
class Sample:
    """A published sample.

    Attributes:
      id: the authors' name of it.
      picture: its file.
      caption: its text.
      features: by `TEACHER_img` and `TEACHER_txt`, `[width]` each.
    """

    id: str
    picture: epath.Path
    caption: str
    features: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Fit:
    """How near a variant comes: cosines with the stored features, `[samples]` for each of `TOWERS`."""

    variant: str
    cosines: dict[str, np.ndarray]

    def distance(self, *towers: str) -> float:
        """The mean of 1 - cosine over samples, of some towers or of both: a wrong head count shows only here."""
        return float(np.mean([1 - self.cosines[tower] for tower in towers or TOWERS]))


def read(folder: str | os.PathLike) -> list[Sample]:
    """The samples of `folder`, in order. Pickles are read without executing them.

    Raises:
      InputError: a file is missing, damaged, would run code, or lies outside `folder`.
    """
    folder = io.as_path(folder)
    meta = folder / META
    if not meta.exists():
        raise InputError(f"{meta} does not exist; give the folder of published samples, which holds it")
    try:
        lines = [json.loads(line) for line in meta.read_text().splitlines() if line.strip()]
        named = [(line["id"], line["folderid"], line["imgpath"], line["txt"]) for line in lines]
        if not all(isinstance(value, str) for line in named for value in line):
            raise TypeError("names, paths and captions are texts")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{meta} is not a list of samples ({type(error).__name__}: {error})") from error
    if not named:
        raise InputError(f"{meta} names no samples")
    return [
        Sample(name, _inside(folder, picture), text, _features(_inside(folder, f"features/{group}/{name}/{FEATURES}")))
        for name, group, picture, text in named
    ]


def compare(name: str, weights: str | os.PathLike, samples: Sequence[Sample]) -> list[Fit]:
    """The fits of every variant of a teacher that the weights are of, best first.

    Args:
      name: of a record whose features the samples hold.
      weights: see `teachers.load`.
      samples: those that hold this teacher's features.

    Raises:
      InputError: the weights are of none of the variants, a stored feature is not of their width, or a picture is
        damaged.
    """
    key = specs.find(name).published_as
    fits = []
    for variant, teacher in variants(name, weights):
        stored = _stored(key, samples, teacher.spec.embed)
        cosines = {tower: _cosines(_encode(teacher, tower, samples), stored[tower]) for tower in TOWERS}
        fits.append(Fit(variant, cosines))
    return sorted(fits, key=Fit.distance)


def variants(name: str, weights: str | os.PathLike) -> Iterator[tuple[str, "teachers.Teacher"]]:
    """The weights as every record runs them whose features go under the same name, if they are of its architecture.

    The named record is the first, or what the weights' folder says of itself.

    Raises:
      InputError: they are of none of them.
    """
    key = specs.find(name).published_as
    alike = [other for other in specs.TEACHERS if other != name and specs.find(other).published_as == key]
    bare = _is_bare(io.as_path(weights))
    first, refusal, seen = None, None, []
    for record in (name, name, *alike):  # the second time as the record says, where the weights say otherwise
        spec = specs.find(record).spec
        try:
            if first is not None and _fits(spec, first.params):
                teacher = _as(first, spec)
            elif first is None or bare:
                teacher = teachers.load(record, weights, micro_batch=4)
            else:
                continue
        except InputError as error:
            refusal = refusal or error
            continue
        first = first or teacher
        if (reading := _reading(teacher.spec)) not in seen:
            seen.append(reading)
            yield (record if _reading(spec) == reading else f"{record}'s folder"), teacher
    if first is None:
        raise refusal


def page(name: str, weights: str | os.PathLike, samples: str | os.PathLike) -> str:
    """What comparing a teacher's weights with published features shows, for people.

    Args:
      name: of a record.
      weights: see `teachers.load`.
      samples: a folder in the authors' layout.

    Raises:
      InputError: see `read` and `compare`.
    """
    key = specs.find(name).published_as
    if not key:
        return f"{name}: no features of it were published, so there is nothing to compare with"
    every = read(samples)
    held = [sample for sample in every if all(f"{key}_{end}" in sample.features for end in _ENDS.values())]
    if not held:
        kept = sorted({k.rpartition("_")[0] for sample in every for k in sample.features})
        return f"{name}: none of the {len(every)} samples holds features of {key}; they hold {', '.join(kept)}"
    return "\n".join(_lines(name, key, held, compare(name, weights, held)))


def _lines(name: str, key: str, samples: Sequence[Sample], fits: Sequence[Fit]) -> Iterator[str]:
    wide = max(len(fit.variant) for fit in fits)
    yield f"{name}: cosines with the published features of {key}, {len(samples)} sample(s)"
    if not {name, f"{name}'s folder"} & {fit.variant for fit in fits}:
        yield f"these are not weights of {name}, but of {', '.join(fit.variant for fit in fits)}"
    yield f"{'sample':32}  {'variant':{wide}}  {'image':>9}  {'text':>9}"
    for i, sample in enumerate(samples):
        for fit in fits:
            image, text = (fit.cosines[tower][i] for tower in TOWERS)
            yield f"{sample.id:32}  {fit.variant:{wide}}  {image:9.6f}  {text:9.6f}"
    for fit in fits:
        image, text = (fit.distance(tower) for tower in TOWERS)
        yield f"{'mean of 1 - cosine':32}  {fit.variant:{wide}}  {image:9.1e}  {text:9.1e}"
    for tower in TOWERS:
        yield f"{tower}: {_verdict(tower, fits)}"


def _verdict(tower: str, fits: Sequence[Fit]) -> str:
    """Which variant fits one tower best, and whether it fits at all."""
    best = min(fits, key=lambda fit: fit.distance(tower))
    limit = best.distance(tower) * (1 + TIE[0]) + TIE[1]
    equal = [fit.variant for fit in fits if fit.distance(tower) <= limit]
    lowest = float(best.cosines[tower].min())
    if lowest < EQUAL:
        return f"NOT reproduced: the nearest is {' = '.join(equal)}, with a lowest cosine of {lowest:.6f}"
    if len(fits) == 1:
        return f"reproduced by {best.variant}; lowest cosine {lowest:.6f}"
    which = "all variants do alike" if len(equal) == len(fits) else f"{' = '.join(equal)} fits best"
    return f"reproduced: {which}; lowest cosine {lowest:.6f}"


def _stored(key: str, samples: Sequence[Sample], width: int) -> dict[str, np.ndarray]:
    """The published features, `[samples, width]` for each tower."""
    for sample in samples:
        for end in _ENDS.values():
            if (found := len(sample.features[f"{key}_{end}"])) != width:
                raise InputError(
                    f"the weights give features of width {width}, sample {sample.id} holds {key}_{end} of width "
                    f"{found}: they come from another model"
                )
    return {tower: np.stack([s.features[f"{key}_{end}"] for s in samples]) for tower, end in _ENDS.items()}


def _encode(teacher: "teachers.Teacher", tower: str, samples: Sequence[Sample]) -> np.ndarray:
    if tower == "text":
        return teacher.encode_text(teacher.tokenize([sample.caption for sample in samples]))
    return teacher.encode_image(np.stack([_picture(teacher, sample) for sample in samples]))


def _picture(teacher: "teachers.Teacher", sample: Sample) -> np.ndarray:
    if not sample.picture.exists():
        raise InputError(f"{sample.picture} does not exist; the samples are not complete")
    try:
        return teacher.preprocess(preprocess.decode(sample.picture.read_bytes()))
    except InputError as error:
        raise InputError(f"{sample.picture}: {error}") from error


def _cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of rows, in double precision."""
    a, b = np.float64(ours), np.float64(theirs)
    return (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)


def _features(path: epath.Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise InputError(f"{path} does not exist; the samples are not complete")
    features = {key: np.float32(value).reshape(-1) for key, value in pickles.read(path).items()}
    for key, value in features.items():
        if not value.any() or not np.isfinite(value).all():
            raise InputError(f"{path}: {key} is no feature (zero, or not finite)")
    return features


def _inside(folder: epath.Path, relative: str) -> epath.Path:
    """A path of `meta.jsonl`, which may come from anyone."""
    parts = pathlib.PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts or "\0" in relative:
        raise InputError(f"{folder / META} names {relative!r}, which is outside of {folder}")
    return folder / relative


def _fits(spec: ModelSpec, params) -> bool:
    """Whether `params` are of the architecture of `spec`."""
    wanted = jax.tree.map(lambda x: x.shape, DualEncoder(spec).shapes(), is_leaf=lambda x: hasattr(x, "shape"))
    return wanted == jax.tree.map(lambda x: x.shape, dict(params))


def _as(teacher: "teachers.Teacher", spec: ModelSpec) -> "teachers.Teacher":
    """The same weights and vocabulary, run as `spec` says."""
    files, text = teacher.tokenizer.files(), spec.text
    tokenizer = tokenizers.from_files(spec.tokenizer, files, context=text.context, vocab_size=text.vocab_size)
    return dataclasses.replace(teacher, spec=spec, tokenizer=tokenizer)


def _is_bare(path: epath.Path) -> bool:
    """Whether weights need a record, as a file does and a folder that describes itself or a run's does not."""
    if not path.is_dir():
        return True
    return not folders.describes_itself(path) and holds_weights(path)


def _reading(spec: ModelSpec) -> ModelSpec:
    """What of a spec bears on features."""
    return dataclasses.replace(spec, name="", license="", source="", modalities=())
