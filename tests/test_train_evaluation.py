"""Evaluations inside training: the numbers of `mmkd eval`, the same after a restart, while training stays the same."""

import os
import pathlib

import data_fixtures as toy
import numpy as np
import processes
import pytest
import train_fixtures as tiny
from test_start import SMALL
from test_train import parameters

from mmkd_jax import api
from mmkd_jax.errors import InputError
from mmkd_jax.evals import base
from mmkd_jax.train import checkpoint, evaluation, loop, metrics, setup

pytestmark = pytest.mark.usefixtures("quick_compilation")
AUC = "eval/toy/zeroshot/macro_auc"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A set of its own: two classified sources and a retrieved one."""
    path = tmp_path_factory.mktemp("judged") / "pairs"
    rows = {"toy.test": [row for row in range(40) if row % 5], "other.val": [row for row in range(40) if row % 5 == 0]}
    return toy.make_pairs(path, rows=rows)


@pytest.fixture(scope="module")
def judged(tmp_path_factory, pairs):
    """Four steps, judged after the second and the fourth."""
    return loop.run(config(pairs), tmp_path_factory.mktemp("run") / "judged")


def config(pairs, *more):
    words = (f"--config.evaluation.pairs={pairs.path}", "--config.evaluation.every=2", "--config.keep=4")
    return tiny.stage1(*SMALL, *words, "--config.optimizer.warmup=0", *more)


def numbers(workdir) -> dict[int, dict[str, float]]:
    """What evaluations gave, by step."""
    lines = {line["step"]: {k: v for k, v in line.items() if k.startswith("eval/")} for line in metrics.read(workdir)}
    return {step: found for step, found in lines.items() if found}


def lines(workdir):
    timed = ("pairs_per_second", "evaluation_seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in metrics.read(workdir)]


def of_checkpoint(workdir, step, pairs, folder):
    """The same by `mmkd eval` of a checkpoint."""
    student = api.load(pathlib.Path(workdir) / "checkpoints" / str(step))
    rows = base.run(student, pairs, base.sets_of(pairs), folder, tasks=("zeroshot", "retrieval"), bootstrap=20)
    return {f"eval/{r['dataset']}/{r['task']}/{r['metric']}": r["value"] for r in rows}


def test_the_numbers_are_those_of_mmkd_eval(judged, pairs, tmp_path):
    found = numbers(judged)
    assert list(found) == [2, 4]
    for step, values in found.items():
        assert values == of_checkpoint(judged, step, pairs, tmp_path)
        assert {name.split("/")[1] for name in values} == {"toy", "other"}
    assert found[2] != found[4]
    assert not (judged / "predictions").exists()
    assert all(line["evaluation_seconds"] > 0 for line in metrics.read(judged) if line["step"] in found)


def test_it_may_judge_on_rows_of_another_split(pairs):
    def asked(split, name):
        told = config(pairs, f"--config.evaluation.split={split}", f"--config.evaluation.sets=('{name}',)")
        return evaluation.Evaluation(told, setup.build(told))

    assert asked("test", "toy.test").due(2)
    with pytest.raises(InputError, match=r"no evaluation set .toy.; did you mean .toy\.test."):
        asked("test", "toy")
    with pytest.raises(InputError, match="no source has rows of a split 'tset' to be judged on; did you mean 'test'"):
        asked("tset", "toy.test")


def test_training_is_the_same_without(judged, pairs, tmp_path):
    plain = loop.run(config(pairs, "--config.evaluation.every=0"), tmp_path / "plain")
    assert not numbers(plain)
    stripped = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in lines(judged)]
    assert stripped == lines(plain)
    mine, theirs = parameters(judged), parameters(plain)
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("when", ["in the evaluation", "after it"])
def test_stopped_and_started_again_the_numbers_are_the_same(judged, pairs, tmp_path, monkeypatch, when):
    real, calls = base.one_by_one, []

    def stops(*args, **options):
        calls.append(args)
        if len(calls) == 2 and when == "in the evaluation":
            raise KeyboardInterrupt
        yield from real(*args, **options)
        if len(calls) == 1 and when == "after it":
            raise KeyboardInterrupt

    monkeypatch.setattr(base, "one_by_one", stops)
    with pytest.raises(KeyboardInterrupt):
        loop.run(config(pairs), tmp_path / "run")
    monkeypatch.undo()
    assert len(numbers(tmp_path / "run")) < 2
    loop.run(config(pairs), tmp_path / "run")
    assert lines(tmp_path / "run") == lines(judged)


def test_what_is_not_logged_otherwise_is_where_it_is_judged(judged, pairs, tmp_path, monkeypatch):
    """At the end too, whatever the interval; and a run that goes on may be judged otherwise."""
    run = tmp_path / "run"
    words = ("--config.evaluation.every=3", "--config.evaluation.tasks=('retrieval',)", "--config.log_every=9")
    monkeypatch.setattr(metrics.MetricsLog, "write", _interrupting)
    with pytest.raises(KeyboardInterrupt):
        loop.run(config(pairs), run)
    monkeypatch.undo()
    loop.run(config(pairs, *words), run)
    assert [line["step"] for line in metrics.read(run)] == [3, 4]
    assert {name.split("/")[2] for name in numbers(run)[3]} == {"retrieval"}
    assert numbers(run)[4].items() < numbers(judged)[4].items()


def _interrupting(*args):
    raise KeyboardInterrupt


def test_the_best_by_an_evaluation_stays(pairs, tmp_path):
    best = f"--config.best=max:{AUC}"
    words = (best, "--config.steps=3", "--config.save_every=1", "--config.keep=1", "--config.evaluation.every=1")
    run = loop.run(config(pairs, *words, "--config.optimizer.lr=0.05"), tmp_path / "run")
    values = {step: found[AUC] for step, found in numbers(run).items()}
    assert len(set(values.values())) > 1
    wanted = max(values, key=lambda step: (values[step], step))
    saver = checkpoint.Checkpoints(run, best=f"max:{AUC}")
    assert saver.steps() == sorted({wanted, 3})
    saver.close()
    assert of_checkpoint(run, wanted, pairs, tmp_path / "out")[AUC] == max(values.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.evaluation.every=-1"], "must be 0 (never) or a number of steps"),
        (["--config.evaluation.sets=('toys',)"], "did you mean 'toy'"),
        (["--config.evaluation.sets=('other',)", "--config.evaluation.tasks=('zeroshot',)"], "applies to other"),
        (["--config.evaluation.tasks=('zero',)"], "did you mean 'zeroshot'"),
        (["--config.evaluation.pairs=nowhere"], "holds no finished set of pairs"),
        (["--config.evaluation.pairs="], "no test rows with classes"),  # those trained on: none are tested on
        ([f"--config.best=max:{AUC}", "--config.save_every=3"], "must be a multiple of evaluation.every"),
        ([f"--config.best=max:{AUC}", "--config.evaluation.every=0"], "needs an evaluation at every"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_run(pairs, tmp_path, words, message):
    with pytest.raises(InputError) as error:
        loop.run(config(pairs, *words), tmp_path / "run")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_best_that_no_evaluation_gives_is_refused_at_the_first(pairs, tmp_path):
    with pytest.raises(InputError, match=f"did you mean '{AUC}'"):
        loop.run(config(pairs, f"--config.best=max:{AUC}s"), tmp_path / "run")


def test_divided_parameters_are_judged_whole(pairs, tmp_path):
    words = ("--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.unsharded=1.0", "--config.steps=2")
    run = loop.run(config(pairs, *words), tmp_path / "run")
    assert numbers(run)[2] == of_checkpoint(run, 2, pairs, tmp_path / "out")


PROGRAM = "import sys; from mmkd_jax import cli; sys.exit(cli.main(sys.argv[1:]))"


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_two_processes_judge_as_one(pairs, tmp_path):
    """Each encodes half; the numbers are those of one process with the checkpoint that both saved."""
    changes = [
        "--config.mesh.fsdp=2", "--config.unsharded=1.0", "--config.steps=2", "--config.optimizer.warmup=0",
        "--config.evaluation.every=1", f"--config.evaluation.pairs={pairs.path}", "--config.save_every=1",
    ]  # fmt: skip
    words = ["train", "--config", f"{tiny.CONFIGS}/stage1_clip.py:smoke", "--workdir", str(tmp_path / "run")]
    environ = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": os.fspath(pathlib.Path(__file__).parents[1])}
    processes.succeed(processes.together(["-c", PROGRAM, *words, *tiny.overrides(*changes)], 2, 2, **environ))
    found = numbers(tmp_path / "run")
    assert list(found) == [1, 2]
    for step, values in found.items():
        assert values == of_checkpoint(tmp_path / "run", step, pairs, tmp_path / "out")
