"""The babysitter: a slice that is lost, a job that is preempted, limits, back-off; on a clock of its own."""

import importlib.machinery
import importlib.util
import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = ["pod", "--type=v5litepod-8", "--zone=z", "--poll=10", "--", "mmkd", "train"]

# A slice of two workers whose commands run here. The state of the slice is a file; so are the workers' homes.
GCLOUD = r"""
cd "$FAKE"
echo "$*" >>calls
case $* in
  *"queued-resources create"*) echo ACTIVE >state ;;
  *"queued-resources delete"*) rm -rf state home-* ;;
  *"queued-resources describe"*)
    [ -f state ] || { echo "NOT_FOUND: Resource 'locations/z/queuedResources/$5' was not found" >&2; exit 1; }
    cat state ;;
  *"tpu-vm scp"*) mkdir -p home-0 home-1 ;;
  *"tpu-vm ssh"*)
    [ "$(cat state)" = ACTIVE ] || { echo "ssh: connection refused" >&2; exit 255; }
    for worker in 0 1; do
      for word in "$@"; do
        case $word in
          *setup.sh*) mkdir -p home-$worker/mmkd_jax ;;
          --command=*) HOME=$FAKE/home-$worker WORKER=$worker bash -c "${word#*=}; wait" ;;
        esac
      done
    done ;;
esac
"""
# The job: what its attempt number says in `plan`, a word an attempt: an exit code, or `lost` with the slice.
JOB = r"""
if [ "$WORKER" = 0 ]; then
  printf '%s\n' "$@" >>"$FAKE/words"
  now=$(head -n 1 "$FAKE/plan"); sed -i 1d "$FAKE/plan"; echo "$now" >"$FAKE/now"
fi
now=$(cat "$FAKE/now")
[ "$now" != lost ] || { echo SUSPENDED >"$FAKE/state"; exit 137; }
exit "$now"
"""


