"""Stopped in every way that happens, and started again, a run ends bit for bit like one that nothing disturbed."""

import contextlib
import os
import shutil
import signal
import subprocess

import numpy as np
import processes
import pytest
import train_fixtures as tiny
from test_train import assert_same

from mmkd_jax.data.batches import Batches
from mmkd_jax.errors import EXIT_PREEMPTED
from mmkd_jax.models import constraints
from mmkd_jax.train import checkpoint, loop, sharding
from mmkd_jax.train.commits import COMMIT
from mmkd_jax.train.preemption import Notice, Preempted

STEPS, EVERY = 30, 5
CHANGES = (
    "--config.model.image.layers=1",
    "--config.model.text.layers=1",
    f"--config.steps={STEPS}",
    f"--config.save_every={EVERY}",
)


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture(scope="module", autouse=True)
def programs_are_made_once(quick_compilation):
    """A restart in the same process takes the step that the first start traced: a function of the config alone."""
    made, real = {}, constraints.under
    with pytest.MonkeyPatch.context() as patch:
        for module in (constraints, sharding):
            patch.setattr(module, "under", lambda mesh, f: made.setdefault(f.__name__, real(mesh, f)))
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, programs_are_made_once):
    return loop.run(tiny.stage1(*CHANGES), tmp_path_factory.mktemp("run") / "run")


class Faults:
    """Stops the run in this process once, in the step asked for, and counts the steps that are made."""

    ENDS = {"sigterm": Preempted, "kill": Killed, "write": Killed, "worker": ZeroDivisionError}  # noqa: RUF012

    def __init__(self, monkeypatch):
        self.made, self.step, self.kind, self.at = 0, 0, "", 0
        batch, place, save = Batches.batch, loop.sharding.global_batch, checkpoint.Checkpoints.save
        monkeypatch.setattr(Batches, "batch", lambda this, step: self._in_worker(step) or batch(this, step))
        monkeypatch.setattr(loop.sharding, "global_batch", lambda *args: self._in_loop() or place(*args))
        monkeypatch.setattr(checkpoint.Checkpoints, "save", lambda this, *args: save(this, *args) or self._in_save())

    def run(self, workdir, start, kind="", at=0):
        """Runs until `kind` happens in step `at`, or in the first save from there on; returns the last step saved."""
        self.kind, self.at, self.step = kind, at, start
        with pytest.raises(self.ENDS[kind]) if kind else contextlib.nullcontext():
            loop.run(tiny.stage1(*CHANGES), workdir)
        if kind == "write":
            self._half_written(workdir / "checkpoints" / str(self.step))
        return max((int(path.parent.name) for path in workdir.glob(f"checkpoints/*/{COMMIT}")), default=0)

    def _in_loop(self):
        self.step += 1
        self.made += 1
        if self.step == self.at and self.kind == "sigterm":
            signal.raise_signal(signal.SIGTERM)
        if self.step == self.at and self.kind == "kill":
            raise Killed

    def _in_worker(self, step):
        if step + 1 == self.at and self.kind == "worker":
            raise ZeroDivisionError

    def _in_save(self):
        if self.kind == "write" and self.step >= self.at:
            raise Killed

    @staticmethod
    def _half_written(folder):
        """What a kill during the write leaves: some of the files, and not the mark that is written last."""
        (folder / COMMIT).unlink()
        files = sorted(path for path in (folder / "state").rglob("*") if path.is_file())
        for path in files[len(files) // 2 :]:
            path.unlink()


def test_ten_faults_at_random_moments_leave_no_trace(undisturbed, tmp_path, monkeypatch, capsys):
    rng, faults, workdir, saved = np.random.default_rng(4), Faults(monkeypatch), tmp_path / "run", 0
    kinds = [*("sigterm", "kill", "write", "worker") * 2, "sigterm", "sigterm"]
    tried = []
    for kind in rng.permutation(kinds):
        at = saved + int(rng.integers(1, 6))
        saved = faults.run(workdir, saved, kind, at)
        tried.append((str(kind), at, saved))
        assert saved < STEPS - EVERY, tried
    faults.run(workdir, saved)
    assert_same(workdir, undisturbed)
    assert {kind for kind, *_ in tried} == {"sigterm", "kill", "write", "worker"}
    assert all(at == after for kind, at, after in tried if kind == "sigterm")  # nothing lost when there is a warning
    with capsys.disabled():
        print(f"\n{len(tried)} faults, {STEPS} steps, {faults.made - STEPS} made again: {tried}")


def test_sigterm_saves_the_step_it_came_in_and_leaves(undisturbed, tmp_path, monkeypatch, capfd):
    before, faults, workdir = signal.getsignal(signal.SIGTERM), Faults(monkeypatch), tmp_path / "run"
    assert faults.run(workdir, 0, "sigterm", STEPS - 2) == STEPS - 2
    assert f"saving step {STEPS - 2}\nstage1: leaving on SIGTERM" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    shutil.copytree(workdir, tmp_path / "other")
    with monkeypatch.context() as patch:  # the comparison sees another batch in one step
        real = Batches.batch
        patch.setattr(Batches, "batch", lambda this, step: real(this, step - 1))
        faults.run(tmp_path / "other", STEPS - 2)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "other", undisturbed)
    faults.made = faults.at = 0
    faults.run(workdir, STEPS - 2)
    assert faults.made == 2  # nothing is done twice
    assert_same(workdir, undisturbed)


