"""Emission: what is stored is what the teachers say of each view and caption, once, whatever was interrupted."""

import functools
import os
import re
import types
from collections import Counter

import data_fixtures as toy
import jax
import numpy as np
import processes
import pytest
import train_fixtures as tiny
from PIL import Image

import teachers
from mmkd_jax import cli, preprocess, tokenizers
from mmkd_jax.data.batches import Batches
from mmkd_jax.data.features import FeatureSet, FeatureWriter
from mmkd_jax.data.pairs import PairsSet, PairsWriter
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower, TokenizerSpec
from teachers import emit as emission
from teachers import progress

ROWS, VIEWS = 40, 2


class FakeTeacher:
    """A fixed linear teacher; remembers what it was asked for, and can fail at its n-th call."""

    logit_scale, backend, weights_hash, preprocess_hash = 20.0, "none 1", "w", "p"

    def __init__(self, seed: int, width: int, size: int, fail_at: int = 0):
        self.spec = types.SimpleNamespace(
            embed=width, license="CC0", preprocess=types.SimpleNamespace(size=size), name=f"fake{seed}"
        )
        rng = np.random.default_rng(seed)
        self._image = rng.normal(size=(3 * size * size, width))
        self._text = rng.normal(size=(toy.CharTokenizer.context, width))
        self.tokenize = toy.CharTokenizer()
        self.fail_at, self.calls = fail_at, 0
        self.pictures: list[int] = []  # of each call
        self.texts: list[int] = []

    def preprocess(self, image: Image.Image) -> np.ndarray:
        assert image.size == (self.spec.preprocess.size,) * 2
        return np.asarray(image, np.float32) / 255 - 0.5

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        self._called(self.pictures, len(images))
        return np.stack([x.ravel() @ self._image for x in images]).astype(np.float32)

    def encode_text(self, text) -> np.ndarray:
        self._called(self.texts, len(text.ids))
        return np.stack([ids @ self._text for ids in text.ids]).astype(np.float32)

    def _called(self, log: list[int], count: int) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        log.append(count)