def load():
    """The script as a module."""
    loader = importlib.machinery.SourceFileLoader("babysit", str(ROOT / "launch" / "babysit"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("babysit", loader))
    loader.exec_module(module)
    return module


babysit = load()


class Clock:
    """Time that passes when it is slept through."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def __call__(self) -> float:
        return self.now

    @property
    def waits(self) -> list[float]:
        """Of the back-off, not of the looks between."""
        return [seconds for seconds in self.slept if seconds >= babysit.SHORTEST]


class Slice:
    """Stands in for `call`: a script of states, a scripted job, and a list of what was asked for."""

    def __init__(self, jobs=(), create: int = 0, clock=None, lasts: float = 0):
        self.jobs, self.create, self.verbs = list(jobs), create, []
        self.state, self.job, self.clock, self.lasts = "ABSENT", "none", clock, lasts

    def __call__(self, verb: str, *words: str) -> tuple[int, str]:
        self.verbs.append(verb)
        if verb == "state":
            return 0, f"{self.state}\n"
        if verb == "create":
            self.state, self.job = ("ABSENT" if self.create else "ACTIVE"), "none"
            return self.create, ""
        if verb == "run":
            self.job = self.jobs.pop(0)
            if self.clock:
                self.clock.now += self.lasts
            if self.job == "slice":
                self.state = "SUSPENDED"
        if verb == "status":
            return (0, f"pod: ACTIVE\nmmkd-job w-0 {self.job}\nmmkd-job w-1 {self.job}\n")
        return 0, ""


def watch(slice_, *more: str) -> tuple[int, Clock]:
    """The exit code of a watch, and its clock."""
    clock = slice_.clock or Clock()
    return babysit.main([*more, *WORDS], slice_, clock.sleep, clock), clock


# --- through tpu.sh and a gcloud --------------------------------------------------------------------------------------


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A function: a fake gcloud and a job with this plan; gives the folder with their traces."""

    def make(*plan: str) -> pathlib.Path:
        folder = tmp_path / "cloud"
        (folder / "bin").mkdir(parents=True)
        for name, text in {"gcloud": GCLOUD, "mmkd": JOB}.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (folder / "bin" / name).chmod(0o755)
        (folder / "plan").write_text("\n".join(plan) + "\n")
        monkeypatch.setenv("FAKE", str(folder))
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        return folder

    return make


def test_a_slice_that_is_lost_twice_is_survived(cloud):
    """And so is a preemption; each attempt gets the words as they were given."""
    odd = '--config.name=it\'s a "name" of $HOME *'
    folder, clock = cloud("lost", "75", "lost", "0"), Clock()
    assert babysit.main([*WORDS, odd, "a  b"], sleep=clock.sleep, clock=clock) == 0
    calls = (folder / "calls").read_text().splitlines()
    assert sum("queued-resources create" in line for line in calls) == 3
    assert sum("queued-resources delete" in line for line in calls) == 2
    assert (folder / "words").read_text() == f"train\n{odd}\na  b\n" * 4
    assert clock.waits == [60, 120, 240]
    assert (folder / "home-0/mmkd-job/exit").read_text() == "0\n"


def test_it_stops_at_its_limit(cloud):
    folder, clock = cloud(*["lost"] * 9), Clock()
    assert babysit.main(["--limit=2", *WORDS], sleep=clock.sleep, clock=clock) == babysit.STOPPED
    assert sum("queued-resources create" in line for line in (folder / "calls").read_text().splitlines()) == 3
    assert clock.waits == [60, 120]
    assert len((folder / "plan").read_text().split()) == 9 - 3


# --- alone ------------------------------------------------------------------------------------------------------------


def test_the_wait_doubles_up_to_an_hour_and_starts_again_after_a_good_run():
    _, clock = watch(Slice(jobs=["exit 75"] * 20), "--limit=9")
    assert clock.waits == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    clock = Clock()
    code, _ = watch(Slice(jobs=["exit 75"] * 4 + ["exit 0"], clock=clock, lasts=babysit.GOOD_RUN))
    assert code == 0
    assert clock.waits == [60] * 4
    assert watch(Slice(jobs=["exit 75"] * 20), "--limit=0")[0] == babysit.STOPPED


@pytest.mark.parametrize(("job", "code"), [("exit 2", 2), ("exit 1", 1), ("exit 139", 139)])
def test_a_job_that_fails_by_itself_is_not_run_again(job, code):
    slice_ = Slice(jobs=[job])
    assert watch(slice_)[0] == code
    assert slice_.verbs.count("run") == 1


@pytest.mark.parametrize("job", ["exit 75", "exit 76", "lost"])
def test_a_job_that_was_preempted_hung_or_lost_is_run_again_on_the_slice(job):
    slice_ = Slice(jobs=[job, "exit 0"])
    assert watch(slice_)[0] == 0
    assert (slice_.verbs.count("create"), slice_.verbs.count("setup"), slice_.verbs.count("run")) == (1, 1, 2)


def test_a_job_that_dies_with_its_slice_is_no_failure_of_its_own():
    """The workers abort first, and the slice is suspended a moment later."""
    slice_ = Slice(jobs=["exit 134", "exit 0"])

    def call(verb, *words):
        if verb == "status" and slice_.job == "exit 134":
            slice_.state = "SUSPENDED"
        return slice_(verb, *words)

    clock = Clock()
    assert babysit.main(WORDS, call, clock.sleep, clock) == 0
    assert slice_.verbs.count("create") == 2


def test_a_refusal_at_the_start_ends_the_watch_and_a_later_one_does_not():
    assert watch(Slice(create=5))[0] == 5
    slice_, refused = Slice(jobs=["slice", "exit 0"]), []

    def call(verb, *words):
        if verb == "create" and slice_.verbs.count("run") == 1 and not refused:
            refused.append(slice_.verbs.append(verb))
            slice_.state = "ABSENT"
            return 1, ""
        return slice_(verb, *words)

    clock = Clock()
    assert babysit.main(WORDS, call, clock.sleep, clock) == 0
    assert refused
    assert clock.waits == [60, 120]


def test_a_watch_that_is_started_again_finds_the_job(capsys):
    slice_ = Slice()
    slice_.state, slice_.job = "ACTIVE", "exit 0"
    assert watch(slice_, "--delete")[0] == 0
    assert slice_.verbs == ["state", "status", "delete"]


def test_a_state_that_cannot_be_learned_ends_the_watch():
    clock = Clock()
    assert babysit.main(WORDS, lambda *words: (4, ""), clock.sleep, clock) == 4


def test_it_takes_a_command():
    with pytest.raises(SystemExit) as stop:
        babysit.main(["pod", "--type=v4-8"])
    assert stop.value.code == 2
