"""Which teacher to believe for which modality, measured on pairs that no student is trained on."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mmkd_jax import io
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.errors import InputError, near

FEWEST = 8  # cases of a modality (groups; a pair of no group is one): crops of one picture do not tell teachers apart
BY = ("modality", "teacher")
POOL = 256  # captions that a picture's own one competes with, at most


def measure(
    pairs: PairsSet,
    features: Mapping[str, FeatureSet],
    rows: RowIndex,
    *,
    temperature: float = 0.0,
    by: str = "modality",
    declared: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Any]:
    """A routing table from the teachers' stored features of `rows`.

    A teacher's strength in a modality is the mean reciprocal rank of a picture's own caption among the distinct
    captions of that modality. Pictures that share a caption share its rank, so that sets with one caption a class
    are measured as classification. Where there is too little to measure, the teachers that declare the modality are
    believed alike; where none does, the table leaves the modality out, and all teachers count alike.

    Args:
      pairs: the set.
      features: stored features by teacher; `rows` must be among those encoded.
      rows: held-out training pairs.
      temperature: 0 believes the strongest teacher alone; otherwise weights are softmax(strength / temperature).
      by: `modality`: each has weights of its own. `teacher`: all have the same, from the mean of a teacher's strengths
        over the modalities that could be measured.
      declared: modalities that a teacher was made for, by teacher; names without features take no part.

    Returns:
      JSON record: `weights` {modality: {teacher: weight}}, `strength` of what was measured, `pairs` per modality, and
      what it was made of.

    Raises:
      InputError: a teacher has no features of a row, the temperature is negative, `by` is unknown, or it is `teacher`
        where no modality can be measured.
    """
    if by not in BY:
        raise InputError(f"weights by {by!r}; {near(by, BY)}")
    if not temperature >= 0.0:
        raise InputError(f"temperature {temperature} is negative; 0 believes the strongest teacher alone")
    names = sorted(features)
    modality_of = np.asarray(pairs.table["modality"])[rows.rows]
    weights, strength, counts = {}, {}, {}
    for index, modality in enumerate(pairs.modalities):
        chosen = rows.rows[modality_of == index]
        counts[modality] = len(chosen)
        experts = {name for name in names if modality in (declared or {}).get(name, ())}
        if found := _strengths(pairs, features, chosen):
            strength[modality] = found
            weights[modality] = _weights(found, temperature)
        elif experts:
            weights[modality] = {name: float(name in experts) for name in names}
    if by == "teacher":
        weights = dict.fromkeys(pairs.modalities, _overall(strength, names, temperature))
    return {
        "weights": weights,
        "strength": strength,
        "pairs": counts,
        "temperature": temperature,
        "by": by,
        "rows": rows.hash,
        "features": {name: features[name].hash for name in names},
    }


def save(path, record: Mapping[str, Any]) -> None:
    """Writes a routing table with its hash."""
    io.write_json(path, stored(record))


def stored(record: Mapping[str, Any]) -> dict[str, Any]:
    """A routing table as its file holds it."""
    record = io.json_form(record)
    return {**record, "hash": io.hash_of(record)}


def load(path) -> dict[str, dict[str, float]]:
    """The weights `{modality: {teacher: weight}}` of a saved table, or of one written by hand.

    Raises:
      InputError: there is none, or a weight is not a finite number of at least 0.
    """
    record = io.read_json(path)
    weights = record.get("weights") if isinstance(record, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(row, dict) for row in weights.values()):
        raise InputError(f'{path} is no routing table; it should hold {{"weights": {{modality: {{teacher: weight}}}}}}')
    for modality, row in weights.items():
        for teacher, weight in row.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight < math.inf:
                raise InputError(f"{path}: the weight of {teacher} for {modality} is {weight!r}, not a number >= 0")
    return weights


def _cases(pairs: PairsSet, rows: np.ndarray) -> int:
    """How many groups (patients, pictures that were cut up) the rows come from; a pair of no group is one by itself."""
    groups = np.asarray(pairs.table["group"])[rows]
    return len(np.unique(groups[groups >= 0])) + int((groups < 0).sum())


def _strengths(pairs: PairsSet, features: Mapping[str, FeatureSet], rows: np.ndarray) -> dict[str, float]:
    """Each teacher's strength on the rows of one modality; none where they are too few or all have one caption."""
    captions = [pair.captions[0] for pair in pairs.read_many(rows)]
    if _cases(pairs, rows) < FEWEST or len(set(captions)) < 2:  # one for all, and every teacher finds it
        return {}
    return {name: _reciprocal_rank(features[name], rows, captions) for name in sorted(features)}


def _reciprocal_rank(features: FeatureSet, rows: np.ndarray, captions: list[str]) -> float:
    """Mean of 1 / rank of each row's caption among the distinct ones of its pool; ties count half."""
    ranks = []
    for start in range(0, len(rows), POOL):
        part, texts = rows[start : start + POOL], captions[start : start + POOL]
        zeros = np.zeros(len(part), np.int64)
        found = features.read(part, zeros, zeros)
        if not found["present"].all():
            raise InputError(f"teacher {features.teacher} has no features of some rows to be measured on; emit them")
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        first = [texts.index(text) for text in distinct]
        scores = _unit(found["image"]) @ _unit(found["text"][first]).T
        own = scores[np.arange(len(part)), [distinct[text] for text in texts]][:, None]
        ranks.append(0.5 + (scores > own).sum(axis=1) + 0.5 * (scores == own).sum(axis=1))
    return float(np.mean(1.0 / np.concatenate(ranks)))


def _weights(strength: Mapping[str, float], temperature: float) -> dict[str, float]:
    names = sorted(strength)
    values = np.array([strength[name] for name in names])
    if temperature == 0.0:
        best = int(np.argmax(values))
        return {name: float(i == best) for i, name in enumerate(names)}
    odds = np.exp((values - values.max()) / temperature)
    return {name: float(weight) for name, weight in zip(names, odds / odds.sum(), strict=True)}


def _overall(strength: Mapping[str, Mapping[str, float]], names: Sequence[str], temperature: float) -> dict[str, float]:
    """Weights of teachers by the means of their strengths, whatever a modality's number of pairs."""
    if not strength:
        raise InputError("no modality has enough held-out pairs to measure teachers on; weigh them by hand")
    return _weights({name: float(np.mean([one[name] for one in strength.values()])) for name in names}, temperature)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
