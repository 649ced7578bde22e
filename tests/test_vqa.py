"""Visual questions: spelling and measures of answers, statements, splits, probes, and the tasks on small pictures."""

import dataclasses
import io
import json
import math
import tarfile
import types

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from test_evals_tasks import _png, one_row

from mmkd_jax import report
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.errors import InputError
from mmkd_jax.evals import base, bootstrap, given, linear_probe, results, vqa, vqa_questions, vqa_scores
from mmkd_jax.evals.vqa_answers import bleu1, normalise, token_f1
from mmkd_jax.evals.vqa_questions import Questions
from mmkd_jax.evals.vqa_statements import statements
from mmkd_jax.report import evaluation
from mmkd_jax.report import vqa as vqa_page

pytestmark = pytest.mark.usefixtures("quick_compilation")

ASKED = {"Is it red?": 0, "Is there any green?": 1, "Is the picture blue?": 2}
COLOURS = ("red", "green", "blue")


class Asked:
    """One-colour pictures with three questions of yes or no each, and an open one: which colour."""

    hash = "asked"
    modalities, sources, classes, prompts = ("ct",), ("colours",), {}, {}

    def __init__(self, train=60, test=40):
        rng = np.random.default_rng(0)
        n = train + test
        self.colour = rng.integers(0, 3, n)
        values = rng.integers(0, 100, (n, 3)) + 120 * np.eye(3, dtype=int)[self.colour]
        self.images = [_png(value) for value in values]
        self.qa = [self._of(i) for i in range(n)]
        self.table = {
            "id": np.array([f"{i:032x}" for i in range(n)]),
            "modality": np.zeros(n, int),
            "group": np.arange(n) // 2,
            "captions": np.zeros(n, int),
            "questions": np.full(n, 4),
        }
        self.indices = {"colours.train": np.arange(train), "colours.test": np.arange(train, n)}

    def _of(self, i):
        common = {"official_split": "test" if i % 4 == 0 else "train"}
        polar = [
            {"qid": k, "question": q, "answer": "Yes" if self.colour[i] == c else "no.", "answer_type": "CLOSED"}
            for k, (q, c) in enumerate(ASKED.items())
        ]
        which = {"qid": 9, "question": "Which colour?", "answer": COLOURS[self.colour[i]], "answer_type": "open"}
        return [one | common for one in [*polar, which]]

    def row_names(self):
        return sorted(self.indices)

    def rows(self, name):
        return RowIndex(self.indices[name], "asked", name)

    def read(self, row):
        return types.SimpleNamespace(image=self.images[row], captions=[], extra={"qa": self.qa[row]})


class Sees:
    """Mean colour for pictures; for texts the colour that they name, or its opposite where it is denied."""

    name, checkpoint, spec, logit_scale = "sees", "nowhere", None, 10.0

    def encode_image(self, images, projected=True):
        colour = np.stack([np.asarray(image.convert("RGB"), np.float32).mean((0, 1)) for image in images]) / 255
        return np.hstack([colour, np.full((len(colour), 1), 0.1, np.float32)])

    def encode_text(self, texts):
        return np.stack([self._text(text.lower()) for text in texts])

    def _text(self, text):
        named = np.array([colour in text for colour in COLOURS], np.float32)
        denied = " not " in text or text.startswith("no ") or " no " in text or text.endswith("no")
        return np.append(-named if denied else named, 0.1).astype(np.float32)


class Blind(Sees):
    name = "blind"

    def encode_image(self, images, projected=True):
        return np.ones((len(images), 4), np.float32)


def run(pairs, tasks, encoder=None, out=None, **options):
    (one,) = base.sets_of(pairs)
    return base.run(encoder or Sees(), pairs, [one], out, tasks=tasks, bootstrap=200, **options)


def value(rows, metric, task="vqa"):
    return one_row(rows, task=task, metric=metric)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("  The LEFT lung. ", "left lung"),
        ("x-ray", "x ray"),
        ("X ray", "x ray"),
        ("5.6cm focal, predominantly hypodense", "5.6cm focal predominantly hypodense"),
        ("1,000 ml", "1000 ml"),
        ("two", "2"),
        ("an MRI/CT", "mri ct"),
        ("don't", "dont"),
        ("patient’s right", "patients right"),
        ("yes.", "yes"),
        ("e.g. this", "e g this"),
        ("the", ""),
        ("...", ""),
        ("Ménière", "ménière"),
    ],
)
def test_answers_in_one_spelling(given, wanted):
    assert normalise(given) == wanted
    assert normalise(normalise(given)) == wanted


