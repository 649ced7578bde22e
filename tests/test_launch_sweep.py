"""Sweeps on a cluster: what is submitted, what its answers lead to, and what a part does as a job."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import train_fixtures as tiny
from test_sweep import CONFIG, toy_plan

from mmkd_jax import cli, io
from mmkd_jax.errors import EXIT_PREEMPTED, InputError
from mmkd_jax.sweeps import job, runner, submit

TESTS = pathlib.Path(__file__).parent

# A cluster on which a job ends at once, as the next word of `plan` says: an exit code, `lost` (no word from it),
# `stays` (in the queue), `refused`.
SBATCH = r"""
number=$(($(cat "$FAKE/count") + 1)); echo $number >"$FAKE/count"
part=${*: -1} folder=${*: -2:1}
echo "$*" >>"$FAKE/submitted"
now=$(head -n 1 "$FAKE/plan"); sed -i 1d "$FAKE/plan"
case $now in
  refused) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1 ;;
  stays) echo $number >"$FAKE/there" ;;
  lost) ;;
  *) echo "{\"code\": $now}" >"$folder/jobs/${part//\//.}.result.json" ;;
esac
echo "$number;one"
"""
SQUEUE = r"""
number=${2#--jobs=}
[ "$(cat "$FAKE/there")" != "$number" ] || { echo RUNNING; exit; }
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A function: a fake SLURM with this plan; its `submitted()` are the parts, in order."""
    folder = tmp_path / "cluster"
    (folder / "bin").mkdir(parents=True)
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE}.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / "bin" / name).chmod(0o755)
    (folder / "there").touch()
    (folder / "count").write_text("0\n")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def make(*plan: str) -> submit.Cluster:
        (folder / "plan").write_text("\n".join(plan) + "\n")
        return submit.Cluster("slurm", ("--gres=gpu:1",))

    make.folder = folder
    make.submitted = lambda: [line.split()[-1] for line in (folder / "submitted").read_text().splitlines()]
    return make


class HandError(Exception):
    """Stands in for a hand on the keyboard."""


def interrupt(seconds: float) -> None:
    raise HandError


def never(seconds: float) -> None:
    """What is waited for here has come."""


def test_what_is_preempted_or_lost_is_submitted_again(cluster, tmp_path, capsys):
    plan = toy_plan(tmp_path / "out", "one", "two", shared=("shared/start",))
    assert submit.run(plan, cluster("75", "0", "lost", "0", "0"), never) == []
    assert cluster.submitted() == ["shared/start", "shared/start", "runs/one", "runs/two", "runs/one"]
    assert all(runner.is_done(plan, task) for task in (*plan.shared, *plan.runs))
    words = (cluster.folder / "submitted").read_text().splitlines()[0].split()
    log = tmp_path / "out/logs/shared.start.log"
    assert words[:4] == ["--parsable", "--job-name=shared/start", f"--output={log}", "--gres=gpu:1"]
    assert words[-6:] == ["--", "python", "-m", "mmkd_jax.sweeps.job", str(tmp_path / "out"), "shared/start"]
    said = capsys.readouterr().out
    assert "shared/start: preempted\nshared/start: job 2, attempt 2\n" in said
    assert "runs/one: lost" in said
    again = submit.run(plan, cluster("refused"), never)  # nothing is left to do
    assert again == []
    assert len(cluster.submitted()) == 5


def test_preemptions_have_a_limit(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "RETRIES", 3)
    plan = toy_plan(tmp_path / "out", "one")
    failures = submit.run(plan, cluster(*["75"] * 9), never)
    assert [(failure.task, failure.code) for failure in failures] == [("runs/one", EXIT_PREEMPTED)]
    assert len(cluster.submitted()) == 1 + 3


def test_a_failed_part_is_told_by_its_log_and_tried_by_the_next_call(cluster, tmp_path):
    plan = toy_plan(tmp_path / "out", "one", "two")
    log = tmp_path / "out/logs/runs.one.log"
    log.parent.mkdir(parents=True)
    log.write_text("much\nmmkd train: the batch is odd\n")
    assert submit.run(plan, cluster("2", "0"), never) == [runner.Failure("runs/one", 2, "mmkd train: the batch is odd")]
    assert runner.is_done(plan, plan.runs[1])
    assert submit.run(plan, cluster("0"), never) == []
    assert cluster.submitted() == ["runs/one", "runs/two", "runs/one"]
    attempts = {name: known["attempt"] for name, known in io.read_json(tmp_path / "out/jobs.json").items()}
    assert attempts == {"runs/one": 2, "runs/two": 1}  # names of jobs are never used twice


def test_without_what_is_shared_nothing_is_submitted(cluster, tmp_path):
    plan = toy_plan(tmp_path / "out", "one", shared=("shared/start",))
    assert [failure.code for failure in submit.run(plan, cluster("1"), never)] == [1]
    assert cluster.submitted() == ["shared/start"]


def test_a_sweep_that_was_stopped_finds_its_jobs(cluster, tmp_path):
    """One that ended well meanwhile, and one that is still there."""
    plan = toy_plan(tmp_path / "out", "one")
    with pytest.raises(HandError):
        submit.run(plan, cluster("stays"), interrupt)
    with pytest.raises(HandError):
        submit.run(plan, cluster("refused"), interrupt)
    (cluster.folder / "there").write_text("")
    io.write_json(job.files(plan.workdir, "runs/one")[1], {"code": 0})
    assert submit.run(plan, cluster("refused"), never) == []
    assert cluster.submitted() == ["runs/one"]


def test_a_job_that_does_something_else_is_not_taken_for_it(cluster, tmp_path):
    with pytest.raises(HandError):
        submit.run(toy_plan(tmp_path / "out", "one"), cluster("stays"), interrupt)
    other = toy_plan(tmp_path / "out", "one")
    object.__setattr__(other.runs[0], "commands", (("train", "--other"),))
    with pytest.raises(InputError, match="job 1 still makes runs/one by other commands"):
        submit.run(other, cluster("0"), never)
    (cluster.folder / "there").write_text("")
    assert submit.run(other, cluster("0"), never) == []


def test_a_cluster_that_does_not_answer_is_asked_again(cluster, tmp_path):
    plan, asked = toy_plan(tmp_path / "out", "one"), []
    squeue = cluster.folder / "bin" / "squeue"
    squeue.write_text(
        "#!/usr/bin/env bash\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )

    def recover(seconds):
        asked.append(seconds)
        squeue.write_text(f"#!/usr/bin/env bash\n{SQUEUE}")

    assert submit.run(plan, cluster("0"), recover) == []
    assert asked == [submit.POLL]
    assert cluster.submitted() == ["runs/one"]


def test_a_refusal_is_shown_with_what_to_do(cluster, tmp_path, capfd):
    config = tmp_path / "toy.py"
    config.write_text(CONFIG)
    cluster("refused")
    words = ["sweep", "--config", str(config), "--workdir", str(tmp_path / "out"), "--on", "slurm"]
    assert cli.main(words) == 2
    said = capfd.readouterr().err
    assert "QOSMaxSubmitJobPerUserLimit" in said
    assert "ask for more" in said
    assert said.splitlines()[-1].startswith("mmkd sweep: slurm refused shared/init-")


def test_a_dry_run_prints_what_would_be_submitted(cluster, tmp_path, capfd, monkeypatch):
    config = tmp_path / "toy.py"
    config.write_text(CONFIG)
    words = ["sweep", "--config", str(config), "--dry-run", "--workdir"]
    assert cli.main([*words, str(tmp_path / "out"), "--on", "slurm", "--submit=--gres=gpu:1"]) == 0
    said = capfd.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith("sbatch --parsable --job-name=")]
    assert len(lines) == 7
    assert all("--gres=gpu:1" in line and "-- python -m mmkd_jax.sweeps.job" in line for line in lines)
    monkeypatch.setattr(runner, "is_done", lambda plan, task: False)  # the bucket is not there
    monkeypatch.setattr(submit, "BUCKETS", "json")  # nor the package that reads it
    place = ["--on", "gke", "--submit=--cluster=c", "--submit=--image=i", "--submit=--type=v5litepod-8"]
    assert cli.main([*words, "gs://bucket/sweep", *place]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("xpk workload create")]
    assert len({line.split()[3] for line in lines}) == 7
    assert all("exec python -m mmkd_jax.sweeps.job gs://bucket/sweep runs/" in line for line in lines[1:])
    assert not (cluster.folder / "submitted").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--submit=--gres=gpu:1"], "is for --on slurm or --on gke"),
        (["--on", "slurm", "--devices", "2"], "--devices is for this machine"),
        (["--on", "gke"], "GKE takes gs://BUCKET/FOLDER"),
        (["--on", "gke", "--dry-run"], "GKE takes gs://BUCKET/FOLDER"),
        (["--on", "cloud"], "invalid choice: 'cloud'"),
    ],
)
def test_what_does_not_fit_the_place_is_refused(tmp_path, capsys, words, says):
    config = tmp_path / "toy.py"
    config.write_text(CONFIG)
    assert cli.main(["sweep", "--config", str(config), "--workdir", str(tmp_path / "out"), *words]) == 2
    assert says in capsys.readouterr().err


def test_a_bucket_without_its_package_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "BUCKETS", "no_such_package")
    plan = toy_plan(io.as_path("gs://bucket/sweep"), "one")
    with pytest.raises(InputError, match=r"mmkd-jax\[gcs\]"):
        submit.check(plan, submit.Cluster("gke"))


@pytest.mark.parametrize(
    ("said", "code", "state"),
    [
        (" 1", 0, "running"),
        (" ", 0, "queued"),
        ("StartupPolicyCompleted 1", 0, "running"),
        ("Completed 0", 0, "gone"),
        ('Error from server (NotFound): jobsets "x" not found', 1, "gone"),
        ("Unable to connect to the server", 1, "unknown"),
    ],
)
def test_states_of_gke(cluster, said, code, state):
    kubectl = cluster.folder / "bin" / "kubectl"
    kubectl.write_text(f"#!/usr/bin/env bash\necho '{said}'; exit {code}\n")
    kubectl.chmod(0o755)
    assert submit.Cluster("gke").state("mmkd-0123456789-1") == state


def test_a_job_on_gke_has_a_name_of_its_own_an_attempt(tmp_path):
    plan = toy_plan(tmp_path, "one", "two")
    names = {submit.Cluster("gke").submission(plan, run, k)[3] for run in plan.runs for k in (1, 2, 10)}
    assert len(names) == 6
    assert all(len(name) <= 39 for name in names)


# --- the job ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A function: the part `runs/one` with commands that write runs of these names; (arguments of job.main, result)."""
    program = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r}); import sweep_child; sys.exit(sweep_child.main(sys.argv[1:]))"
    )
    monkeypatch.setattr(job, "CHILD", (sys.executable, "-c", program))  # it follows no parent: standard input is ours
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    for name in job.INDICES:
        monkeypatch.delenv(name, raising=False)

    def write(*names):
        commands, result = job.files(tmp_path, "runs/one")
        io.write_json(commands, {"commands": [["train", "--workdir", str(tmp_path / name)] for name in names]})
        return [str(tmp_path), "runs/one"], result

    return write


