"""Tasks and runs on a set in memory, with an encoder whose features are known."""

import io
import re
import tracemalloc
import types

import numpy as np
import pytest
import torchvision_stub
from PIL import Image
from scipy.sparse import csr_array

from mmkd_jax import report
from mmkd_jax.cli import main
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.errors import InputError
from mmkd_jax.evals import asked, base, bootstrap, linear_probe, metrics, prompts, ranking, results, summary, zeroshot
from mmkd_jax.evals.features import Features, unit
from mmkd_jax.evals.floor import PixelFloor
from mmkd_jax.evals.teachers import TeacherEncoder
from mmkd_jax.report.examples import examples

CLASSES = ["red nodule", "green nodule", "blue nodule"]


class FakePairs:
    """A pairs set of one-colour pictures: source "colours" with classes, source "cases" with captions."""

    hash = "fake"
    modalities = ("ct", "dermoscopy")
    prompts = {}  # noqa: RUF012
    classes = {"colours": CLASSES}  # noqa: RUF012

    def __init__(self, seed=0, train=60, test=45, captioned=12):
        rng = np.random.default_rng(seed)
        n = train + test + captioned
        labels = np.concatenate([np.arange(train + test) % 3, np.full(captioned, -1)])
        colours = rng.integers(0, 120, (n, 3)) + 60 * np.eye(4, 3)[labels].astype(int)
        self.images = [_png(colour) for colour in colours]
        groups = np.concatenate([np.full(train + test, -1), np.arange(captioned) // 2])
        captions = [f"case {i // 3}" for i in range(captioned)]
        self.texts = [[]] * (train + test) + [[c] for c in captions]
        self.table = {
            "id": np.array([f"{i:032x}" for i in range(n)]),
            "label_id": labels,
            "modality": np.repeat([1, 0], [train + test, captioned]),
            "group": groups,
            "captions": np.array([len(t) for t in self.texts]),
        }
        self.reads = 0
        ends = np.split(np.arange(n), [train, train + test])
        self.indices = dict(zip(["colours.train", "colours.test", "cases.val"], ends))

    def row_names(self):
        return sorted(self.indices)

    def rows(self, name):
        return RowIndex(self.indices[name], "fake", name)

    def read(self, row):
        self.reads += 1
        return types.SimpleNamespace(image=self.images[row], captions=self.texts[row])


class ColourEncoder:
    """Mean colour for pictures; for texts the colour that they name, or a hash of them."""

    name, checkpoint, spec, logit_scale = "colour:net", "nowhere", None, 10.0

    def __init__(self):
        self.calls = []

    def encode_image(self, images, projected=True):
        self.calls.append(len(images))
        colour = np.stack([np.asarray(image.convert("RGB"), np.float32).mean((0, 1)) for image in images]) / 255
        return colour - 0.4 if projected else np.hstack([colour, colour**2])

    def encode_text(self, texts):
        self.calls.append(len(texts))
        return np.stack([self._text(text) for text in texts])

    def _text(self, text):
        for i, name in enumerate(("red", "green", "blue")):
            if name in text:
                return np.eye(3, dtype=np.float32)[i]
        return np.random.default_rng(ord(text[-1])).standard_normal(3).astype(np.float32)


class Collapsed(ColourEncoder):
    name = "collapsed"

    def encode_image(self, images, projected=True):
        return np.ones((len(images), 3), np.float32)

    def encode_text(self, texts):
        return np.ones((len(texts), 3), np.float32)


def _png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), tuple(int(c) for c in colour)).save(buffer, "PNG")
    return buffer.getvalue()


def one_row(rows, **wanted):
    found = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


@pytest.fixture(scope="module")
def pairs():
    return FakePairs()


# ---------------------------------------------------------------- zero-shot


def test_class_embeddings_by_hand_and_against_the_flat_mean():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((7, 5)) * rng.uniform(1, 50, (7, 1))
    found = zeroshot.class_embeddings(features, [3, 1, 3])
    for c, part in enumerate((features[:3], features[3:4], features[4:])):
        mean = sum(row / np.sqrt((row**2).sum()) for row in part) / len(part)
        np.testing.assert_allclose(found[c], mean / np.sqrt((mean**2).sum()), rtol=1e-5)
    assert found.dtype == np.float32
    unnormalised = unit(np.stack([features[:3].mean(0), features[3], features[4:].mean(0)]))
    assert np.abs(found - unnormalised).max() > 0.01  # leaving out the first normalisation is noticed
    with pytest.raises(InputError, match="do not divide"):
        zeroshot.class_embeddings(features, [3, 3])


