"""Visual questions by a frozen probe: logistic regression over answers on [image; question; product; difference].

Image and question are the encoder's unit embeddings; product and absolute difference are taken number by number (a
signed difference would add nothing to a linear model of both). Closed and open questions have a probe each, over the
answers of training questions only: a test question with another answer counts as wrong. The penalty is chosen by the
log-loss on a fifth of the training groups. A second probe sees the question alone: what it gets right needs no picture.

The profile `PUBMEDCLIP` counts as PubMedCLIP's public code does (sarahESL/PubMedCLIP): the published split, which may
have a picture on both sides; the answers of train and test as vocabulary; a classifier of questions guesses which of
the two probes is asked, and accuracies are over the guessed types. Not repeated: its network, and that it chooses the
checkpoint by the test score. Its numbers are for setting beside others made so, and too high for anything else.
"""

import dataclasses
from collections import Counter

import numpy as np

from mmkd_jax.errors import InputError
from mmkd_jax.evals import linear_probe, logistic, vqa_questions, vqa_scores
from mmkd_jax.evals.base import EvalSet, TaskData, TaskResult
from mmkd_jax.evals.features import unit
from mmkd_jax.evals.vqa_questions import Questions
from mmkd_jax.evals.vqa_scores import Said

MOST = 2000  # answers of a type that a probe knows, the commonest
STRENGTHS = tuple(float(c) for c in np.logspace(-5, 1, 7))
TOLERANCE = 1e-6  # of the fit: gap to the optimum relative to the objective


@dataclasses.dataclass(frozen=True)
class Probe:
    """Answers of a type by one probe.

    Attributes:
      vocabulary: the answers that it knows.
      scores: probabilities of the asked questions, float64 `[m, answers]`.
      strength: its C, 0 where there was nothing to fit.
    """

    vocabulary: tuple[str, ...]
    scores: np.ndarray
    strength: float

    @property
    def answers(self) -> np.ndarray:
        """The likeliest answer to each question, `[m]`."""
        return np.array(self.vocabulary)[self.scores.argmax(axis=1)]

    @property
    def yes(self) -> np.ndarray:
        """Probability of yes less that of no, `[m]`; NaN if it does not know both."""
        if not set(vqa_scores.POLAR) <= set(self.vocabulary):
            return np.full(len(self.scores), np.nan)
        yes, no = (self.scores[:, self.vocabulary.index(answer)] for answer in vqa_scores.POLAR)
        return yes - no