def fakes(**options) -> dict[str, FakeTeacher]:
    """Three teachers, two of which want the same size."""
    sizes = {"alpha": (6, 8), "beta": (10, 8), "gamma": (4, 12)}
    return {name: FakeTeacher(seed, *size, **options) for seed, (name, size) in enumerate(sizes.items())}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> PairsSet:
    return toy.make_pairs(tmp_path_factory.mktemp("set") / "pairs", ROWS)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Three shards of two blocks of eight rows; pieces of seven pictures, which divide neither."""
    monkeypatch.setattr(emission, "FeatureWriter", functools.partial(FeatureWriter, block=8, shards=3))
    monkeypatch.setattr(emission, "PIECE", 7)


def run(given, pairs, out, **changes):
    emission.emit(given, pairs, out, **{"policy": toy.POLICY, "views": VIEWS, "dtype": "float32", **changes})
    return out


def content(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def read(folder, pairs, name, rows, view=0, caption=0):
    n = len(rows)
    return FeatureSet.open(folder / name, pairs).read(np.asarray(rows), np.full(n, view), np.full(n, caption))


def live(teacher, pairs, row, view=0, caption=0, policy=toy.POLICY):
    """The teacher run on one view and one caption of one pair."""
    pair = pairs.read(row)
    picture = policy.render(preprocess.decode(pair.image), pair.id, view, teacher.spec.preprocess.size)
    image = teacher.encode_image(teacher.preprocess(Image.fromarray(picture))[None])
    return unit(image)[0], unit(teacher.encode_text(teacher.tokenize([pair.captions[caption]])))[0]


def test_stored_is_what_the_teacher_says(pairs, tmp_path):
    given = fakes()
    run(given, pairs, tmp_path / "out")
    for name, teacher in given.items():
        for view in range(VIEWS):
            found = read(tmp_path / "out", pairs, name, range(ROWS), view)
            assert found["present"].all()
            for row in range(ROWS):
                image, text = live(teacher, pairs, row, view)
                np.testing.assert_allclose(found["image"][row], image, atol=1e-6)
                np.testing.assert_allclose(found["text"][row], text, atol=1e-6)
        last = read(tmp_path / "out", pairs, name, [2, 5], caption=2)["text"]
        np.testing.assert_allclose(last[0], live(teacher, pairs, 2, caption=2)[1], atol=1e-6)
        # The check would see another view, another row and another caption.
        assert np.abs(found["image"][3] - live(teacher, pairs, 3, view=0)[0]).max() > 1e-4
        assert np.abs(found["image"][3] - live(teacher, pairs, 4, view=1)[0]).max() > 1e-3
        assert np.abs(last[0] - live(teacher, pairs, 2, caption=1)[1]).max() > 1e-3


def test_a_view_is_cut_once_a_size_and_a_text_encoded_once(pairs, tmp_path, monkeypatch):
    cuts, decoded = Counter(), Counter()
    render, decode = ViewPolicy.render, preprocess.decode

    def counting(self, image, id, k, size):
        cuts[id, k, size] += 1
        return render(self, image, id, k, size)

    monkeypatch.setattr(ViewPolicy, "render", counting)
    monkeypatch.setattr(preprocess, "decode", lambda data: decoded.update([data]) or decode(data))
    given = fakes()
    run(given, pairs, tmp_path / "out")
    ids = pairs.ids(np.arange(ROWS))
    assert set(cuts) == {(id, k, size) for id in ids for k in range(VIEWS) for size in (8, 12)}
    assert set(cuts.values()) == {1}
    assert len(decoded) == ROWS
    assert set(decoded.values()) == {1}
    for teacher in given.values():
        assert sum(teacher.pictures) == ROWS * VIEWS
        assert sum(teacher.texts) == teacher.tokenize.calls == int(pairs.table["captions"].sum())


def test_equal_captions_of_a_shard_are_encoded_once(tmp_path):
    pairs = labelled(tmp_path / "pairs", 24)
    teacher = FakeTeacher(0, 6, 8)
    run({"alpha": teacher}, pairs, tmp_path / "out")
    assert teacher.texts == [2, 2, 2]
    found = read(tmp_path / "out", pairs, "alpha", range(24))["text"]
    np.testing.assert_array_equal(found[:2], found[22:])
    assert np.abs(found[0] - found[1]).max() > 1e-3


def labelled(path, n) -> PairsSet:
    """A set in which even rows share a caption, and odd ones another."""
    with PairsWriter(path, "toy", shards=1) as writer:
        for row in range(n):
            pair = toy.pair(row, 1)
            pair.captions[:] = [("a cat", "a dog")[row % 2]]
            writer.add(pair)
        return writer.finish({"train": list(range(n))})


# Shards have 16, 8 and 16 rows: six, three and six calls for pictures, and one for texts, which comes last.
@pytest.mark.parametrize(
    ("who", "call", "left"),
    [
        ("alpha", 1, {"alpha": 40, "beta": 40, "gamma": 40}),
        ("gamma", 4, {"alpha": 40, "beta": 40, "gamma": 40}),
        ("alpha", 7, {"alpha": 40, "beta": 40, "gamma": 40}),
        ("beta", 7, {"alpha": 24, "beta": 40, "gamma": 40}),
        ("alpha", 9, {"alpha": 24, "beta": 24, "gamma": 24}),
        ("gamma", 11, {"alpha": 16, "beta": 16, "gamma": 24}),
        ("gamma", 18, {"alpha": 0, "beta": 0, "gamma": 16}),
    ],
)
def test_interrupted_anywhere_it_ends_with_the_same_bytes(pairs, tmp_path, who, call, left):
    whole = run(fakes(), pairs, tmp_path / "whole")
    broken = fakes()
    broken[who].fail_at = call
    with pytest.raises(KeyboardInterrupt):
        run(broken, pairs, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/manifest.json"))
    again = fakes()
    run(again, pairs, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)
    assert {name: sum(teacher.pictures) / VIEWS for name, teacher in again.items()} == left


class Kill(BaseException):
    """Stands for a process that is gone from one moment to the next."""


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_ten_times_at_random_it_ends_with_the_same_bytes(pairs, tmp_path, monkeypatch, seed):
    """In a teacher, before a file is renamed into place, or after; shards that are whole are not made again."""
    whole = content(run(fakes(), pairs, tmp_path / "whole"))
    rng, rename = np.random.default_rng(seed), os.replace
    moments, files = 0, []

    def maybe(limit):
        nonlocal moments
        moments += 1
        if moments == limit:
            raise Kill

    for _ in range(10):
        limit, moments = int(rng.integers(1, 30)), 0
        given = fakes()
        for teacher in given.values():
            monkeypatch.setattr(teacher, "_called", lambda log, count, limit=limit: maybe(limit))

        def replacing(source, target, limit=limit):
            maybe(limit)
            rename(source, target)
            files.append(os.path.basename(target))
            maybe(limit)

        monkeypatch.setattr(os, "replace", replacing)
        try:
            run(given, pairs, tmp_path / "out")
        except Kill:
            continue
    monkeypatch.setattr(os, "replace", rename)
    run(fakes(), pairs, tmp_path / "out")
    kept = {name: data for name, data in content(tmp_path / "out").items() if "tmp" not in name.split("/")[-1]}
    assert kept == whole
    assert files


def test_a_finished_set_is_left_alone(pairs, tmp_path):
    before = content(run(fakes(), pairs, tmp_path / "out"))
    again = fakes()
    run(again, pairs, tmp_path / "out")
    assert all(teacher.calls == 0 for teacher in again.values())
    assert content(tmp_path / "out") == before


def test_neither_order_nor_company_nor_pieces_change_the_bytes(pairs, tmp_path, monkeypatch):
    together = content(run(fakes(), pairs, tmp_path / "together"))
    backwards = dict(reversed(fakes().items()))
    assert content(run(backwards, pairs, tmp_path / "backwards")) == together
    for name, teacher in fakes().items():
        run({name: teacher}, pairs, tmp_path / "alone")
    assert content(tmp_path / "alone") == together
    for piece in (1, 1000):
        monkeypatch.setattr(emission, "PIECE", piece)
        given = fakes()
        assert content(run(given, pairs, tmp_path / f"piece{piece}")) == together
        assert max(given["alpha"].pictures) == (VIEWS if piece == 1 else 16 * VIEWS)
    other = content(run({**fakes(), "beta": FakeTeacher(9, 10, 8)}, pairs, tmp_path / "other"))
    assert {name.split("/")[0] for name in together if other[name] != together[name]} == {"beta"}


def test_no_piece_holds_more_pictures_than_allowed(pairs, tmp_path):
    teacher = FakeTeacher(0, 6, 8)
    run({"alpha": teacher}, pairs, tmp_path / "out")
    assert max(teacher.pictures) == 6  # three rows of two views: the most within seven pictures


def test_absent_rows_are_masked_and_not_looked_at(pairs, tmp_path, monkeypatch):
    chosen = np.array([0, 1, 5, 17, 18, 21])  # none of the last shard
    decoded, decode = [], preprocess.decode
    monkeypatch.setattr(preprocess, "decode", lambda data: decoded.append(1) or decode(data))
    rows = RowIndex(chosen, pairs.hash, "some")
    teacher = FakeTeacher(0, 6, 8)
    run({"alpha": teacher}, pairs, tmp_path / "out", rows=rows)
    assert len(decoded) == len(chosen)
    assert sum(teacher.pictures) == len(chosen) * VIEWS
    found = read(tmp_path / "out", pairs, "alpha", range(ROWS))
    assert np.flatnonzero(found["present"]).tolist() == chosen.tolist()
    assert not found["image"][~found["present"]].any()
    np.testing.assert_allclose(found["image"][17], live(teacher, pairs, 17)[0], atol=1e-6)
    features = FeatureSet.open(tmp_path / "out" / "alpha", pairs)
    assert features.manifest["present"] == len(chosen)
    assert features.statistics["image"]["count"] == len(chosen) * VIEWS


def test_another_set_in_the_folder_is_refused(pairs, tmp_path):
    run(fakes(), pairs, tmp_path / "out")
    before = content(tmp_path / "out")
    for change in ({"views": 1}, {"policy": ViewPolicy(seed=9)}, {"dtype": "bfloat16"}):
        with pytest.raises(InputError, match="holds other features"):
            run(fakes(), pairs, tmp_path / "out", **change)
    with pytest.raises(InputError, match="holds other features"):
        run({"alpha": FakeTeacher(0, 7, 8)}, pairs, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_another_backend_does_not_go_on_where_one_stopped(pairs, tmp_path):
    broken = fakes()
    broken["gamma"].fail_at = 11
    with pytest.raises(KeyboardInterrupt):
        run(broken, pairs, tmp_path / "out")
    before = content(tmp_path / "out")
    others = fakes()
    for teacher in others.values():
        teacher.backend = "none 2"
    with pytest.raises(InputError, match=r"holds other features \(backend none 1, now none 2\)") as caught:
        run(others, pairs, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert content(tmp_path / "out") == before
    run(fakes(), pairs, tmp_path / "out")
    assert FeatureSet.open(tmp_path / "out" / "gamma", pairs).manifest["backend"] == "none 1"


def test_progress_tells_pairs_a_second_of_each_teacher_and_the_time_left(pairs, tmp_path, capsys, monkeypatch):
    run(fakes(), pairs, tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"emit: {n} of 3 shards" for n in (1, 2, 3)]
    assert [line.split(", ")[1] for line in lines] == [f"{n} of {ROWS} pairs" for n in (16, 24, 40)]
    assert all(re.search(r"left; pairs/s alpha [^ ]+, beta [^ ]+, gamma [^ ]+$", line) for line in lines)
    meter = progress.Meter(iter([0.0, 2.0, 5.0, 6.0]).__next__)
    with meter.part("encode", "alpha"):
        pass
    with meter.part("decode"):
        pass
    meter.pairs["alpha"] = 10
    assert (meter.of("encode"), meter.of("decode"), meter.of("encode", "decode")) == (2.0, 1.0, 3.0)
    told = progress.Progress(meter, 4, 100)
    assert told.line(7.0) == "emit: 0 of 4 shards, 0 of 100 pairs, 7.0 s"
    monkeypatch.setattr(progress, "EVERY", 0.0)
    told.add(pairs=25)
    told.add(shards=1)
    assert capsys.readouterr().err.count("emit:") == 2
    line = "emit: 1 of 4 shards, 25 of 100 pairs, 30 s, 1 min 30 s left; pairs/s alpha 5"
    assert told.line(30.0) == line


def test_unusable_features_and_pictures_are_named_and_nothing_counts_as_finished(tmp_path):
    pairs = labelled(tmp_path / "pairs", 8)
    for bad in (np.nan, 0.0):
        teacher = FakeTeacher(0, 6, 8)
        teacher.encode_image = lambda images, bad=bad: np.full((len(images), 6), bad, np.float32)
        with pytest.raises(InputError) as caught:
            run({"alpha": teacher}, pairs, tmp_path / f"out{bad}")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / f"out{bad}" / "alpha" / "manifest.json").exists()
    with PairsWriter(tmp_path / "damaged", "toy", shards=1) as writer:
        for row in range(8):
            pair = toy.pair(row)
            writer.add(pair if row != 5 else types.SimpleNamespace(**{**vars(pair), "image": pair.image[:40]}))
        damaged = writer.finish({"train": list(range(8))})
    with pytest.raises(InputError, match=f"pair {damaged.ids(np.array([5]))[0]}"):
        run({"alpha": FakeTeacher(0, 6, 8)}, damaged, tmp_path / "out")
    with pytest.raises(InputError, match="views must be at least 1"):
        run(fakes(), pairs, tmp_path / "none", views=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_divide_the_shards_and_write_the_same_bytes(pairs, tmp_path, monkeypatch, count):
    """Each process in its turn, the first last: it writes the manifests when all are done."""
    reference = content(run(fakes(), pairs, tmp_path / "alone"))
    met = []
    monkeypatch.setattr(emission.multihost_utils, "sync_global_devices", met.append)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    encoded = []
    for index in reversed(range(count)):
        assert not list((tmp_path / "together").rglob("manifest.json"))
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        given = fakes()
        run(given, pairs, tmp_path / "together")
        encoded.append(sum(given["alpha"].pictures))
    assert content(tmp_path / "together") == reference
    assert len(met) == count
    assert sum(encoded) == ROWS * VIEWS  # nothing twice
    assert max(encoded) < ROWS * VIEWS


PROCESS = """
import functools, sys
from mmkd_jax.train import distributed
distributed.start()
import test_emit
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.data.features import FeatureWriter
test_emit.emission.FeatureWriter = functools.partial(FeatureWriter, block=8, shards=3)
with distributed.failing_at_once(()):
    test_emit.run(test_emit.fakes(), PairsSet.open(sys.argv[1]), sys.argv[2])