def test_sigterm_in_the_last_step_ends_the_run_as_finished(undisturbed, tmp_path, monkeypatch):
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    faults = Faults(monkeypatch)
    faults.kind, faults.at, faults.step = "sigterm", STEPS, STEPS - EVERY
    loop.run(tiny.stage1(*CHANGES), tmp_path / "run")
    assert faults.made == EVERY
    assert_same(tmp_path / "run", undisturbed)


def test_a_notice_is_heard_only_while_one_listens():
    with Notice() as notice:
        assert not notice.reached(1)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # schedulers repeat it
        assert notice.reached(2)
    with Notice() as notice:
        assert not notice.reached(1)
    assert Preempted(3).code == EXIT_PREEMPTED


# Real processes. The program dies by its own SIGKILL where it is asked to: FAULT is a kind and a step.
PROGRAM = """
import os, signal, sys
from mmkd_jax import cli
from mmkd_jax.data.batches import Batches
from orbax.checkpoint._src.path import atomicity

kind, _, at = os.environ.get("FAULT", "").partition(":")
batch = Batches.batch

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dies(self, step):
    return die() if step == int(at) else batch(self, step)

async def half(self, *args, **kwargs):
    if self._final_path.name == at or self._final_path.parent.name == at:
        die()
    return await finalize(self, *args, **kwargs)

def fails(self, step):
    raise OSError("the disk is gone")

if kind == "worker":
    Batches.batch = dies
if kind == "error":
    Batches.batch = lambda self, step: (fails if step == int(at) else batch)(self, step)
if kind == "write":
    finalize = atomicity.CommitFileTemporaryPath.finalize
    atomicity.CommitFileTemporaryPath.finalize = half
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    processes.kill_all()


def launch(workdir, *changes, fault="", **environ):
    command = ["train", "--config", f"{tiny.CONFIGS}/stage1_clip.py:smoke", "--workdir", str(workdir)]
    environ = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tiny.world() / "compiled"), "FAULT": fault, **environ}
    words = ["-c", PROGRAM, *command, *tiny.overrides(*changes)]
    return processes.start(words, env=environ, stderr=subprocess.PIPE, text=True)


def wait_for(process, step):
    """Returns what the run has said when it has come to save `step`, or has ended."""
    said = ""
    while f"saving step {step}\n" not in said and (line := process.stderr.readline()):
        said += line
    return said


def ended(process, said=""):
    """Exit code, and all that it said."""
    try:
        _, rest = process.communicate(timeout=600)
    finally:
        process.kill()
    return process.returncode, said + rest


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_real_signals_leave_no_trace(tmp_path):
    assert ended(launch(tmp_path / "whole", *CHANGES))[0] == 0
    workdir = tmp_path / "run"
    for fault in ("sigterm:5", "write:10", "worker:13", "sigkill:15", "sigterm:20", "write:25"):
        kind, _, step = fault.partition(":")
        process, said = launch(workdir, *CHANGES, fault=fault), ""
        if kind.startswith("sig"):
            said = wait_for(process, step)
            process.send_signal(signal.SIGTERM if kind == "sigterm" else signal.SIGKILL)
        code, complaint = ended(process, said)
        assert code == (EXIT_PREEMPTED if kind == "sigterm" else -signal.SIGKILL), (fault, complaint[-2000:])
    assert ended(launch(workdir, *CHANGES))[0] == 0
    assert_same(workdir, tmp_path / "whole")


def pair(workdir, *changes, fault=""):
    """Two processes of one run; `fault` is the second's."""
    environ = {
        "JAX_COORDINATOR_ADDRESS": processes.free_address(),
        "JAX_NUM_PROCESSES": "2",
        "MMKD_HEARTBEAT_SECONDS": "10",
        **processes.ALIKE,
    }
    environ["XLA_FLAGS"] = processes.with_devices(2)
    faults = ("", fault)
    return [launch(workdir, *changes, **environ, fault=faults[i], JAX_PROCESS_ID=str(i)) for i in range(2)]


