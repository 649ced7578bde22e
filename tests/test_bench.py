"""`mmkd bench`: both backends do the same turn by turn, what is printed follows from it; what storing costs."""

import statistics
import sys
import time

import model_references as ref  # noqa: F401  (skips where the reference libraries are missing)
import numpy as np
import pytest

from mmkd_jax import cli, io, timing
from mmkd_jax.data.feature_blocks import Blocks
from mmkd_jax.data.features import FeatureSet
from teachers import costs, emit_speed, specs, speed
from teachers.verify import TOLERANCE

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_calls_take_turns_and_the_first_is_not_counted(monkeypatch):
    """A clock that each call moves on by its own number of seconds."""
    clock, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call(name, first, later):
        def run():
            clock[0] += later if name in order else first
            order.append(name)

        return run

    seconds = timing.interleaved({"a": call("a", 100.0, 1.0), "b": call("b", 200.0, 2.0)}, 3)
    assert seconds == {"a": [1.0, 1.0, 1.0], "b": [2.0, 2.0, 2.0]}
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


def test_spread_is_median_least_and_largest():
    assert timing.spread([3.0, 1.0, 200.04]) == "3 (1-200)"


def test_ratios_are_of_the_same_round():
    one = speed.Speed("x", "image", (2.0, 40.0, 9.0), (1.0, 10.0, 3.0), 1e-6)
    assert one.ratios == [2.0, 4.0, 3.0]
    assert one.ratio == 3.0
    assert str(one).split() == ["x", "image", "9", "(2-40)", "3", "(1-10)", "3", "(2-4)", "1e-06"]
    assert speed.HEADER.index("torch /s") == str(one).index("3 (1-10)")


def test_a_teacher_of_each_family_is_measured_by_default():
    facts = [specs.find(name).spec for name in speed.FAMILIES]
    every = [specs.find(name) for name in specs.TEACHERS]
    towers = {(one.spec.image.layout, one.spec.text.kind, one.layout) for one in every}
    measured = {(spec.image.layout, spec.text.kind, specs.find(spec.name).layout) for spec in facts}
    assert measured == towers


@pytest.mark.parametrize("name", speed.FAMILIES)
def test_small_towers_are_of_the_same_kind(name):
    spec = specs.find(name).spec
    small = speed.shrunk(spec)
    assert (small.image.layout, small.image.kind) == (spec.image.layout, spec.image.kind)
    kept = ("kind", "activation", "norm_epsilon", "projection", "pooling", "padding")
    assert all(getattr(small.text, field) == getattr(spec.text, field) for field in kept)
    text = speed.texts(small, 50)
    lengths = text.mask.sum(1)
    assert (lengths.min(), lengths.max()) == (10, 39)
    assert all(row[n - 1] == small.text.vocab_size - 1 == row.max() for row, n in zip(text.ids, lengths, strict=True))


def test_both_backends_are_measured_on_the_same_function(capsys):
    assert cli.main(["bench", "encode", "--teachers", "PLIP", "--small", "--batch", "2", "--rounds", "2"]) == 0
    setting, machine, header, *lines = capsys.readouterr().out.splitlines()
    assert setting.startswith("float32, batches of 2, 2 rounds")
    assert "jax " in machine
    assert "torch " in machine
    assert header == speed.HEADER
    assert [line.split()[:2] for line in lines] == [["PLIP", "image"], ["PLIP", "text"]]
    assert all(0 < float(line.split()[-1]) <= TOLERANCE for line in lines)