"""


@pytest.fixture
def children():
    """Kills what a test leaves behind."""
    yield
    processes.kill_all()


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 4])
def test_real_processes_write_the_bytes_of_one(pairs, tmp_path, count, children):
    reference = content(run(fakes(), pairs, tmp_path / "alone"))
    paths = os.pathsep.join((os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))))
    arguments = ["-c", PROCESS, str(pairs.path), str(tmp_path / "together")]
    processes.succeed(processes.together(arguments, count, 1, PYTHONPATH=paths))
    assert content(tmp_path / "together") == reference


# --- a real teacher ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> teachers.Teacher:
    """A dual encoder with random weights, at the size of the smoke student's pictures."""
    spec = ModelSpec(
        name="real",
        image=ImageTower(width=16, layers=1, heads=2, patch=16, image_size=32, mlp_width=32),
        text=TextTower(width=16, layers=1, heads=2, mlp_width=32, vocab_size=60, positions=16, context=16),
        embed=8,
        preprocess=Preprocess(size=32),
    )
    tokenizer = tokenizers.load(TokenizerSpec(), tiny.world() / "vocabulary", context=16, vocab_size=60)
    params = jax.tree.map(np.asarray, DualEncoder(spec).init(jax.random.key(5)))
    return teachers.Teacher("real", "", spec, tokenizer, "hash", params, micro_batch=16)