@pytest.fixture(scope="module")
def long_pair(tmp_path_factory):
    """An undisturbed run of two processes, long enough for a signal to be agreed on."""
    changes = (*CHANGES, "--config.steps=400", "--config.save_every=50")
    workdir = tmp_path_factory.mktemp("pair") / "run"
    for code, complaint in map(ended, pair(workdir, *changes)):
        assert code == 0, complaint[-2000:]
    return changes, workdir


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_two_processes_agree_on_the_step_when_one_is_told_to_leave(long_pair, tmp_path):
    changes, whole = long_pair
    both = pair(tmp_path / "run", *changes)
    wait_for(both[1], 50)
    both[1].send_signal(signal.SIGTERM)
    ends = [ended(process) for process in both]
    assert [code for code, _ in ends] == [EXIT_PREEMPTED] * 2, [text[-2000:] for _, text in ends]
    said = [[line for line in text.splitlines() if "saving step" in line][-1] for _, text in ends]
    assert said[0] == said[1]
    assert 50 < int(said[0].split()[-1]) < 400
    for code, complaint in map(ended, pair(tmp_path / "run", *changes)):
        assert code == 0, complaint[-2000:]
    assert_same(tmp_path / "run", whole)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("index", "fault"), [(0, ""), (1, ""), (1, "error:90")])
def test_a_dead_peer_ends_the_other_with_a_stack_and_the_same_command_goes_on(long_pair, tmp_path, index, fault):
    changes, whole = long_pair
    both = pair(tmp_path / "run", *changes, fault=fault)
    said = [wait_for(process, 50) for process in both]
    if not fault:
        both[index].send_signal(signal.SIGKILL)
    ends = [ended(*one) for one in zip(both, said)]
    code, complaint = ends[index]
    assert code == (1 if fault else -signal.SIGKILL)
    assert not fault or "OSError: the disk is gone" in complaint
    code, complaint = ends[1 - index]
    assert code not in (0, EXIT_PREEMPTED)
    assert "saving step 50" in complaint
    assert "Traceback" in complaint or "most recent call first" in complaint, complaint[-3000:]
    for code, complaint in map(ended, pair(tmp_path / "run", *changes)):
        assert code == 0, complaint[-2000:]
    assert_same(tmp_path / "run", whole)
