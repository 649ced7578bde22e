"""Visual questions by a cross-attention head that is trained on a model's towers: `FROZEN`, or `UNFROZEN` with them.

The split, the vocabulary and the counting are those of the frozen probe (`vqa`). The head is trained for a fixed number
of epochs, and its last state tested: no choice is made by any score. Beside it the same head is trained on the question
alone, which says what the picture adds; both with several seeds, and numbers are means over these. It needs the towers
themselves: a student, or a teacher run by this project's towers, whose image tower is a ViT.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmkd_jax import api, io, preprocess
from mmkd_jax.batch import TextBatch
from mmkd_jax.errors import InputError
from mmkd_jax.evals import vqa, vqa_questions, vqa_scores, vqa_training
from mmkd_jax.evals.base import EvalSet, TaskData, TaskResult
from mmkd_jax.evals.vqa_questions import Questions
from mmkd_jax.evals.vqa_scores import Said
from mmkd_jax.evals.vqa_training import FusionTask, Inputs
from mmkd_jax.models import fusion
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.models.fusion import FusionSpec
from mmkd_jax.train import heads


@dataclasses.dataclass(frozen=True)
class Head:
    """How a head is trained and tested.

    Attributes:
      trained: whether the towers are trained with it, at a tenth of its rate.
      epochs, batch, lr, decay: of the training.
      width, heads, layers, dropout: of the head, see `FusionSpec`.
      seeds: how many heads are trained, from other initial values in another order.
    """

    trained: bool = False
    epochs: int = 20
    batch: int = 64
    lr: float = 1e-3
    decay: float = 0.05
    width: int = 128
    heads: int = 4
    layers: int = 2
    dropout: float = 0.1
    seeds: int = 3

    def applies(self, one: EvalSet) -> bool:
        """Whether the set has questions to train on and to test on."""
        return vqa.VQA.applies(one)

    def evaluate(self, data: TaskData) -> TaskResult:
        """Accuracy of closed and open questions and the like, see `vqa_scores.measure`."""
        train, test = vqa_questions.by_picture(data)
        train, vocabulary, allowed, answer = _targets(train)
        model, params, tokenizer = _towers(data.features.encoder)
        sizes = model.spec.image.width, model.spec.text.width, len(vocabulary)
        spec = FusionSpec(*sizes, self.width, self.heads, self.layers, self.dropout)
        given = [_inputs(data, one, model, params, tokenizer, self.trained) for one in (train, test)]
        targets = {"closed": train.closed, "answer": answer}
        asked = io.hash_of([one.tolist() for one in (train.ids, train.texts, train.answers)])
        known = {"encoder": _identity(data, params), "questions": asked, "head": spec.to_dict()}
        start = params if self.trained else {}
        answered: dict[bool, list[Said]] = {False: [], True: []}
        with _folder(data, io.hash_of([known, self._training()])[:16]) as workdir:
            for seed, blind in ((seed, blind) for seed in range(self.seeds) for blind in answered):
                task = FusionTask(spec, allowed, model if self.trained else None, blind=blind)
                seen = [_blinded(one) for one in given] if blind else given
                run = io.as_path(workdir) / f"seed{data.seed + seed}{'-blind' * blind}"
                config = self._config(len(train), data.seed + seed)
                learned = vqa_training.train(task, seen[0], targets, config, run, known | {"blind": blind}, start)
                scores = vqa_training.predict(task, learned, seen[1], test.closed, self.batch)
                answered[blind].append(_said(test, vocabulary, scores))
        context = {
            "profile": "cross_attention_unfrozen" if self.trained else "cross_attention",
            "split": "by picture",
            "train_questions": len(train),
            "vocabulary": "train",
            "types": "as annotated",
            "settings": dataclasses.asdict(self) | {"steps": self._steps(len(train))},
            **vqa.reachable(train, test),
        }
        return vqa_scores.result(data, test, answered[False], context, answered[True])

    def _steps(self, questions: int) -> int:
        return max(1, self.epochs * questions // self.batch)

    def _config(self, questions: int, seed: int) -> ConfigDict:
        steps = self._steps(questions)
        options = {"lr": self.lr, "decay": self.decay, "seed": seed, "warmup": steps // 20}
        return heads.config("fusion", batch=self.batch, steps=steps, **options)

    def _training(self) -> dict[str, Any]:
        """What a run is made by: all but the number of seeds, so that more of them train no head again."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "seeds"}