def test_stored_features_are_the_live_teacher_on_the_students_own_batch(real, tmp_path):
    """What training reads for a batch is what the teacher says of the very pixels and texts of that batch."""
    pairs = tiny.pairs()
    run({"real": real}, pairs, tmp_path / "out", policy=tiny.POLICY)
    features = FeatureSet.open(tmp_path / "out" / "real", pairs)
    given = {"seed": 1, "policy": tiny.POLICY, "image_size": 32, "tokenizer": real.tokenizer, "caption": "random"}
    batches = Batches(pairs, batch=20, features={"real": features}, **given)
    views = set()
    for step in range(4):
        batch = batches.batch(step)
        views.update(zip(batch["row"].tolist(), batch["visit"].tolist(), strict=True))
        stored = batch["targets"]["real"]
        images = np.stack([real.preprocess(Image.fromarray(image)) for image in batch["image"]])
        image, text = unit(real.encode_image(images)), unit(real.encode_text(batch["text"]))
        assert stored["present"].all()
        np.testing.assert_allclose(stored["image"], image, atol=1e-6)
        np.testing.assert_allclose(stored["text"], text, atol=1e-6)
        other = unit(real.encode_image(images[:, :, ::-1]))
        assert np.abs(stored["image"] - other).max() > 1e-3  # mirrored pictures would be seen
    assert len(views) == 80  # every row twice, and by then in both views