def test_class_embeddings_equal_open_clip():
    torch = pytest.importorskip("torch", reason="torch is the reference and is not installed")
    torchvision_stub.install()
    open_clip = pytest.importorskip("open_clip", reason="open_clip is the reference and is not installed")
    table = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) * 7

    class Model:
        def encode_text(self, tokens, normalize=False):
            raw = table[tokens].mean(1)
            return torch.nn.functional.normalize(raw, dim=-1) if normalize else raw

    def tokenizer(texts):
        return torch.tensor([[ord(c) for c in text.ljust(40)] for text in texts])

    templates = ["a scan of {}.", "{}", "an image of {}"]
    reference = open_clip.build_zero_shot_classifier(
        Model(), tokenizer, CLASSES, [lambda c, t=t: t.format(c) for t in templates], num_classes_per_batch=2
    )
    made = prompts.from_templates(CLASSES, templates)
    texts = [text for of_class in made.sentences for text in of_class]
    found = zeroshot.class_embeddings(Model().encode_text(tokenizer(texts)).numpy(), [3, 3, 3])
    np.testing.assert_allclose(found, reference.T.numpy(), atol=2e-6)


def test_probabilities_are_the_softmax_of_scaled_cosines():
    rng = np.random.default_rng(1)
    images, classes = rng.standard_normal((4, 6)) * 9, rng.standard_normal((3, 6))
    found = zeroshot.probabilities(unit(images) @ unit(classes).T, 20.0)
    for i in range(4):
        cosines = [images[i] @ c / np.linalg.norm(images[i]) / np.linalg.norm(c) for c in classes]
        odds = np.exp(20 * np.array(cosines))
        np.testing.assert_allclose(found[i], odds / odds.sum(), rtol=1e-4)
    assert found.dtype == np.float32


def test_prompts():
    made = prompts.default(CLASSES, "dermoscopy")
    assert "Dermoscopy image of a skin lesion: red nodule." in made.sentences[0]
    assert prompts.default(CLASSES, "unheard of").sentences[1][0] == "green nodule"
    assert prompts.default(CLASSES, profile="names").sentences == tuple((name,) for name in CLASSES)
    assert made.hash != prompts.default(CLASSES[::-1], "dermoscopy").hash != prompts.default(CLASSES, "ct").hash
    assert made.hash == prompts.default(list(CLASSES), "dermoscopy").hash
    for modality in prompts._data()["modality"]:
        prompts.default(CLASSES, modality)
    uneven = prompts.from_sentences(CLASSES, {CLASSES[0]: ["one", "two"], CLASSES[1]: ["three"], CLASSES[2]: ["four"]})
    assert [len(s) for s in uneven.sentences] == [2, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prompts.from_templates(CLASSES, ["no place"]), "must contain"),
        (lambda: prompts.from_templates(CLASSES, ["{} and {}"]), "must contain"),
        (lambda: prompts.from_templates(CLASSES[:1], ["{}"]), "at least two classes"),
        (lambda: prompts.from_templates(CLASSES, []), "at least one prompt"),
        (lambda: prompts.from_sentences(CLASSES, {"red nodul": ["x"]}), "did you mean 'red nodule'"),
        (lambda: prompts.from_sentences(CLASSES, {"red nodule": ["x"]}), "no prompts are given"),
        (lambda: prompts.default(CLASSES, profile="name"), "did you mean 'names'"),
    ],
)
def test_prompts_refuse_wrong_input(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ---------------------------------------------------------------- retrieval


def ranks_by_hand(queries, pool, right):
    ranks = []
    for i, query in enumerate(queries):
        similar = [np.float32(q.astype(float) @ query.astype(float)) for q in pool]
        order = sorted(range(len(pool)), key=lambda j: (-similar[j], j))
        ranks.append(1 + min(position for position, j in enumerate(order) if right[i, j]))
    return ranks


@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (4, 7), (100, 100)])
def test_search_by_hand_with_ties(chunk, block):
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((15, 33))
    pool = rng.standard_normal((5, 33))[rng.integers(5, size=20)]  # few directions: many exact ties
    right = rng.random((15, 20)) < 0.15
    right[:, 7] = True
    found = ranking.search(queries, pool, right, chunk=chunk, block=block)
    queries, pool = unit(queries), unit(pool)
    assert found.ranks.tolist() == ranks_by_hand(queries, pool, right)
    for i, query in enumerate(queries):
        similar = np.array([np.float32(p.astype(float) @ query.astype(float)) for p in pool])
        order = sorted(range(20), key=lambda j: (-similar[j], j))
        assert found.best[i].tolist() == order[:10]
        np.testing.assert_allclose(found.cosines[i], similar[order[:10]], atol=1e-7)
        places = [place for place, j in enumerate(order, 1) if right[i, j]]
        assert found.precision[i] == pytest.approx(np.mean([k / place for k, place in enumerate(places, 1)]))
    right[3] = False
    with pytest.raises(InputError, match="no right answer"):
        ranking.search(queries, pool, right)
    with pytest.raises(InputError, match="do not fit"):
        ranking.search(queries, pool, right[:, :5])