@pytest.mark.full
@pytest.mark.parametrize("name", speed.FAMILIES)
def test_every_family_is_measured(name):
    for one in speed.measure([name], batch=3, rounds=2, small=True):
        assert len(one.flax) == len(one.torch) == 2
        assert min(one.flax + one.torch) > 0
        assert one.difference <= TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: encode|emit|host"),
        (["emit", "--rows", "0"], "--rows must be at least 1, not 0"),
        (["emit", "--teachers", "PLIP", "PLIPP"], "did you mean 'PLIP'"),
        (["emit", "--rounds", "1", "--teachers", "PLIP=nowhere"], "does not exist"),
        (["host", "--rows", "1023"], "--rows must be at least 1024, not 1023"),
        (["encode", "--batch", "0"], "--batch must be at least 1, not 0"),
        (["encode", "--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["encode", "--teachers", "PLIPP"], "did you mean 'PLIP'"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, says):
    assert cli.main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("verb", ["encode", "emit"])
def test_without_torch_it_says_what_to_install(capsys, monkeypatch, verb):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["bench", verb]) == 2
    assert "pip install torch" in capsys.readouterr().err


# --- whole emissions ---------------------------------------------------------------------------------------------


def test_what_is_left_of_an_emission_is_the_hosts_own():
    flax = emit_speed.Parts((0.5, 0.25), (0.05, 0.05), (0.1, 0.1), (0.3, 0.05))
    torch = emit_speed.Parts((1.0, 0.125), (0.05, 0.05), (0.1, 0.01), (0.4, 0.05))
    one = emit_speed.EmitSpeed("x", flax, torch)
    assert flax.host == pytest.approx((0.05, 0.05))
    assert one.ratios == [2.0, 0.5]
    cells = str(one).split()
    assert cells[:7] == ["x", "3", "(2-4)", "4.5", "(1-8)", "1.25", "(0.5-2)"]
    assert cells[7:] == ["50", "|", "50", "100", "|", "55", "175", "|", "225", "50", "|", "232"]
    assert [emit_speed.HEADER.index(word) for word in ("torch pairs/s", "decode")] == [45, 93]


def test_emissions_of_both_backends_are_measured(capsys):
    arguments = ["--teachers", "PLIP", "--small", "--batch", "4", "--rounds", "2", "--rows", "8"]
    assert cli.main(["bench", "emit", *arguments]) == 0
    captured = capsys.readouterr()
    *_, header, line = captured.out.splitlines()
    assert header == emit_speed.HEADER
    numbers = [float(cell) for cell in line.replace("|", " ").split()[1:] if "(" not in cell]
    assert len(numbers) == 3 + 8
    assert min(numbers) > 0
    assert captured.err == ""


# --- what emission costs beside its teachers ---------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """Two blocks of pairs, whose features nine instant teachers have stored."""
    pairs = costs.tiny_pairs(tmp_path / "pairs", 2 * costs.BATCH)
    costs.storing(pairs, tmp_path / "features")
    return pairs, tmp_path / "features"


def work(seconds: float) -> None:
    """Keeps the processor busy."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_nine_sets_are_stored_and_whole(stored):
    pairs, folder = stored
    found = [FeatureSet.open(folder / f"teacher{i}", pairs) for i in range(9)]
    assert sorted(one.width for one in found) == [512] * 7 + [768] * 2
    found[8].verify()


def test_storing_counts_what_the_host_does_and_not_what_teachers_do(stored, tmp_path, monkeypatch):
    """A second spent anywhere in storing is 1e6 / 512 / 9 ms of 1,000 pairs and teacher; in a teacher, nothing."""
    pairs, _ = stored
    sha256_file, second = io.sha256_file, 1e6 / len(pairs) / 9
    for name in ("preprocess", "encode_image", "encode_text"):
        own = getattr(costs.Instant, name)
        worked = []

        def slow(self, x, own=own, worked=worked):
            worked or work(2.0)
            worked.append(1)
            return own(self, x)

        monkeypatch.setattr(costs.Instant, name, slow)
    assert costs.storing(pairs, tmp_path / "slow teachers") < 4 * second  # of the six that teachers took
    monkeypatch.undo()
    monkeypatch.setattr(io, "sha256_file", lambda file: work(0.5) or sha256_file(file))
    assert costs.storing(pairs, tmp_path / "slow hash") >= 4.5 * second


def test_reading_counts_every_set_and_nothing_else(stored, monkeypatch):
    pairs, folder = stored
    places = Blocks.places
    monkeypatch.setattr(Blocks, "places", lambda self, wanted: work(0.02) or places(self, wanted))
    assert costs.reading(pairs, folder) >= 1e6 * 0.02 * 9 * 2 / len(pairs)
    monkeypatch.undo()
    monkeypatch.setattr(costs, "_no_tokens", lambda texts, own=costs._no_tokens: work(0.002) or own(texts))
    assert costs.reading(pairs, folder) < 1e6 * 0.002


def slowdown() -> float:
    """How many times its least the processor takes for the same work now: others use its caches and its other half."""
    x, seconds = np.random.default_rng(0).normal(size=(256, 768)), []
    for _ in range(200):
        begin = time.thread_time()
        np.einsum("ij,ik->jk", x[:, :64], x, optimize=True).astype(np.float32)
        x.copy()
        seconds.append(time.thread_time() - begin)
    return statistics.median(seconds) / min(seconds)


@pytest.mark.full
def test_storing_and_reading_cost_no_more_than_they_may():
    """50 ms for 1,000 pairs and teacher, and 15 ms for 1,000 pairs, where nobody else is at work.

    Elsewhere the processor's own seconds grow with what others do to its caches; the bounds grow by as much as those of
    a fixed piece of work.
    """
    before = slowdown()
    found = costs.measure(4096, 5)
    factor = (before + slowdown()) / 2
    assert min(found.storing) <= 50 * factor, found
    assert min(found.reading) <= 15 * factor, found
