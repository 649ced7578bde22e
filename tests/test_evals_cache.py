"""Features kept on disk, evaluations that go on where they were killed, and models of every kind in one command."""

import csv
import io
import os
import pathlib
import signal
import types

import data_fixtures as toy
import ml_dtypes
import numpy as np
import processes
import pytest

from mmkd_jax import preprocess
from mmkd_jax.cli import main
from mmkd_jax.errors import InputError
from mmkd_jax.evals import base, cache, features, results
from mmkd_jax.evals.stored import FeatureFolder
from mmkd_jax.evals.teachers import TeacherEncoder


class Pixels:
    """Coarse pixels of a picture; for texts a hash of them. Counts what it is asked for."""

    name, checkpoint, spec, logit_scale = "pixels", "nowhere", None, 10.0

    def __init__(self, identity="one"):
        self.identity, self.pictures, self.texts = identity, 0, 0

    def encode_image(self, images, projected=True):
        self.pictures += len(images)
        small = np.stack([np.asarray(i.convert("RGB").resize((2, 2)), np.float32).ravel() for i in images]) / 255 - 0.5
        return small if projected else np.hstack([small, small**2])

    def encode_text(self, texts):
        self.texts += len(texts)
        seeds = [int.from_bytes(text.encode()[-6:], "little") for text in texts]
        return np.stack([np.random.default_rng(seed).standard_normal(12) for seed in seeds]).astype(np.float32)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A set with a classified source `toy` and a retrieved one, `other`."""
    path = tmp_path_factory.mktemp("pairs") / "set"
    labelled, others = [[i for i in range(80) if (i % 5 == 0) == other] for other in (False, True)]
    rows = {"toy.train": labelled[:40], "toy.test": labelled[40:], "other.test": others}
    return toy.make_pairs(path, n=80, rows=rows)


def evaluate(encoder, pairs, folder, **options):
    return base.run(encoder, pairs, base.sets_of(pairs), folder / "out", bootstrap=20, **options)


def files(folder):
    return sorted(pathlib.Path(folder).rglob("*.features"))


# ---------------------------------------------------------------- the cache


def test_features_are_computed_once_for_good(pairs, tmp_path):
    first, second = Pixels(), Pixels()
    rows = evaluate(first, pairs, tmp_path, cache=tmp_path / "features")
    assert first.pictures > 0
    assert first.texts > 0
    assert evaluate(second, pairs, tmp_path, cache=tmp_path / "features") == rows
    assert (second.pictures, second.texts) == (0, 0)
    # what is asked in another order, or on one set alone, is found too
    third, sets = Pixels(), base.sets_of(pairs)
    base.run(third, pairs, sets[::-1], tmp_path / "third", bootstrap=20, cache=tmp_path / "features")
    base.run(third, pairs, sets[:1], tmp_path / "fourth", bootstrap=20, cache=tmp_path / "features")
    assert (third.pictures, third.texts) == (0, 0)
    plain = evaluate(Pixels(""), pairs, tmp_path / "plain", cache=tmp_path / "none")
    assert [r | {"context": 0} for r in plain] == [r | {"context": 0} for r in rows]
    assert not files(tmp_path / "none")  # nothing is kept for an encoder that does not say what it is


def test_what_changes_features_changes_their_place(pairs, tmp_path):
    kept = tmp_path / "features"
    evaluate(Pixels(), pairs, tmp_path, cache=kept, tasks=["linear_probe"])
    before = files(kept)
    others = []
    for change in (
        lambda: evaluate(Pixels("two"), pairs, tmp_path, cache=kept, tasks=["linear_probe"]),  # other weights
        lambda: evaluate(Pixels(), pairs, tmp_path, cache=kept, tasks=["linear_probe"], probe_layer="pooled"),
        lambda: evaluate(Pixels(), toy.make_pairs(tmp_path / "more", n=84, rows={"toy.test": range(40, 80)}),
                         tmp_path, cache=kept, tasks=["zeroshot"]),
    ):  # fmt: skip
        change()
        others.append(set(files(kept)) - set(before))
        before = files(kept)
    assert [len(new) for new in others] == [2, 2, 2]
    # a row more and a row less, another row's number, the same rows of another set: none is answered by another
    parts = [cache.part_of_rows("set", rows) for rows in ([1, 2], [1, 2, 3], [1, 3], [12])]
    parts += [cache.part_of_rows("sets", [1, 2]), cache.part_of_texts(["a", "b"]), cache.part_of_texts(["ab"])]
    assert len(set(parts)) == len(parts)


def test_teachers_identity_is_that_of_their_weights_preprocessing_and_backend():
    class Teacher:
        weights_hash, preprocess_hash = "w", "p"
        spec = types.SimpleNamespace(to_dict=lambda: {"name": "any", "image": {"width": 4}, "embed": 2})

    class Other(Teacher):
        pass

    def identity(teacher):
        return TeacherEncoder("any", "path", teacher).identity

    def changed(**values):
        teacher = Teacher()
        vars(teacher).update(values)
        return teacher

    own = identity(Teacher())
    assert own == identity(changed(name="another name"))
    different = [changed(weights_hash="v"), changed(preprocess_hash="q"), Other()]
    different.append(changed(spec=types.SimpleNamespace(to_dict=lambda: {"image": {"width": 5}, "embed": 2})))
    assert len({own, *map(identity, different)}) == 5
    assert identity(changed(weights_hash="")) == ""  # it does not tell: nothing is cached


def test_a_damaged_file_is_named_and_made_again(pairs, tmp_path, capsys):
    rows = evaluate(Pixels(), pairs, tmp_path, cache=tmp_path / "features")
    tested = base.sets_of(pairs)[0].rows
    store = cache.FeatureCache(tmp_path / "features", "pixels", "one")
    part, count = cache.part_of_rows(pairs.hash, np.sort(tested)), len(tested)
    path = store._path("embedding", part)
    whole = path.read_bytes()
    head = whole.index(b"\n") + 1
    places = [*range(head), *range(head, len(whole), 97)]
    bad = [whole[:k] + bytes([whole[k] ^ 1 << k % 8]) + whole[k + 1 :] for k in places]
    bad += [b"", whole[:-4], whole[:head], whole + b"0000", b"[]\n" + whole[head:], b"{}\n"]
    good = store.read("embedding", part, count)
    assert good.shape == (count, 12)
    for content in bad:
        path.write_bytes(content)
        found = store.read("embedding", part, count)
        assert found is None or np.array_equal(found, good)
    assert str(path) in capsys.readouterr().err
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = Pixels()
    assert evaluate(again, pairs, tmp_path, cache=tmp_path / "features") == rows
    assert again.pictures > 0
    assert path.read_bytes() == whole
    said = capsys.readouterr().err
    assert f"{path} is damaged" in said
    assert said.count("\n") == 1


def test_rows_are_kept_in_parts(pairs, tmp_path, monkeypatch):
    rows = evaluate(Pixels(), pairs, tmp_path, cache=tmp_path / "a")
    monkeypatch.setattr(cache, "PART", 16)
    assert evaluate(Pixels(), pairs, tmp_path, cache=tmp_path / "b", micro_batch=8) == rows
    assert len(files(tmp_path / "b")) > len(files(tmp_path / "a"))
    # killed in the midst of a set: the parts that were done are not computed again
    for path in files(tmp_path / "b")[:3]:
        path.unlink()
    again = Pixels()
    evaluate(again, pairs, tmp_path, cache=tmp_path / "b", micro_batch=8)
    assert 0 < again.pictures + again.texts <= 3 * 16


def test_nan_features_and_missing_pictures_are_named(pairs, monkeypatch):
    class Bad(Pixels):
        def encode_image(self, images, projected=True):
            found = super().encode_image(images)
            found[0] = np.nan
            return found

        def encode_text(self, texts):
            return 0 * super().encode_text(texts)

    table = features.Features(Bad(), pairs)
    with pytest.raises(InputError, match=rf"row 7 \(id {pairs.table['id'][7]}\); its weights are damaged"):
        table.images(np.array([9, 7]))
    with pytest.raises(InputError, match="not finite or zero, first for the text 'a word'"):
        table.texts(["a word"])

    def broken(data):
        raise InputError("no picture")

    monkeypatch.setattr(preprocess, "decode", broken)
    with pytest.raises(InputError, match=r"row 3 \(id \w+\): no picture"):
        features.Features(Pixels(), pairs).images(np.array([3]))


# ---------------------------------------------------------------- going on

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_evals_cache as module
from mmkd_jax.evals import results
left = [{kills}]
def killing(update=results.update):
    def wrapped(path, rows):
        left[0] -= 1
        if left[0] == 0 and {before}:
            os.kill(os.getpid(), signal.SIGKILL)
        update(path, rows)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return wrapped
results.update = killing()
sys.exit(module.line({pairs!r}, {out!r}))
"""


