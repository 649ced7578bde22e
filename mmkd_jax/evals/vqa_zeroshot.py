"""Closed questions without training: each answer becomes a statement, and the picture is matched with both.

Statements are those of `vqa_statements`; an answer is the mean of its statements' unit embeddings, at unit length
again, as in zero-shot classification. Open questions are not asked. A closed question whose words allow no statement
counts as wrong.
"""

import numpy as np

from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.evals import vqa_questions, vqa_scores
from mmkd_jax.evals.base import EvalSet, TaskData, TaskResult
from mmkd_jax.evals.features import unit
from mmkd_jax.evals.vqa_answers import normalise
from mmkd_jax.evals.vqa_scores import Said
from mmkd_jax.evals.vqa_statements import statements
from mmkd_jax.evals.zeroshot import class_embeddings


def applies(one: EvalSet) -> bool:
    """Whether the set has questions."""
    return one.questions


def evaluate(data: TaskData) -> TaskResult:
    """Accuracy on closed questions, and of those of yes or no the AUC, which no leaning to one of them changes."""
    questions = vqa_questions.read(data, data.set.rows)
    if not questions.closed.any():
        raise InputError(f"{data.set.name} has no closed questions; leave the task vqa_zeroshot out")
    asked = {text: statements(text) for text in dict.fromkeys(questions.texts[questions.closed].tolist())}
    sentences = list(dict.fromkeys(s for answers in asked.values() for group in answers.values() for s in group))
    place = {sentence: number for number, sentence in enumerate(sentences)}
    features = data.features.texts(sentences) if sentences else np.zeros((0, 1))
    images = unit(data.features.images(questions.rows))
    answers, yes = np.full(len(questions), "", "U64"), np.full(len(questions), np.nan)
    for i in np.flatnonzero(questions.closed):
        if of_answer := asked[questions.texts[i]]:
            rows = [place[sentence] for group in of_answer.values() for sentence in group]
            cosines = class_embeddings(features[rows], map(len, of_answer.values())) @ images[i]
            answers[i] = normalise(list(of_answer)[int(cosines.argmax())])
            yes[i] = cosines[0] - cosines[1] if "yes" in of_answer else np.nan
    context = {
        "profile": "statements",
        "statement_hash": io.hash_of(asked)[:16],
        "without_statement": int(sum(not asked[text] for text in questions.texts[questions.closed])),
    }
    said = Said(answers, yes, questions.closed, questions.closed)
    return vqa_scores.result(data, questions, [said], context)
