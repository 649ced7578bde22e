"""The smoke script: its judgements on made-up findings, and on this CPU the script itself (tier: full)."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / "launch"


def load(name: str):
    """A script of `launch` as a module."""
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


smoke = load("smoke")


class Found:
    """Stands in for a machine: parts find what they are told to."""

    def __init__(self, work: pathlib.Path, **parts):
        self.work, self._parts = work, parts

    def part(self, name, out, *words, on=None):
        return self._parts.get(name, {})


@pytest.mark.parametrize(
    ("name", "error", "passes"),
    [
        ("vit image", 1e-6, True),
        ("vit image", 1e-4, False),
        ("vit gradient", 1e-4, True),
        ("softmax/ring gradient", 1e-3, False),
        ("softmax/ring", float("nan"), False),
        ("softmax/ring", float("inf"), False),
    ],
)
def test_numerics_have_limits(tmp_path, name, error, passes):
    found = smoke.numerics(Found(tmp_path, compare={"errors": {name: error, "other": 0.0}}), None)
    assert found["passed"] == passes
    assert found["wrong"] == ([] if passes else [name])


def test_relative_errors():
    apart = load("smoke_parts").apart
    assert apart(np.array([1.0, 2.002]), np.array([1.0, 2.0])) == pytest.approx(1e-3)
    assert apart(np.array([np.nan, 2.0]), np.array([1.0, 2.0])) == float("inf")


class Runs(Found):
    """A machine whose runs leave these losses, and which end with these codes when they are disturbed."""

    def __init__(self, work, calm, disturbed):
        super().__init__(work, data={"pairs": "p", "vocabulary": "v", "tokens": 9})
        self.losses = {"calm": calm, "disturbed": disturbed}

    def run(self, *words, on=None):
        folder = next(w for w in words if isinstance(w, pathlib.Path))
        folder.mkdir(exist_ok=True)
        lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in self.losses[folder.name]]
        (folder / "metrics.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(
    ("disturb", "codes", "passes", "identical"),
    [
        (lambda steps: steps, (75, -9), True, True),
        (lambda steps: [(s, loss * (1 + 1e-6)) for s, loss in steps], (75, -9), True, False),
        (lambda steps: [(s, loss * (1.1 if s == 80 else 1)) for s, loss in steps], (75, -9), False, False),
        (lambda steps: [x for x in steps if x[0] != 31], (75, -9), False, False),
        (lambda steps: steps[:70], (75, -9), False, False),
        (lambda steps: steps, (0, 0), False, True),  # it ended before the signals came
        (lambda steps: steps, (1, -9), False, True),
    ],
)
def test_a_resumed_run_is_judged(tmp_path, monkeypatch, disturb, codes, passes, identical):
    steps = [(step, 2.0 / step) for step in range(1, smoke.STEPS + 1)]
    left = list(codes)
    monkeypatch.setattr(smoke, "disturb", lambda *_: left.pop(0))
    found = smoke.resume(Runs(tmp_path, steps, disturb(steps)), None)
    assert (found["passed"], found["identical"], found["exit_codes"]) == (passes, identical, list(codes))


def test_a_part_that_fails_is_told_and_the_others_run(tmp_path, monkeypatch):
    monkeypatch.setattr(smoke.Machine, "part", lambda self, name, out, *words, on=None: {"kind": "cpu"})

    def fails(machine, args):
        (machine.work / "log").write_text("the log\n")
        raise smoke.FailedError("it broke")

    monkeypatch.setattr(smoke, "numerics", fails)
    monkeypatch.setattr(smoke, "throughput", lambda machine, args: {"passed": True, "mfu": 0.4})
    out = tmp_path / "deep" / "found.json"
    words = ["--platform", "cpu", "--out", str(out), "--work", str(tmp_path / "work")]
    assert smoke.main([*words, "--only", "numerics", "throughput"]) == 1
    found = json.loads(out.read_text())
    assert found["parts"]["numerics"]["error"] == "it broke"
    assert found["parts"]["throughput"]["mfu"] == 0.4
    assert (found["passed"], found["log"]) == (False, "the log\n")
    assert smoke.main([*words, "--only", "throughput"]) == 0
    assert "log" not in json.loads(out.read_text())


def test_a_command_that_fails_is_told_by_its_last_line(tmp_path):
    machine = smoke.Machine("cpu", tmp_path)
    machine.run("-c", "import os; assert os.environ['JAX_PLATFORMS'] == 'cpu'")
    with pytest.raises(smoke.FailedError, match=r"-c .* ended with exit code 3: boom"):
        machine.run("-c", "import sys; print('boom'); sys.exit(3)")


def test_wheels_go_into_a_folder_of_their_own(tmp_path):
    """The Python that is given runs the script, with that folder first; nothing is fetched."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "one-1.0-py3-none-any.whl").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\necho "$PYTHONPATH|$*" >>{tmp_path}/calls\n')
    python.chmod(0o755)
    environment = {**os.environ, "MMKD_PYTHON": str(python), "TMPDIR": str(tmp_path), "PYTHONPATH": "before"}
    words = ["bash", str(LAUNCH / "gpu_smoke.sh"), "--wheels", str(wheels), "--only", "numerics"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    install, script = (tmp_path / "calls").read_text().splitlines()
    site = f"{tmp_path}/mmkd-wheels-{os.getuid()}"
    assert install.split("|")[1] == (
        f"-m pip install --quiet --no-index --no-deps --no-compile --target {site} {wheels}/one-1.0-py3-none-any.whl"
    )
    assert script == f"{site}:before|{LAUNCH}/smoke.py --platform cuda --out=mmkd-gpu.json --only numerics"


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_whole_script_passes_on_a_cpu(tmp_path):
    """With the model of the smoke config in place of the full-size one."""
    out = tmp_path / "found.json"
    words = [sys.executable, str(LAUNCH / "smoke.py"), "--platform", "cpu", "--out", str(out), "--batch", "2"]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([*words, "--config", "stage1_clip.py:smoke"], env=environment, capture_output=True, text=True)
    found = json.loads(out.read_text())
    assert done.returncode == 0, (done.stderr, found.get("log"))
    assert found["machine"]["devices"] == 2
    assert set(found["parts"]) == set(smoke.PARTS)
    numerics = found["parts"]["numerics"]
    assert {"vit image", "swin gradient", "resnet image", "softmax/ring", "affinity/rows gradient"} <= set(
        numerics["errors"]
    )
    assert not numerics["missing"]
    assert found["parts"]["resume"]["identical"]
    assert found["parts"]["throughput"]["flops_per_pair"] > 0