def line(pairs, out, *words, encoder=None):
    """`mmkd eval` of the model above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmkd_jax.api.load", lambda path, name=None: encoder or Pixels())
        return main(["eval", "--checkpoint", "any", "--pairs", pairs, "--out", str(out), "--bootstrap", "20", *words])


def shape(folder):
    """What an evaluation leaves, but for the page."""
    kept = [p for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file() and p.suffix != ".html"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


@pytest.mark.parametrize("before", [True, False])
def test_a_killed_evaluation_goes_on_and_leaves_the_same_bytes(pairs, tmp_path, before, capsys):
    where = str(pairs.path)
    assert line(where, tmp_path / "whole") == 0
    out = tmp_path / "killed"
    program = KILLED.format(tests=os.path.dirname(__file__), kills=2, before=before, pairs=where, out=str(out))
    process = processes.start(["-c", program], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert process.wait(300) == -signal.SIGKILL
    assert {row["dataset"] for row in results.load(out / "results.json")} == {"other"} | ({"toy"} - {"toy" * before})
    capsys.readouterr()
    again = Pixels()
    assert line(where, out, encoder=again) == 0
    assert "1 of 2 sets are done already" in capsys.readouterr().out
    assert again.pictures == 0  # its features were kept
    assert shape(out) == shape(tmp_path / "whole")


def test_what_was_asked_otherwise_is_not_taken_for_done(pairs, tmp_path, capsys):
    def interrupted(encoder, *words):
        """Leaves after the first set."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(results, "update", _second_fails(results.update))
            assert line(str(pairs.path), tmp_path, *words, encoder=encoder) == 2
        capsys.readouterr()

    def done(encoder, *words):
        assert line(str(pairs.path), tmp_path, *words, encoder=encoder) == 0
        assert not (tmp_path / "unfinished.json").exists()
        return "done already" in capsys.readouterr().out

    interrupted(Pixels())
    assert done(Pixels())
    assert not done(Pixels())  # it was finished: all is made again
    for encoder, words in (
        (Pixels("two"), ()),
        (Pixels(), ("--seed", "1")),
        (Pixels(), ("--tasks", "zeroshot", "retrieval")),
        (Pixels(), ("--bootstrap", "21")),
    ):
        interrupted(Pixels())
        assert not done(encoder, *words)