def test_pieces_do_not_change_the_bytes_of_a_real_teacher(real, pairs, tmp_path, monkeypatch):
    reference = content(run({"real": real}, pairs, tmp_path / "reference"))
    for piece in (3, 30, 1000):
        monkeypatch.setattr(emission, "PIECE", piece)
        assert content(run({"real": real}, pairs, tmp_path / f"piece{piece}")) == reference


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(pairs, tmp_path, monkeypatch):
    """`mmkd emit` with fake teachers for any weights that are called `there`."""

    def load(name, weights, backend):
        if weights != "there":
            raise InputError(f"teacher {name}: {weights} does not exist")
        return fakes()[name]

    monkeypatch.setattr(teachers, "load", load)

    def call(*arguments):
        return cli.main(["emit", "--pairs", str(pairs.path), "--out", str(tmp_path / "out"), *arguments])

    return call


def test_command(command, pairs, tmp_path):
    assert command("--teacher", "alpha=there", "beta=there", "--teacher", "gamma=there", "--rows", "train") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["alpha", "beta", "gamma"]
    features = FeatureSet.open(tmp_path / "out" / "beta", pairs)
    assert (features.views, features.manifest["dtype"], features.manifest["present"]) == (1, "bfloat16", 30)
    assert features.policy == ViewPolicy(scale=(0.9, 1.0), seed=0)
    assert features.manifest["logit_scale"] == 20.0
    assert command("--teacher", "alpha=there", "--rows", "train", "--views", "2") == 2  # others are there already


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--teacher"),
        (["--teacher", "alpha"], "must be NAME=WEIGHTS"),
        (["--teacher", "=there"], "must be NAME=WEIGHTS"),
        (["--teacher", "alpha="], "must be NAME=WEIGHTS"),
        (["--teacher", "alpha=there", "--teacher", "alpha=there"], "alpha is given twice"),
        (["--teacher", "../alpha=there"], "cannot be the name of a folder"),
        (["--teacher", "..=there"], "cannot be the name of a folder"),
        (["--teacher", "alpha=nowhere"], "nowhere does not exist"),
        (["--teacher", "alpha=there", "--views", "0"], "--views must be at least 1, not 0"),
        (["--teacher", "alpha=there", "--views", "2", "--center"], "leave one out"),
        (["--teacher", "alpha=there", "--views", "two"], "invalid int value: 'two'"),
        (["--teacher", "alpha=there", "--scale", "0.9", "0.5"], "is not (low, high)"),
        (["--teacher", "alpha=there", "--rows", "trian"], "did you mean 'train'"),
        (["--teacher", "alpha=there", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(command, tmp_path, capsys, arguments, says):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_weights_may_hold_an_equals_sign():
    assert cli.named_weights(["a=x=y", "b=z"]) == {"a": "x=y", "b": "z"}
