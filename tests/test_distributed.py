"""How processes find each other, and what they say when one is missing."""

import os
import re
import subprocess

import jax
import processes
import pytest

from mmkd_jax.errors import InputError
from mmkd_jax.train import distributed

PLAIN = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "4", "SLURM_PROCID": "3"}
POD = {"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "t0,t1"}
JOIN = "from mmkd_jax.train import distributed; distributed.start(); print('joined', flush=True)"


def plain(address="a:1", count=2, index=1):
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (PLAIN, plain()),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "[::1]:80"}, plain("[::1]:80")),
        ({**PLAIN, "JAX_PROCESS_ID": "", "JOB_COMPLETION_INDEX": "0"}, plain(index=0)),
        ({**PLAIN, "JOB_COMPLETION_INDEX": "0"}, plain()),
        ({"JOB_COMPLETION_INDEX": "0"}, None),  # one of many jobs that have nothing to do with each other
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),  # a batch script itself, not a step
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        (STEP, {}),
        ({**STEP, "SLURM_GPUS_ON_NODE": "8"}, {"local_device_ids": [0, 1, 2, 3, 4, 5, 6, 7]}),
        ({**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "4"}, {}),
        ({**STEP, **PLAIN}, plain()),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (POD, {}),
        ({**POD, "JAX_PLATFORMS": "cpu"}, None),
        ({**POD, "JAX_PLATFORMS": "tpu,cpu"}, {}),
        ({**POD, "JAX_COORDINATOR_ADDRESS": "a:1"}, {}),  # JAX takes the address and finds the rest
    ],
)
def test_what_the_environment_says(environ, expected):
    assert distributed.settings(environ) == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not set beside"),
        ({"JAX_COORDINATOR_ADDRESS": "", "JAX_NUM_PROCESSES": ""}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is"),
        ({"JAX_PROCESS_ID": "2"}, "do not name one of several"),
        ({"JAX_NUM_PROCESSES": "two"}, "do not name one of several"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "is not HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": ":80"}, "is not HOST:PORT"),
    ],
)
def test_half_an_environment_is_refused(change, says):
    with pytest.raises(InputError, match=says) as caught:
        distributed.settings({**PLAIN, **change})
    assert "\n" not in str(caught.value)


def test_what_jax_cannot_find_is_one_line_and_a_lone_tpu_goes_on(monkeypatch):
    def nothing(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    monkeypatch.setattr(distributed.faulthandler, "enable", lambda: None)
    for name in (*PLAIN, "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="cannot join the other processes: coordinator_address"):
        distributed.start()
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
    distributed.start()
    monkeypatch.setenv("MMKD_START_SECONDS", "soon")
    with pytest.raises(InputError, match="MMKD_START_SECONDS=soon is not a number of seconds"):
        distributed.start()


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    processes.kill_all()


def join(address, count, index, program=JOIN, **environ):
    environ = {**os.environ, **environ, "JAX_COORDINATOR_ADDRESS": address}
    environ |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
    return processes.start(["-c", program], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_missing_host_is_one_line_and_code_2_in_time():
    address, alone = processes.free_address(), processes.free_address()
    first, second = (join(address, 3, i, MMKD_START_SECONDS="4") for i in range(2))
    lost = join(alone, 2, 1, MMKD_START_SECONDS="4")
    says = [process.communicate(timeout=60)[1].strip() for process in (first, second, lost)]
    assert [process.returncode for process in (first, second, lost)] == [2, 2, 2], says
    assert distributed.START[1] + 5 < 60  # by default too it is said within a minute
    last = [text.splitlines()[-1] for text in says]
    assert re.fullmatch(rf"mmkd: process 0 of 3 waited 4 s: not all 3 came to {address}; look which .*", last[0])
    assert "process 1 of 3 waited 4 s" in last[1]
    assert f"for process 0, which does not answer at {alone}" in last[2]
    assert all("Check failure" not in text for text in says)


def test_all_hosts_join(tmp_path):
    program = f"{JOIN}; import jax; print(jax.process_count(), jax.device_count())"
    address = processes.free_address()
    both = [join(address, 2, i, program, XLA_FLAGS="") for i in range(2)]
    for process in both:
        out, complaint = process.communicate(timeout=120)
        assert (process.returncode, out.split()) == (0, ["joined", "2", "2"]), complaint


class AlikeError(InputError):
    """One that all processes raise."""


@pytest.mark.parametrize(
    ("count", "error", "code", "says"),
    [
        (2, InputError("record 3 is damaged"), 2, "mmkd: record 3 is damaged\n"),
        (2, OSError("no such host"), 1, "OSError: no such host\n"),
        (2, AlikeError("not a number"), None, ""),
        (1, OSError("no such host"), None, ""),
        (2, KeyboardInterrupt(), None, ""),
    ],
)
def test_one_of_several_processes_that_fails_ends_at_once(monkeypatch, capsys, count, error, code, says):
    class Gone(BaseException):
        pass

    def leave(code):
        raise Gone(code)

    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(distributed.os, "_exit", leave)
    with pytest.raises(type(error) if code is None else Gone) as caught, distributed.failing_at_once(AlikeError):
        raise error
    assert code is None or caught.value.args == (code,)
    assert capsys.readouterr().err.endswith(says)