def joined(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """[image; question; product; absolute difference] of unit features `[n, d]` each, float64 `[n, 4 d]`."""
    image, text = np.asarray(unit(image), np.float64), np.asarray(unit(text), np.float64)
    return np.concatenate([image, text, image * text, np.abs(image - text)], axis=1)


def vocabulary_of(answers: np.ndarray, most: int = MOST) -> tuple[str, ...]:
    """The commonest answers, of equals the first by alphabet; sorted."""
    counts = Counter(answers.tolist())
    return tuple(sorted(sorted(counts, key=lambda answer: (-counts[answer], answer))[:most]))


def fit(train: np.ndarray, answers: np.ndarray, groups: np.ndarray, asked: np.ndarray, seed: int = 0) -> Probe:
    """A probe on `train` `[n, width]` with normalised answers `[n]`, and what it says of `asked` `[m, width]`."""
    vocabulary = vocabulary_of(answers)
    place = {answer: number for number, answer in enumerate(vocabulary)}
    labels = np.array([place.get(answer, -1) for answer in answers.tolist()])
    train, labels, groups = train[labels >= 0], labels[labels >= 0], groups[labels >= 0]
    if len(vocabulary) == 1:
        return Probe(vocabulary, np.ones((len(asked), 1)), 0.0)
    strength = _chosen(train, labels, groups, seed)
    known, new = linear_probe.standardise(train, asked)
    (model,) = logistic.path(known, labels, [strength], TOLERANCE)
    return Probe(vocabulary, model.probabilities(new, len(vocabulary)), strength)


def _chosen(train: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int) -> float:
    """The strength with the least mean log-loss on held-out groups, of answers that the others have.

    Strengths are tried from the strongest penalty on until the loss rises: the fits after that take the longest.
    """
    names = np.random.default_rng(seed).permutation(np.unique(groups))
    held = np.isin(groups, names[: max(1, len(names) // 5)])
    fitted = ~held
    held &= np.isin(labels, labels[fitted])
    if len(np.unique(labels[fitted])) < 2 or not held.any():
        return STRENGTHS[len(STRENGTHS) // 2]
    known, new = linear_probe.standardise(train[fitted], train[held])
    losses: list[float] = []
    for model in logistic.path(known, labels[fitted], STRENGTHS, TOLERANCE):
        chance = model.probabilities(new, labels.max() + 1)[np.arange(held.sum()), labels[held]]
        losses.append(float(-np.log(np.maximum(chance, 1e-12)).mean()))
        if len(losses) > 1 and losses[-2] < losses[-1]:
            break
    return STRENGTHS[int(np.argmin(losses))]


@dataclasses.dataclass(frozen=True)
class Profile:
    """A way of splitting and counting: `published` takes the authors' split and guesses the types of questions."""

    name: str
    published: bool = False

    def applies(self, one: EvalSet) -> bool:
        """Whether the set has questions to train on and to test on."""
        return one.questions and one.train_rows is not None and len(one.train_rows) > 0

    def evaluate(self, data: TaskData) -> TaskResult:
        """Accuracy of closed and open questions and the like, see `vqa_scores.measure`."""
        split = vqa_questions.as_published if self.published else vqa_questions.by_picture
        train, test = split(data)
        (seen, of_train), (new, of_test) = (_features(data, one) for one in (train, test))
        closed = test.closed
        if self.published:
            guessed = fit(of_train, np.where(train.closed, "closed", "open"), train.groups, of_test, data.seed)
            closed = guessed.answers == "closed"
        said, strengths = _answered(train, seen, new, closed, data.seed)
        blind, _ = _answered(train, of_train, of_test, closed, data.seed)
        context = {
            "profile": self.name,
            "split": "published, by question" if self.published else "by picture",
            "shared_pictures": len(np.intersect1d(train.groups, test.groups)),
            "train_questions": len(train),
            "vocabulary": "train and test" if self.published else "train",
            "types": "guessed" if self.published else "as annotated",
            "strength": strengths,
            **reachable(train, test),
        }
        return vqa_scores.result(data, test, [said], context, [blind])


VQA = Profile("logistic_regression")
PUBMEDCLIP = Profile("pubmedclip", published=True)


def reachable(train: Questions, test: Questions) -> dict:
    """By type, what always giving the commonest training answer scores, and the share of answers that train has."""
    common, known = {}, {}
    for name, closed in (("closed", True), ("open", False)):
        there, asked = train.answers[train.closed == closed], test.answers[test.closed == closed]
        if len(there) and len(asked):
            counts = Counter(there.tolist())
            answer = min(counts, key=lambda one: (-counts[one], one))
            common[name] = round(float((asked == answer).mean()), 6)
            known[name] = round(float(np.isin(asked, vocabulary_of(there)).mean()), 6)
    return {"commonest_answer": common, "reachable": known}


def _features(data: TaskData, questions: Questions) -> tuple[np.ndarray, np.ndarray]:
    """Of picture and question, and of the question alone."""
    images, texts = data.features.images(questions.rows), data.features.texts(questions.texts.tolist())
    if images.shape[1] != texts.shape[1]:
        raise InputError(f"image and text features are {images.shape[1]} and {texts.shape[1]} wide; VQA compares them")
    return joined(images, texts), unit(texts)


def _answered(
    train: Questions, seen: np.ndarray, new: np.ndarray, closed: np.ndarray, seed: int
) -> tuple[Said, dict[str, float]]:
    """What probes of both types say of the features `new`, of which `closed` goes to that of closed questions."""
    answers, yes = np.zeros(len(new), train.answers.dtype), np.full(len(new), np.nan)
    strengths = {}
    for name, own, asked in (("closed", train.closed, closed), ("open", ~train.closed, ~closed)):
        if own.any() and asked.any():
            probe = fit(seen[own], train.answers[own], train.groups[own], new[asked], seed)
            answers[asked], strengths[name] = probe.answers, probe.strength
            yes[asked] = probe.yes if name == "closed" else np.nan
    return Said(answers, yes, closed, np.ones(len(new), bool)), strengths