def test_words_in_common_by_hand():
    assert token_f1("left lower lobe", "right lower lobe") == pytest.approx(2 / 3)
    assert token_f1("lobe lobe lobe", "lobe") == pytest.approx(2 * (1 / 3) / (1 + 1 / 3))
    assert (token_f1("", "yes"), token_f1("no", "yes"), token_f1("yes", "yes")) == (0, 0, 1)
    assert bleu1("left lower lobe", "right lower lobe") == pytest.approx(2 / 3)
    assert bleu1("lobe", "left lower lobe") == pytest.approx(math.exp(1 - 3))  # right but short
    assert bleu1("lobe lobe lobe", "lobe") == pytest.approx(1 / 3)  # long is not punished but by precision
    assert (bleu1("", "yes"), bleu1("yes", "yes")) == (0, 1)


def test_bleu_is_that_of_nltk():
    nltk = pytest.importorskip("nltk.translate.bleu_score", reason="nltk is an independent reference of BLEU")
    rng = np.random.default_rng(0)
    for _ in range(50):
        said, truth = (rng.choice(["left", "right", "lobe", "of"], rng.integers(1, 6)).tolist() for _ in range(2))
        theirs = nltk.sentence_bleu([truth], said, weights=(1,)) if set(said) & set(truth) else 0
        assert bleu1(" ".join(said), " ".join(truth)) == pytest.approx(theirs)


# ---------------------------------------------------------------- statements


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("Is there a fracture?", {"yes": "there is fracture", "no": "there is no fracture"}),
        ("Is this a CT scan?", {"yes": "this is a CT scan", "no": "this is not a CT scan"}),
        ("Are the lungs clear", {"yes": "the lungs clear", "no": "no lungs clear"}),
        ("Was this taken in the AP or PA plane?", {"AP": "AP", "PA": "PA"}),
        ("Is it solid vs. cystic?", {"solid": "solid", "cystic": "cystic"}),
        ("What is wrong?", {}),
        ("", {}),
        ("Is?", {}),
    ],
)
def test_statements_of_a_question(question, wanted):
    found = statements(question)
    assert {answer: sentences[0] for answer, sentences in found.items()} == wanted
    assert len({len(sentences) for sentences in found.values()}) <= 1
    assert all(len(set(sentences)) == len(sentences) for sentences in found.values())


# ---------------------------------------------------------------- the tasks


@pytest.fixture(scope="module")
def pairs():
    return Asked()


