"""`mmkd bench encode`: both backends run the same towers turn by turn, and what is printed follows from their times."""

import sys

import model_references as ref  # noqa: F401  (skips where the reference libraries are missing)
import pytest

from mmkd_jax import cli, timing
from teachers import specs, speed
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
        ([], "the following arguments are required: encode"),
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


def test_without_torch_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["bench", "encode"]) == 2
    assert "pip install torch" in capsys.readouterr().err