def _second_fails(update):
    calls = []

    def wrapped(path, rows):
        calls.append(path)
        if len(calls) == 2:
            raise InputError("enough")
        return update(path, rows)

    return wrapped


# ---------------------------------------------------------------- models of every kind


def test_a_folder_of_features_is_evaluated_without_prompts(pairs, tmp_path, capsys):
    emitted = tmp_path / "emitted"
    made = _emit(emitted, pairs)
    words = ["eval", "--pairs", str(pairs.path), "--bootstrap", "20", "--out", str(tmp_path / "out")]
    assert (
        main([*words, "--features", str(emitted), f"again={emitted}", "--tasks", "zeroshot", "retrieval", "knn"]) == 0
    )
    said = capsys.readouterr().out
    assert "features:t: stored features have no prompts, no zeroshot on toy" in said
    rows = results.load(tmp_path / "out" / "results.json")
    assert {(r["model"], r["dataset"], r["task"]) for r in rows} == {
        (model, *what) for model in ("features:t", "again") for what in (("other", "retrieval"), ("toy", "knn"))
    }
    rounded = [np.asarray(one, ml_dtypes.bfloat16).astype(np.float32) for one in (made["image"][:, 0], made["text"])]
    by_text = {text: rounded[1][k] for k, text in enumerate(made["texts"])}
    table = FeatureFolder(emitted).open(pairs)
    for row in (0, 17, 61):
        np.testing.assert_array_equal(table.images(np.array([row]))[0], rounded[0][row])
        text = table.captions(row)[-1]
        np.testing.assert_array_equal(table.texts([text])[0], by_text[text])
    with pytest.raises(InputError, match="has no feature of the text 'a photo of a cat"):
        table.texts(["a photo of a cat"])
    with pytest.raises(InputError, match="projected features only"):
        table.images(np.array([0]), "pooled")


def _emit(folder, pairs):
    """Features of every row, and the values that were given."""
    writer = toy.feature_writer(folder, pairs)
    image, text = toy.feature_values(pairs, 6, 2)
    present = np.ones(len(pairs), bool)
    for shard in writer.pending():
        rows = writer.rows(shard)
        here = slice(rows.start, rows.stop)
        writer.write_shard(shard, present[here], image[here], text[here])
    writer.finish()
    texts = [caption for row in range(len(pairs)) for caption in pairs.read(row).captions]
    return {"image": image, "text": np.concatenate(text), "texts": texts}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--features", "{pairs}"], "is not the manifest of a feature set"),
        (["--features", "{partial}", "--tasks", "knn"], "lacks"),
        (
            ["--checkpoint", "any", "--sets", "other", "--tasks", "zeroshot"],
            "none of the tasks zeroshot applies to other",
        ),
        (["--torch", "clip"], "must be NAME=WEIGHTS"),
        (["--checkpoint", "any", "--sets", "toys"], "did you mean 'toy'"),
    ],
)
def test_the_command_refuses_in_one_line(pairs, tmp_path, words, message, capsys):
    toy.make_features(tmp_path / "partial", pairs)  # every seventh row is absent
    places = {"pairs": str(pairs.path), "partial": str(tmp_path / "partial")}
    words = [word.format(**places) for word in words]
    assert main(["eval", "--pairs", str(pairs.path), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_results_are_there_as_csv(pairs, tmp_path):
    assert line(str(pairs.path), tmp_path) == 0
    rows = results.load(tmp_path / "results.json")
    read = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [[r["dataset"], r["metric"], float(r["value"]), int(r["n"])] for r in read] == [
        [r["dataset"], r["metric"], r["value"], r["n"]] for r in rows
    ]
    assert {r["model_hash"] for r in read} == {"one"}
    assert {r["profile"] for r in read} == {r["context"].get("profile", "") for r in rows}