@pytest.fixture(scope="module")
def ran(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("vqa")
    rows = run(pairs, ["vqa", "vqa_zeroshot"], out=out)
    rows += run(pairs, ["vqa"], Blind(), out=out)
    results.save(out / "results.json", rows)
    return out, rows


def of(rows, model):
    return [row for row in rows if row["model"] == model]


def test_what_is_seen_is_answered_and_what_is_not_seen_is_not(pairs, ran):
    rows, blind = of(ran[1], "sees"), of(ran[1], "blind")
    assert value(rows, "closed_accuracy")["value"] > 0.95
    assert value(rows, "open_accuracy")["value"] > 0.9
    assert (value(rows, "closed_accuracy")["n"], value(rows, "open_accuracy")["n"]) == (120, 40)
    assert value(rows, "picture_gain")["low"] > 0.2
    assert value(rows, "yes_no_auc")["value"] > 0.95
    common = value(rows, "accuracy")["context"]["commonest_answer"]
    for kind in ("closed", "open"):
        assert value(blind, f"{kind}_accuracy")["value"] == pytest.approx(common[kind], abs=1e-5)
    assert value(blind, "picture_gain")["value"] == pytest.approx(0, abs=1e-9)
    assert {row["seed"] for row in rows} == {0}


def test_numbers_are_those_of_the_stored_answers(ran):
    out, rows = ran
    stored = results.load_predictions(out, "sees", "colours", "vqa")
    right, closed = stored["answers"] == stored["truth"], stored["closed"]
    rows = of(rows, "sees")
    assert value(rows, "accuracy")["value"] == pytest.approx(right.mean())
    assert value(rows, "closed_accuracy")["value"] == pytest.approx(right[closed].mean())
    auc = roc_auc_score(stored["truth"][closed] == "yes", stored["yes"][closed])
    assert value(rows, "yes_no_auc")["value"] == pytest.approx(auc)
    assert len(np.unique(stored["ids"])) == len(stored["ids"]) == 160
    gain = right.mean() - (stored["blind"] == stored["truth"]).mean()
    assert value(rows, "picture_gain")["value"] == pytest.approx(gain)


def test_zero_shot_needs_no_training_rows_and_asks_closed_questions_only(ran):
    rows = [row for row in of(ran[1], "sees") if row["task"] == "vqa_zeroshot"]
    assert value(rows, "yes_no_auc", "vqa_zeroshot")["value"] > 0.9
    assert value(rows, "closed_accuracy", "vqa_zeroshot")["n"] == 120
    assert not [row for row in rows if row["metric"].startswith("open")]


def test_the_vocabulary_is_of_training_answers_and_others_are_wrong():
    pairs = Asked()
    for row in pairs.indices["colours.test"][::2]:
        pairs.qa[row] = [{**pairs.qa[row][3], "answer": "puce"}]
    rows = run(pairs, ["vqa"])
    assert value(rows, "open_accuracy")["context"]["reachable"]["open"] == pytest.approx(0.5)
    assert value(rows, "open_accuracy")["value"] <= 0.5


def shuffled(seed):
    """Training answers change places within each question: how common they are is all that is left to learn."""
    pairs = Asked(train=80, test=200)
    rng = np.random.default_rng(seed)
    for k in range(4):
        order = rng.permutation(80)
        given = [pairs.qa[row][k]["answer"] for row in order]
        for row, answer in enumerate(given):
            pairs.qa[row][k] = {**pairs.qa[row][k], "answer": answer}
    return pairs


def test_shuffled_answers_leave_chance(pairs):
    rows = run(shuffled(0), ["vqa"])
    auc, gain = value(rows, "yes_no_auc"), value(rows, "picture_gain")
    assert auc["low"] <= 0.5 <= auc["high"]
    assert gain["low"] <= 0 <= gain["high"] or gain["high"] < 0
    assert value(rows, "open_accuracy")["low"] <= 1 / 3 <= value(rows, "open_accuracy")["high"]
    honest = run(Asked(train=80, test=200), ["vqa"])
    assert value(honest, "yes_no_auc")["low"] > 0.9  # the same numbers where nothing was shuffled


def test_the_published_split_goes_by_question_and_says_what_it_shares(pairs):
    rows = run(pairs, ["vqa_pubmedclip"])
    row = value(rows, "accuracy", "vqa_pubmedclip")
    assert row["context"]["profile"] == "pubmedclip"
    assert row["context"]["shared_pictures"] == 25  # groups of two pictures, each with one on the other side
    assert row["n"] == 100
    assert (
        value(rows, "closed_accuracy", "vqa_pubmedclip")["n"] + value(rows, "open_accuracy", "vqa_pubmedclip")["n"]
        == 100
    )  # of guessed types


def test_a_patient_on_both_sides_is_refused():
    pairs = Asked()
    pairs.table["group"][70] = pairs.table["group"][0]
    with pytest.raises(InputError, match=r"colours: 4 test questions are on pictures or patients that are trained on"):
        run(pairs, ["vqa"])


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("vqa", {"answer_type": "essay"}, r"colours, picture 0+, question 1: answer_type 'essay' is unknown"),
        ("vqa", {"answer_type": None}, "answer_type None is unknown; it must be closed or open"),
        ("vqa", {"answer": " "}, "answer is ' ', not text"),
        ("vqa", {"answer": ["a"]}, "answer is .* not text"),
        ("vqa", {"question": None}, "question is None, not text"),
        ("vqa", {"qid": 9}, "question 0+/9 comes twice"),
        ("vqa_pubmedclip", {"official_split": "val"}, "has official_split 'val', not train or test"),
    ],
)
def test_wrong_questions_are_refused_in_one_line(task, change, message):
    pairs = Asked(train=8, test=4)
    pairs.qa[0][0] |= change
    with pytest.raises(InputError, match=message) as error:
        run(pairs, [task])
    assert "\n" not in str(error.value)


def test_questions_that_are_no_list_are_refused():
    pairs = Asked(train=8, test=4)
    pairs.qa[1] = "what?"
    with pytest.raises(InputError, match="qa is not a list of objects"):
        run(pairs, ["vqa"])


# ---------------------------------------------------------------- the probe