def test_a_job_says_how_it_ended(part, tmp_path):
    words, result = part("a", "b")
    assert job.main(words) == 0
    assert io.read_json(result) == {"code": 0}
    assert [len(tiny.losses(tmp_path / name)) for name in "ab"] == [4, 4]
    words, result = part("leaves", "never")
    assert job.main(words) == EXIT_PREEMPTED
    assert io.read_json(result) == {"code": EXIT_PREEMPTED}
    assert not (tmp_path / "never").exists()


def test_only_the_first_process_says_it(part, monkeypatch):
    words, result = part()
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert job.main(words) == 0
    assert not result.exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert job.main(words) == 0
    assert result.exists()


def test_a_jobs_signal_reaches_its_command(part, tmp_path):
    """And the result of an attempt before is gone as soon as it begins."""
    words, result = part("one")
    io.write_json(result, {"code": 0})
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    program = f"""
import sys
from mmkd_jax.sweeps import job
job.CHILD = (sys.executable, "-c", 'import os, pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path({str(gate)!r}).write_text("here")
signal.pause()'.replace("\\n", chr(10)))
sys.exit(job.main({words!r}))
""".replace("'import", "'''import").replace("signal.pause()'", "signal.pause()'''")
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        assert gate.read_text() == "here"
        assert not result.exists()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == EXIT_PREEMPTED
    finally:
        process.kill()
    assert io.read_json(result) == {"code": EXIT_PREEMPTED}