FROZEN, UNFROZEN = Head(), Head(trained=True, lr=3e-4)


def _targets(train: Questions) -> tuple[Questions, tuple[str, ...], np.ndarray, np.ndarray]:
    """The questions whose answer is known, all answers, which of them open and closed questions have, and answers."""
    by_type = [vqa.vocabulary_of(train.answers[train.closed == closed]) for closed in (False, True)]
    vocabulary = tuple(sorted(set(by_type[0]) | set(by_type[1])))
    allowed = np.array([[answer in own for answer in vocabulary] for own in map(set, by_type)])
    place = {answer: number for number, answer in enumerate(vocabulary)}
    answer = np.array([place.get(one, -1) for one in train.answers.tolist()], np.int32)
    kept = (answer >= 0) & allowed[train.closed.astype(int), answer]
    return train[kept], vocabulary, allowed, answer[kept]


def _said(test: Questions, vocabulary: tuple[str, ...], scores: np.ndarray) -> Said:
    """The likeliest answers; "" where training had no question of the type."""
    answers = np.where(scores.max(axis=1) > -1e8, np.array(vocabulary)[scores.argmax(axis=1)], "")
    yes = np.full(len(test), np.nan)
    if set(vqa_scores.POLAR) <= set(vocabulary):
        first, second = (scores[:, vocabulary.index(answer)] for answer in vqa_scores.POLAR)
        yes = np.where(test.closed & (np.minimum(first, second) > -1e8), first - second, np.nan)
    return Said(answers, yes, test.closed, np.ones(len(test), bool))


def _towers(encoder) -> tuple[DualEncoder, Any, Any]:
    """Model, parameters and tokenizer of an encoder.

    Raises:
      InputError: it has none of its own, or no patches.
    """
    inner = getattr(encoder, "teacher", encoder)
    if not hasattr(inner, "params") or not hasattr(inner, "tokenizer"):
        raise InputError(f"{encoder.name} gives features only; cross-attention needs a student's or teacher's towers")
    if inner.spec.image.kind != "vit":
        raise InputError(f"{encoder.name}: cross-attention needs patches, an image tower of kind vit")
    params = {name: inner.params[name] for name in ("image", "text")}
    return DualEncoder(inner.spec), params, inner.tokenizer


def _inputs(data: TaskData, questions: Questions, model: DualEncoder, params, tokenizer, trained: bool) -> Inputs:
    """Pictures and questions as the head takes them: states of the towers, or what the towers take."""
    rows, picture_of = np.unique(questions.rows, return_inverse=True)
    pairs, look = data.features.pairs, model.spec.preprocess
    image = np.stack([preprocess.eval_image(preprocess.decode(pairs.read(int(row)).image), look) for row in rows])
    text = tokenizer(questions.texts.tolist())
    length = int((np.asarray(text.mask) > 0).sum(axis=1).max()) if model.spec.text.padding == "masked" else None
    text = TextBatch(*(np.asarray(one)[:, :length] for one in text))
    if trained:
        return Inputs({"image": image}, text._asdict(), picture_of)
    see = jax.jit(lambda params, x: fusion.patches_of(model, params, preprocess.normalise(x, look)))
    read = jax.jit(lambda params, text: fusion.words_of(model, params, text))
    everywhere = api.everywhere(params)
    patches = api.in_batches(lambda x: see(everywhere, x).astype(jnp.float32), image, 64)
    words = api.in_batches(lambda x: read(everywhere, x).astype(jnp.float32), text, 64)
    return Inputs({"patches": patches}, {"words": words, "mask": np.asarray(text.mask)}, picture_of)


def _blinded(inputs: Inputs) -> Inputs:
    """The questions alone."""
    return dataclasses.replace(inputs, pictures={})


def _identity(data: TaskData, params) -> str:
    """Hash of the encoder; of its parameters where it has no identity."""
    known = getattr(data.features.encoder, "identity", "")
    return known or io.hash_of([io.sha256(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(params)])


@contextlib.contextmanager
def _folder(data: TaskData, name: str) -> Iterator[Any]:
    """Where the head's run is kept: below the results, or nowhere if those are not kept."""
    if data.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            yield folder
    else:
        yield io.as_path(data.folder) / name