def test_the_probe_is_scikit_learns():
    rng = np.random.default_rng(1)
    x, new = rng.standard_normal((90, 6)), rng.standard_normal((30, 6))
    answers = np.array(["left", "none", "right"])[(x @ rng.standard_normal((6, 3))).argmax(1)]
    probe = vqa.fit(x, answers, np.arange(90), new)
    known, other = linear_probe.standardise(x, new)
    theirs = LogisticRegression(C=probe.strength, max_iter=5000, tol=1e-10).fit(known, answers)
    assert probe.vocabulary == tuple(theirs.classes_)
    np.testing.assert_allclose(probe.scores, theirs.predict_proba(other), atol=2e-3)
    assert (probe.answers == theirs.predict(other)).mean() > 0.95


def test_features_are_image_question_product_and_difference():
    image, text = np.array([[3.0, 4.0]]), np.array([[0.0, 2.0]])
    np.testing.assert_allclose(vqa.joined(image, text), [[0.6, 0.8, 0, 1, 0, 0.8, 0.6, 0.2]], atol=1e-7)


def test_the_commonest_answers_are_known():
    answers = np.array(["b", "a", "c", "b", "a", "d"])
    assert vqa.vocabulary_of(answers, 3) == ("a", "b", "c")


def test_one_answer_needs_no_fit():
    probe = vqa.fit(np.ones((4, 2)), np.array(["no"] * 4), np.arange(4), np.ones((2, 2)))
    assert (probe.answers.tolist(), probe.strength) == (["no", "no"], 0.0)


def test_an_interval_is_of_whole_pictures():
    """Against drawing groups one after the other: the deviation of an accuracy whose answers are alike in a group."""
    groups = np.repeat(np.arange(50), 8)
    right = np.repeat(np.arange(50) % 2, 8).astype(float)
    blank = np.zeros(400, int)
    questions = Questions(np.arange(400).astype(str), blank, groups, blank, blank, blank, blank)
    data = types.SimpleNamespace(seed=0, set=types.SimpleNamespace(name="x"), resamples=2000)
    estimate, n = vqa_scores.share(right, np.ones(400, bool), vqa_scores.weights(data, questions))
    assert (estimate.value, n) == (0.5, 400)
    assert estimate.replicates.std() == pytest.approx(0.5 / math.sqrt(50), rel=0.1)


def test_resamples_without_a_closed_question_are_left_out():
    drawn = np.array([[2, 0], [0, 2], [1, 1]])
    estimate, n = vqa_scores.share(np.array([1.0, 0.0]), np.array([True, False]), drawn)
    assert (estimate.value, n, estimate.interval()) == (1.0, 1, (1.0, 1.0))
    assert np.isnan(estimate.replicates[1])


def test_a_number_without_an_interval_is_named(pairs):
    """And where only some resamples lack it, the rows say how many."""
    (one,) = base.sets_of(pairs)
    some, none = (bootstrap.Estimate(0.5, np.array(values)) for values in ([np.nan, 0.4, 0.6], [np.nan] * 3))
    (row,) = base._rows(Sees(), one, "vqa", base.TaskResult({"accuracy": (some, 3)}, {}, {}), 0)
    assert row["context"]["undefined_resamples"] == {"accuracy": 1}
    assert 0.4 <= row["low"] < row["high"] <= 0.6
    with pytest.raises(InputError, match="colours, vqa, closed_accuracy: none of 3 resamples has this number"):
        base._rows(Sees(), one, "vqa", base.TaskResult({"closed_accuracy": (none, 3)}, {}, {}), 0)


# ---------------------------------------------------------------- the page, the command line


def test_the_page_says_what_the_results_say(pairs, ran):
    out, rows = ran
    evaluation.keep_examples(out, pairs, base.sets_of(pairs))
    page = report.rebuild(out).read_text()
    assert "Questions about pictures" in page
    assert "always the commonest answer" in page
    best = value(of(rows, "sees"), "accuracy")
    assert f"{100 * best['value']:.1f}" in page
    assert "minus blind" in page
    assert page.count("without the picture:") >= 6
    assert "<script" not in page.lower().replace("<script>alert", "")


def test_the_headline_says_what_the_picture_is_worth(ran):
    said = evaluation.gather(ran[0])
    best, gain = value(of(ran[1], "sees"), "accuracy"), value(of(ran[1], "sees"), "picture_gain")
    assert said["headline"] == f"sees: {100 * best['value']:.1f} % of questions on colours right"
    assert f"by {100 * gain['value']:+.1f} points" in said["lede"]