def test_average_precision_equals_scikit_learn_without_ties():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(1)
    queries, pool, right = rng.standard_normal((9, 8)), rng.standard_normal((50, 8)), rng.random((9, 50)) < 0.2
    found = ranking.search(queries, pool, right, chunk=4, block=16)
    expected = [average_precision_score(r, unit(pool) @ unit(q)) for r, q in zip(right, queries)]
    np.testing.assert_allclose(found.precision, expected, atol=1e-12)


def test_search_needs_memory_for_a_block_and_not_for_the_pool():
    """The similarities would take 64 MB as float32, the pool's features take 1.3 MB."""
    rng = np.random.default_rng(0)
    queries, pool = rng.standard_normal((200, 4)), rng.standard_normal((80_000, 4))
    own = csr_array((np.ones(200, bool), (np.arange(200), 7 * np.arange(200))), shape=(200, 80_000))
    tracemalloc.start()
    ranks = ranking.search(queries, pool, own, chunk=50, block=2048).ranks
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6
    similar = unit(pool).astype(float) @ unit(queries)[5].astype(float)
    assert ranks[5] == 1 + np.sum(similar.astype(np.float32) > similar.astype(np.float32)[35])


def test_retrieval_merges_captions_and_groups(pairs, tmp_path):
    """12 images; captions in threes (4 distinct), groups in pairs: image 2 and 3 are one case with two captions."""
    sets = [s for s in base.sets_of(pairs) if s.name == "cases"]
    rows = base.run(ColourEncoder(), pairs, sets, tmp_path)
    metrics_found = {row["metric"] for row in rows}
    assert {"i2t_R@1_of_4", "t2i_R@10_of_12", "i2t_median_rank_of_12_strict", "t2i_R@5_of_12_strict"} <= metrics_found
    assert one_row(rows, metric="i2t_R@5_of_4")["value"] == 1
    stored = results.load_predictions(tmp_path, "colour:net", "cases", "retrieval")
    assert stored["texts"].tolist() == ["case 0", "case 1", "case 2", "case 3"]
    features, texts = Features(ColourEncoder(), pairs), stored["texts"].tolist()
    images, words = unit(features.images(sets[0].rows)), unit(features.texts(texts))
    right = np.zeros((12, 4), bool)
    for i in range(12):
        for k in range(12):
            right[i, k // 3] |= i // 2 == k // 2
    assert right[2].tolist() == [True, True, False, False]
    assert stored["i2t_rank"].tolist() == ranks_by_hand(images, words, right)
    assert stored["t2i_rank"].tolist() == ranks_by_hand(words, images, right.T)
    own = np.eye(12, dtype=bool)
    assert stored["i2t_strict_rank"].tolist() == ranks_by_hand(images, np.repeat(words, 3, 0), own)
    assert stored["t2i_strict_rank"].tolist() == ranks_by_hand(np.repeat(words, 3, 0), images, own)


def test_retrieval_of_several_captions_an_image(tmp_path):
    """Three captions a picture, one of them common to all: every one is a query and an item of its own."""
    pairs = FakePairs()
    for i, row in enumerate(pairs.indices["cases.val"]):
        pairs.texts[row] = [f"case {i}", f"red {i % 5}", "normal"]
    sets = [s for s in base.sets_of(pairs) if s.name == "cases"]
    rows = base.run(ColourEncoder(), pairs, sets, tmp_path, tasks=["retrieval", "retrieval_all"], bootstrap=50)
    found = {row["metric"] for row in rows if row["task"] == "retrieval_all"}
    assert {"i2t_R@1_of_18", "t2i_mAP_of_12", "i2t_mAP_of_36_strict", "t2i_R@10_of_12_strict"} <= found
    assert one_row(rows, task="retrieval", metric="i2t_R@1_of_12")["context"]["profile"] == "first_caption"
    assert one_row(rows, metric="t2i_R@1_of_12_strict", task="retrieval_all")["n"] == 36
    stored = results.load_predictions(tmp_path, "colour:net", "cases", "retrieval_all")
    features = Features(ColourEncoder(), pairs)
    images = unit(features.images(sets[0].rows))
    every = [text for row in sets[0].rows for text in pairs.texts[row]]
    words = unit(features.texts(every))
    own = np.repeat(np.eye(12, dtype=bool), 3, axis=1)
    assert stored["i2t_strict_rank"].tolist() == ranks_by_hand(images, words, own)
    assert stored["t2i_strict_rank"].tolist() == ranks_by_hand(words, images, own.T)
    texts = stored["texts"].tolist()
    right = np.zeros((12, 18), bool)
    for i in range(12):
        for k in range(12):
            for text in pairs.texts[sets[0].rows[k]]:
                right[i, texts.index(text)] |= i // 2 == k // 2
    assert stored["i2t_rank"].tolist() == ranks_by_hand(images, unit(features.texts(texts)), right)
    assert stored["t2i_rank"].tolist() == ranks_by_hand(unit(features.texts(texts)), images, right.T)


def test_collapsed_features_score_like_chance(pairs, tmp_path):
    rows = base.run(Collapsed(), pairs, base.sets_of(pairs), tmp_path, bootstrap=20)
    assert one_row(rows, metric="i2t_R@1_of_12_strict")["value"] == pytest.approx(1 / 12)
    assert one_row(rows, metric="t2i_median_rank_of_12_strict")["value"] == pytest.approx(6.5)
    for task in ("zeroshot", "linear_probe"):
        assert one_row(rows, metric="balanced_accuracy", task=task)["value"] == pytest.approx(1 / 3)
        assert one_row(rows, metric="macro_auc", task=task)["value"] == 0.5


# ---------------------------------------------------------------- linear probe


def blobs(n=90, width=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    features = rng.standard_normal((n, width)) * 10 ** rng.uniform(-3, 3, width) + 5
    return features + 2 * features.std(0) * np.eye(3, width)[labels], labels


def test_probe_equals_newtons_solution_of_its_objective():
    """Against a direct minimisation of 0.5 |W|^2 + C * sum of losses by SciPy on the standardised rows."""
    from scipy.optimize import minimize
    from scipy.special import logsumexp, softmax

    x, y = blobs()
    z = (x - x.mean(0)) / x.std(0)

    def objective(flat, strength=0.01):
        weights, bias = flat[:18].reshape(6, 3), flat[18:]
        logits = z @ weights + bias
        wrong = softmax(logits, 1) - np.eye(3)[y]
        value = 0.5 * (weights**2).sum() + strength * (logsumexp(logits, axis=1) - logits[np.arange(90), y]).sum()
        return value, np.concatenate([(weights + strength * z.T @ wrong).ravel(), strength * wrong.sum(0)])

    flat = minimize(objective, np.zeros(21), jac=True, options={"gtol": 1e-12}).x
    reference = softmax(z @ flat[:18].reshape(6, 3) + flat[18:], 1)
    np.testing.assert_allclose(linear_probe.scores(x, y, x, 3, 0.01), reference, atol=1e-7)


def test_probe_learns_and_shuffled_labels_do_not():
    features, labels = blobs(240)
    x, y, new, answers = features[:150], labels[:150], features[150:], labels[150:]
    probe = linear_probe.fit(x, y, np.arange(150), new, 3)
    assert metrics.accuracy(answers, probe.scores.argmax(1)) > 0.8
    shuffled = linear_probe.fit(x, np.random.default_rng(0).permutation(y), np.arange(150), new, 3)
    assert metrics.accuracy(answers, shuffled.scores.argmax(1)) < 0.6


def test_probe_never_sees_the_test_rows_and_holds_out_whole_groups():
    x, y = blobs(60)
    groups = np.arange(60) // 4
    fitted, held = linear_probe.hold_out(y, groups, 0)
    assert not set(groups[fitted]) & set(groups[held])
    assert sorted([*fitted, *held]) == list(range(60))
    a = linear_probe.fit(x, y, groups, x[:5], 3)
    b = linear_probe.fit(x, y, groups, np.vstack([x[:5], 1e6 * np.ones((9, 6))]), 3)
    np.testing.assert_array_equal(a.scores, b.scores[:5])  # other test rows change nothing
    assert (a.strength, a.search) == (b.strength, b.search)
    assert a.strength == min(a.search, key=a.search.get)


def test_probe_chooses_by_the_loss_and_stops_when_it_rises():
    from sklearn.metrics import log_loss

    x, y = blobs(90, width=40)
    fitted, held = linear_probe.hold_out(y, np.arange(90), 0)
    search = linear_probe.choose(x, y, fitted, held, 3)
    assert list(search) == list(linear_probe.STRENGTHS[: len(search)])
    for strength, found in search.items():
        # fitted from zero, not from the solution for the C before
        scores = linear_probe.scores(x[fitted], y[fitted], x[held], 3, strength)
        counts = np.bincount(y[held])[y[held]]
        assert found == pytest.approx(log_loss(y[held], scores, sample_weight=1 / counts), rel=1e-4)
    assert min(search.values()) < 0.9 * np.log(3)
    noise = np.random.default_rng(0).permutation(y)
    search = linear_probe.choose(x, noise, fitted, held, 3)
    assert min(search.values()) > 0.95 * np.log(3)  # nothing to learn
    assert len(search) < len(linear_probe.STRENGTHS)
    last = list(search.values())[-3:]
    assert last == sorted(last)


def test_probe_of_rare_and_absent_classes():
    x, y = blobs(60)
    y = np.where(np.arange(60) == 2, 2, y % 2)  # class 2 has one row
    probe = linear_probe.fit(x, y, np.arange(60), x, 4)
    assert probe.scores.shape == (60, 4)
    assert (probe.scores[:, 3] == 0).all()  # no training rows: never predicted
    for labels, groups, message in (
        (np.zeros(60, int), np.arange(60), "at least two classes"),
        (y, np.zeros(60), "at least two groups"),
        (np.arange(60) % 2, np.arange(60) % 2, "in several groups"),
        (y + 3, np.arange(60), "there are 4 classes"),
    ):
        with pytest.raises(InputError, match=message):
            linear_probe.fit(x, labels, groups, x, 4)


# ---------------------------------------------------------------- runs


def test_sets_of_a_pairs_set(pairs):
    cases, colours = base.sets_of(pairs)
    assert (cases.name, cases.captions, cases.class_names, cases.modality) == ("cases", True, (), "ct")
    assert (colours.name, colours.class_names, colours.modality) == ("colours", tuple(CLASSES), "dermoscopy")
    assert (len(colours.rows), len(colours.train_rows)) == (45, 60)
    assert colours.split_hash == pairs.rows("colours.test").hash
    assert [s.name for s in asked.chosen([cases, colours], ["colours"])] == ["colours"]
    with pytest.raises(InputError, match="did you mean 'colours'"):
        asked.chosen([cases, colours], ["colour"])
    with pytest.raises(InputError, match="no test rows"):
        asked.chosen([], None)


def test_choices_are_made_on_rows_of_another_split(tmp_path):
    """Of the training rows, those that are judged on train nothing."""
    pairs = FakePairs()
    pairs.indices["colours.dev"] = np.arange(20, 35)
    (held_out,) = base.sets_of(pairs, split="dev")
    assert (held_out.name, held_out.modality, held_out.class_names) == ("colours.dev", "dermoscopy", tuple(CLASSES))
    assert list(held_out.rows) == list(range(20, 35))
    assert list(held_out.train_rows) == [*range(20), *range(35, 60)]
    (usual,) = [one for one in base.sets_of(pairs) if one.name == "colours"]
    assert held_out.prompts.hash == usual.prompts.hash
    assert held_out.train_hash != usual.train_hash == pairs.rows("colours.train").hash
    rows = base.run(ColourEncoder(), pairs, [held_out], tmp_path, tasks=("zeroshot", "linear_probe"), bootstrap=20)
    assert {(row["dataset"], row["n"]) for row in rows} == {("colours.dev", 15)}
    assert [one.name for one in base.sets_of(pairs, split="val")] == ["cases.val"]
    with pytest.raises(InputError, match="a split 'dvel' to be judged on; did you mean 'val' or 'dev'"):
        base.sets_of(pairs, split="dvel")


def test_run_computes_each_feature_once_in_fixed_batches(tmp_path):
    pairs, encoder = FakePairs(), ColourEncoder()
    rows = base.run(encoder, pairs, base.sets_of(pairs), tmp_path, bootstrap=50, micro_batch=16)
    assert pairs.reads == len(pairs.images)
    assert set(encoder.calls) == {16}
    assert len(encoder.calls) == -(-57 // 16) + -(-60 // 16) + 1 + 1  # tested rows, probe's rows, prompts, captions
    assert {row["task"] for row in rows} == set(base.TASKS) - {"multilabel", "vqa", "vqa_zeroshot"}
    again = base.run(ColourEncoder(), pairs, base.sets_of(pairs), tmp_path / "again", bootstrap=50, micro_batch=7)
    assert rows == again
    other = base.run(ColourEncoder(), pairs, base.sets_of(pairs), tmp_path / "other", bootstrap=50, seed=1)
    assert [r["value"] for r in other if r["task"] != "linear_probe"] == [
        r["value"] for r in rows if r["task"] != "linear_probe"
    ]
    assert [r["low"] for r in other] != [r["low"] for r in rows]


def test_rows_say_where_they_come_from(pairs, tmp_path):
    colours = base.sets_of(pairs)[1]
    rows = base.run(ColourEncoder(), pairs, [colours], tmp_path, probe_layer="pooled", bootstrap=100)
    row = one_row(rows, task="zeroshot", metric="balanced_accuracy")
    assert (row["model"], row["checkpoint"], row["n"], row["seed"]) == ("colour:net", "nowhere", 45, 0)
    assert row["low"] <= row["value"] <= row["high"]
    context = row["context"]
    assert context["prompt_hash"] == colours.prompts.hash
    assert (context["split_hash"], context["profile"]) == (colours.split_hash, "ensemble")
    assert (context["feature_layer"], context["classes"]) == ("embedding", 3)
    assert context["bootstrap"] == {"method": "percentile", "resamples": 100, "unit": "row", "strata": "class"}
    probed = one_row(rows, task="linear_probe", metric="accuracy")["context"]
    assert (probed["feature_layer"], probed["train_hash"]) == ("pooled", colours.train_hash)

    stored = results.load_predictions(tmp_path, "colour:net", "colours", "zeroshot")
    assert stored["ids"].tolist() == pairs.table["id"][colours.rows].tolist()
    assert metrics.classification(stored["labels"], stored["scores"]) == pytest.approx(
        {r["metric"]: r["value"] for r in rows if r["task"] == "zeroshot"}
    )
    assert row["value"] > 0.5  # the colours tell, against 1/3 by chance


def test_summary_equals_the_rows_and_pairs_models(pairs, tmp_path):
    sets = base.sets_of(pairs)
    rows = [r for e in (ColourEncoder(), Collapsed()) for r in base.run(e, pairs, sets, tmp_path, bootstrap=200)]
    row = one_row(rows, task="zeroshot", metric="balanced_accuracy", model="colour:net")
    options = {"resamples": 200}
    mean = summary.row(tmp_path, "colour:net", ["colours"], **options)
    assert [mean[k] for k in ("value", "low", "high", "n")] == [row[k] for k in ("value", "low", "high", "n")]
    results.check([*rows, mean])
    gain = summary.difference(tmp_path, "colour:net", "collapsed", ["colours"], **options)
    assert gain.value == pytest.approx(row["value"] - 1 / 3)
    assert gain.interval()[0] > 0
    same = summary.difference(tmp_path, ["colour:net"], ["colour:net"], ["colours"], **options)
    assert same.interval() == (0, 0)
    assert summary.best(rows, ["collapsed", "colour:net"], "colours", "zeroshot", "balanced_accuracy") == row
    assert summary.best(rows, ["nobody"], "colours", "zeroshot", "balanced_accuracy") is None
    for call, message in (
        (lambda: summary.mean(tmp_path, "nobody", ["colours"]), "does not exist"),
        (lambda: summary.mean(tmp_path, "colour:net", ["colours"], metric="balanced_acc"), "balanced_accuracy"),
        (lambda: summary.mean(tmp_path, "colour:net", ["cases"], task="retrieval"), "no classification"),
        (lambda: summary.mean(tmp_path, "colour:net", []), "no set"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_run_refuses_what_it_cannot_evaluate(pairs, tmp_path):
    sets = base.sets_of(pairs)
    with pytest.raises(InputError, match="did you mean 'zeroshot'"):
        base.run(ColourEncoder(), pairs, sets, tmp_path, tasks=["zero_shot"])
    with pytest.raises(InputError, match="same name"):
        base.run(ColourEncoder(), pairs, [sets[0], sets[0]], tmp_path)
    with pytest.raises(InputError, match="not one of embedding, pooled"):
        base.run(ColourEncoder(), pairs, sets, tmp_path, probe_layer="middle")

    class Damaged(ColourEncoder):
        def encode_image(self, images, projected=True):
            return super().encode_image(images) * np.nan

    with pytest.raises(InputError, match="not finite"):
        base.run(Damaged(), pairs, sets, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_a_lab_s_own_task_is_found_by_its_path(pairs, tmp_path, monkeypatch):
    module = types.ModuleType("a_lab_task")
    module.applies = lambda one: one.captions
    module.evaluate = lambda data: base.TaskResult(
        {"rows": (bootstrap.Estimate(float(len(data.set.rows)), np.full(3, 12.0)), 12)}, {}, {}
    )
    package = types.ModuleType("a_lab")
    package.__path__ = []
    monkeypatch.setitem(__import__("sys").modules, "a_lab", package)
    monkeypatch.setitem(__import__("sys").modules, "a_lab.task", module)
    rows = base.run(ColourEncoder(), pairs, base.sets_of(pairs), tmp_path, tasks=["a_lab.task"])
    assert [(row["task"], row["dataset"], row["value"]) for row in rows] == [("a_lab.task", "cases", 12)]


def test_teacher_as_an_encoder():
    teacher = types.SimpleNamespace(
        spec="spec",
        preprocess=lambda image: np.asarray(image, np.float32),
        tokenize=lambda texts: np.array([[len(text)] for text in texts]),
        encode_image=lambda images: images.mean((1, 2)),
        encode_text=lambda ids: np.repeat(ids, 3, 1),
    )
    encoder = TeacherEncoder("clip", "weights/clip", teacher)
    assert (encoder.name, encoder.checkpoint, encoder.spec) == ("teacher:clip", "weights/clip", "spec")
    assert encoder.logit_scale == 100
    assert encoder.encode_image([Image.new("RGB", (4, 4), (9, 6, 3))]).tolist() == [[9, 6, 3]]
    assert encoder.encode_text(["four"]).tolist() == [[4, 4, 4]]
    with pytest.raises(InputError, match="projected features only"):
        encoder.encode_image([], projected=False)
    teacher.encode_image = lambda images, projected=True: images.mean((1, 2)) + 100 * (not projected)
    assert encoder.encode_image([Image.new("RGB", (4, 4), (9, 6, 3))], projected=False).tolist() == [[109, 106, 103]]


# ---------------------------------------------------------------- results.json


def result_row(**changed):
    about = {"model": "a", "checkpoint": "", "dataset": "busi", "task": "zeroshot", "metric": "accuracy"}
    values = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "seed": 0, "context": {"profile": "names"}}
    return {**about, **values, **changed}


def test_results_are_merged_by_identity(tmp_path):
    path = tmp_path / "results.json"
    results.update(path, [result_row(), result_row(model="b")])
    results.update(path, [result_row(value=0.7), result_row(context={"profile": "ensemble"})])
    found = results.load(path)
    assert [(r["model"], r["value"], r["context"]["profile"]) for r in found] == [
        ("a", 0.7, "names"), ("b", 0.5, "names"), ("a", 0.5, "ensemble"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([result_row(value=float("nan"))], "not a float"),
        ([result_row(n=1.5)], "n is 1.5, not a int"),
        ([result_row(value=True)], "value is True"),
        ([{"model": "a"}], "exactly the fields"),
        ([result_row() | {"extra": 1}], "exactly the fields"),
        ([result_row(), result_row()], "repeats"),
    ],
)
def test_results_refuse_rows_off_the_schema(rows, message, tmp_path):
    with pytest.raises(InputError, match=message):
        results.save(tmp_path / "results.json", rows)
    assert not (tmp_path / "results.json").exists()


def test_results_refuse_another_schema(tmp_path):
    path = tmp_path / "results.json"
    for content in ('{"schema": 2, "rows": []}', "[]", '{"schema": 1}'):
        path.write_text(content)
        with pytest.raises(InputError, match="schema"):
            results.load(path)


def test_predictions_are_file_safe_and_checked(tmp_path):
    names = ["teacher:clip", "teacher_clip", "a/b", "a b", "..", "ü"]
    for name in names:
        path = results.predictions_path(tmp_path, name, "busi", "zeroshot")
        assert path.parent.parent == tmp_path / "predictions"
        results.save_predictions(path, {"ids": np.array([name])})
    assert len(list((tmp_path / "predictions").iterdir())) == len(names)
    assert results.load_predictions(tmp_path, "a/b", "busi", "zeroshot")["ids"].tolist() == ["a/b"]
    with pytest.raises(InputError, match="needs a name"):
        results.file_name("")
    with pytest.raises(InputError, match="Python objects"):
        results.save_predictions(path, {"ids": np.array([None])})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="damaged"):
        results.load_predictions(tmp_path, names[-1], "busi", "zeroshot")


# ---------------------------------------------------------------- examples and the command


def test_examples_say_what_the_predictions_say(pairs, tmp_path):
    sets = base.sets_of(pairs)
    base.run(ColourEncoder(), pairs, sets, tmp_path, bootstrap=10)
    found = examples(tmp_path, "colour:net", pairs, "cases", queries=3, top=2)
    assert found == examples(tmp_path, "colour:net", pairs, "cases", queries=3, top=2)
    assert [len(found["i2t"]), len(found["t2i"])] == [3, 3]
    for item in [*found["i2t"], *found["t2i"]]:
        assert len(item["top"]) == 2
        assert any(top["right"] for top in item["top"]) == (item["rank"] <= 2)
        assert item["top"][0]["cosine"] >= item["top"][1]["cosine"]
    assert {item["pool"] for item in found["i2t"]} == {4}
    assert {item["pool"] for item in found["t2i"]} == {12}
    report.write_report(tmp_path / "report.html", {"examples": [found]})
    assert (tmp_path / "report.html").read_text().count("data:image/jpeg") == 3 + 3 * 2
    with pytest.raises(InputError, match="at least one"):
        examples(tmp_path, "colour:net", pairs, "cases", queries=0)
    with pytest.raises(InputError, match="evaluate nobody on cases"):
        examples(tmp_path, "nobody", pairs, "cases")


@pytest.fixture
def line(tmp_path, monkeypatch):
    """Runs `mmkd eval` on the set in memory; checkpoints named DIR load as the colour net."""

    def load(path, name=None):
        encoder = ColourEncoder()
        encoder.name, encoder.checkpoint = name or "student", path
        return encoder

    monkeypatch.setattr("mmkd_jax.data.pairs.PairsSet.open", lambda path: FakePairs())
    monkeypatch.setattr("mmkd_jax.api.load", load)
    out = str(tmp_path / "out")
    return lambda *words: main(["eval", "--pairs", "any", "--out", out, "--bootstrap", "20", *words])


def test_command_scores_checkpoints_and_merges(line, tmp_path, capsys):
    assert line("--checkpoint", "runs/a", "--sets", "colours", "--tasks", "zeroshot") == 0
    printed = capsys.readouterr().out
    assert re.search(r"student +colours +zeroshot +balanced_accuracy +0\.\d{3} \[0\.\d{3}, [01]\.\d{3}\] n=45", printed)
    assert line("--checkpoint", "b=runs/b", "--tasks", "zeroshot", "--prompts", "names") == 0
    rows = results.load(tmp_path / "out" / "results.json")
    assert {(r["model"], r["checkpoint"], r["context"]["profile"]) for r in rows} == {
        ("student", "runs/a", "ensemble"), ("b", "runs/b", "names"),
    }  # fmt: skip
    assert (tmp_path / "out" / "predictions" / "b" / "colours.zeroshot.npz").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate"),
        (["--checkpoint", "a", "--sets", "colour"], "did you mean 'colours'"),
        (["--checkpoint", "a", "--tasks", "zero"], "did you mean 'zeroshot'"),
        (["--checkpoint", "x/a", "y/a"], "two models are called 'a'"),
        (["--checkpoint", "x/checkpoints/4", "x-4=y", "z"], "two models are called 'x-4'"),
        (["--checkpoint", "a", "--bootstrap", "0"], "--bootstrap must be at least 1"),
        (["--checkpoint", "a", "--prompts", "name"], "did you mean 'names'"),
        (["--teacher", "clip"], "must be NAME=WEIGHTS"),
    ],
)
def test_command_refuses_wrong_input(line, words, message, capsys):
    assert line(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_command_leaves_no_folder_where_the_model_is_not_there(line, tmp_path, capsys, monkeypatch):
    def missing(path, name=None):
        raise InputError(f"{path} holds no checkpoint")

    with monkeypatch.context() as patch:
        patch.setattr("mmkd_jax.api.load", missing)
        assert line("--checkpoint", "a") == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        (tmp_path / "out").mkdir()  # the user's own stays
        assert line("--checkpoint", "a") == 2
        assert (tmp_path / "out").exists()


def test_command_refuses_results_of_another_schema_before_it_works(line, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text('{"schema": 99, "rows": []}')
    monkeypatch.setattr("mmkd_jax.api.load", None)  # would fail differently if it came so far
    assert line("--checkpoint", "a") == 2
    assert "schema 99" in capsys.readouterr().err


def test_a_known_set_is_asked_in_its_own_words():
    busi = ("benign breast mass", "malignant breast mass", "normal breast tissue")
    asked = prompts.default(busi, "ultrasound", name="busi")
    assert asked.sentences[0] == ("Breast ultrasound image showing a benign mass.",)
    assert prompts.default(busi[::-1], "ultrasound", name="busi").sentences == asked.sentences[::-1]
    cells = prompts.default(("platelet", "red blood cell"), "microscopy", name="bccd_cells")
    assert cells.sentences[0] == ("Blood smear microscopy crop of a platelet.",)
    # other classes under that name, or the bare names asked for: the set's own words do not apply
    assert prompts.default(("a", "b"), "ultrasound", name="busi") == prompts.default(("a", "b"), "ultrasound")
    assert prompts.default(busi, "ultrasound", "names", name="busi").sentences[0] == ("benign breast mass",)


def test_rows_without_a_class_take_no_part_in_classification(pairs):
    whole = next(s for s in base.sets_of(pairs) if s.name == "colours")
    some = FakePairs()
    unlabelled = [some.indices["colours.test"][0], some.indices["colours.train"][3]]
    some.table["label_id"] = some.table["label_id"].copy()
    some.table["label_id"][unlabelled] = -1
    part = next(s for s in base.sets_of(some) if s.name == "colours")
    assert set(whole.rows) - set(part.rows) == {unlabelled[0]}
    assert set(whole.train_rows) - set(part.train_rows) == {unlabelled[1]}
    assert part.split_hash != whole.split_hash


def test_the_pixel_floor_takes_part_where_nothing_is_asked_in_words(pairs, tmp_path):
    tasks = ["zeroshot", "linear_probe"]
    rows = base.run(PixelFloor(), pairs, base.sets_of(pairs), tmp_path, tasks=tasks, bootstrap=20)
    assert {(row["model"], row["task"]) for row in rows} == {("floor:pixels", "linear_probe")}
    with pytest.raises(InputError, match=r"floor:pixels takes part in linear_probe, knn, .* only; ask for one"):
        base.run(PixelFloor(), pairs, base.sets_of(pairs), tmp_path, tasks=["zeroshot"])