def test_other_questions_are_not_compared(pairs, ran, tmp_path):
    """A model that was asked on other rows stands in the table, and in no difference."""
    rows = run(pairs, ["vqa"], out=tmp_path)
    less = Asked(train=60, test=20)
    rows += run(less, ["vqa"], Blind(), out=tmp_path)
    assert vqa_page.measure(tmp_path, rows) == []
    found = vqa_page.measure(*ran)
    (one,) = [record for record in found if record["task"] == "vqa"]
    a, b = (value(of(ran[1], name), "accuracy")["value"] for name in ("sees", "blind"))
    assert one["differences"][0]["value"] == pytest.approx(a - b)


def test_a_described_set_brings_its_questions(tmp_path):
    """Pictures with questions as a WebDataset tar beside a set.json, as `mmkd eval --set` takes them."""
    pairs = Asked(train=12, test=6)
    root = tmp_path / "colours"
    root.mkdir()
    with tarfile.open(root / "colours.tar", "w") as tar:
        for row in range(18):
            about = {"qa": pairs.qa[row], "group": str(row // 2), "split": "train" if row < 12 else "test"}
            for name, data in ((f"{row}.png", pairs.images[row]), (f"{row}.json", json.dumps(about).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    layout = {"source": "webdataset", "extra": ["qa"]}
    (root / "set.json").write_text(json.dumps({"name": "colours", "task": "vqa", "layout": layout, "modality": "ct"}))
    sources = given.pairs_of({"colours": str(root)}, tmp_path / "sets")
    (one,) = base.sets_of(sources)
    assert (one.questions, one.captions, len(one.rows), len(one.train_rows)) == (True, False, 6, 12)
    assert sources.table["questions"].tolist() == [4] * 18
    rows = base.run(Sees(), sources, [one], None, tasks=["vqa_zeroshot"], bootstrap=20)
    assert value(rows, "closed_accuracy", "vqa_zeroshot")["n"] == 18


def test_stored_features_are_asked_nothing(pairs):
    (one,) = base.unprompted(base.sets_of(pairs))
    assert not vqa.VQA.applies(one)


def test_zero_shot_on_shuffled_answers_is_chance(pairs, ran):
    """Of forty shuffles about two may miss: intervals are of 95 %. Unshuffled, none holds chance."""
    stored = results.load_predictions(ran[0], "sees", "colours", "vqa_zeroshot")
    columns = (stored[name] for name in ("ids", "rows", "groups", "questions", "truth", "closed", "ids"))
    questions = Questions(*columns)[stored["closed"]]
    said = vqa_scores.Said(*(stored[name][stored["closed"]] for name in ("answers", "yes", "closed", "asked")))
    drawn = bootstrap.draw(len(questions), 200, 0, units=questions.groups)
    rng, held = np.random.default_rng(0), []
    for _ in range(40):
        shuffled_truth = dataclasses.replace(questions, answers=rng.permutation(questions.answers))
        low, high = vqa_scores.measure(shuffled_truth, said, drawn)["yes_no_auc"][0].interval()
        held.append(low <= 0.5 <= high)
    assert sum(held) >= 34
    assert vqa_scores.measure(questions, said, drawn)["yes_no_auc"][0].interval()[0] > 0.5


def test_real_questions_are_as_their_readme_says(mmkd_data, tmp_path):
    """VQA-RAD: 2919 questions, of which no picture is on both sides; by the published split, pictures are."""
    pairs = given.pairs_of({"vqa_rad": str(mmkd_data / "vqa_rad")}, tmp_path)
    (one,) = base.sets_of(pairs)
    data = base.TaskData(one, types.SimpleNamespace(pairs=pairs), 1.0, 0, 10, "embedding")
    train, test = vqa_questions.by_picture(data)
    assert (len(train), len(test)) == (2156, 763)
    assert (int(train.closed.sum()), int(test.closed.sum())) == (1290, 429)
    assert not set(train.rows) & set(test.rows)
    seen, asked = vqa_questions.as_published(data)
    assert (len(seen), len(asked)) == (2560, 359)
    assert len(set(seen.rows) & set(asked.rows)) > 100
    polar = np.isin(test.answers, ["yes", "no"]) & test.closed
    stated = [bool(statements(text)) for text in test.texts[polar]]
    assert np.mean(stated) > 0.95
