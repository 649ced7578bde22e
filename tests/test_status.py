"""A run at a glance: what `mmkd status` prints and the page of `mmkd report`, from a folder written by hand."""

import json
import re

import pytest

from mmkd_jax import cli, io
from mmkd_jax.errors import InputError
from mmkd_jax.evals import results
from mmkd_jax.report import telemetry
from mmkd_jax.train import commits, ledger

NOW = 1_700_000_000.0
HEAD = {"from": 0, "attempt": 1, "time": NOW - 900, "steps": 40, "batch": 64, "devices": 4, "kind": "TPU v5 lite",
        "peak": 197e12, "memory": 16 * 2**30}  # fmt: skip
SECONDS = {"start": 10.0, "compile": 40.0, "input": 20.0, "train": 300.0, "checkpoint": 30.0}


def line(step, seconds, **more):
    return {"step": step, "time": NOW - 75, "seconds": seconds, "flops": step * 64 * 1e12, "memory": 3 * 2**30,
            "host": 2**30, **more}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A run killed after its tenth step and going on from the fifth; it is at the twentieth of forty."""
    run = tmp_path / "pathology"
    run.mkdir()
    half = {**SECONDS, "train": 100.0, "input": 10.0}
    account = [
        HEAD, line(5, half), line(10, {**half, "train": 200.0}),
        {**HEAD, "from": 5, "attempt": 2},
        line(20, {"start": 12.0, "compile": 38.0, "input": 10.0, "train": 200.0}, flops=15 * 64 * 1e12),
    ]  # fmt: skip
    (run / ledger.FILE).write_text("".join(json.dumps(one) + "\n" for one in account))
    history = [
        {"step": step, "loss": 4 - step / 10, "grad_norm": 0.5, "grad_norm/image": 0.3, "grad_norm/text": 0.4,
         "pairs_per_second": 5.0 + step, "eval/mean/zeroshot/balanced_accuracy": 0.5, "eval/a/zeroshot/f1": 0.25}
        for step in (5, 10, 15, 20)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in history))
    for step in (5, 10):
        io.write_text(run / commits.FOLDER / str(step) / commits.COMMIT, "")
    io.write_text(run / commits.FOLDER / "20" / "half", "")
    io.write_json(
        run / "provenance.json", {"commit": "abc", "devices": ["TPU v5 lite"] * 4, "versions": {"jax": "0.10"}}
    )
    return run


def test_the_lines_say_what_was_counted_by_hand(folder):
    text = "\n".join(telemetry.lines(telemetry.gather(folder, NOW)))
    # Kept: 10 + 40 + (10 + 10) input + (100 + 200) training + 30 = 400 s; lost: 100 s made again, 50 s to start again.
    assert "running, heard of 1 min 15 s ago" in text
    assert "step 20 of 40 (50 %), 5 min 50 s to go at this pace" in text  # 350 s without start and compilation
    assert text.count("█", 0, text.index("step")) == text.count("░") == 20
    assert "1,280 pairs, 4 pairs/s (now 25), 4 x TPU v5e" in text
    useful = 20 * 64 * 1e12 / (4 * 197e12)
    assert f"MFU {100 * useful / 300:.1f} % while training, {100 * useful / 550:.1f} % in all" in text
    assert "0.611 device-hours, device memory 3.0 of 16.0 GiB, host memory 1.0 GiB, 1 restart" in text
    assert "training 55 %, waiting for input 3.6 %, checkpoints 5.5 %, compilation 7.3 %" in text
    assert "lost to restarts 27 %" in text
    assert "loss 2  █▆▃▁  from 3.5" in text
    assert "gradient norm 0.5 (image 0.3, text 0.4)" in text
    assert "mean/zeroshot/balanced_accuracy 0.500" in text
    assert "a/zeroshot/f1" not in text  # the means stand for it
    assert "checkpoints: 5, 10" in text  # the last one is not whole


def test_without_a_peak_or_a_device_memory_nothing_is_said_of_them(folder):
    text = (folder / ledger.FILE).read_text().replace("1.97e+14", "null").replace("197000000000000.0", "null")
    (folder / ledger.FILE).write_text(re.sub(r'"memory": \d+', '"memory": null', text))
    text = "\n".join(telemetry.lines(telemetry.gather(folder, NOW)))
    assert "MFU" not in text
    assert "device memory" not in text
    assert "MFU" not in telemetry.page(telemetry.gather(folder, NOW))


def test_a_run_that_has_just_begun_can_be_looked_at(tmp_path):
    (tmp_path / ledger.FILE).write_text(json.dumps(HEAD) + "\n")
    seen = telemetry.gather(tmp_path, NOW)
    assert "of 40" in telemetry.page(seen)
    text = "\n".join(telemetry.lines(seen))
    assert "step 0 of 40 (0 %)\n" in text
    assert "no checkpoint yet" in text


def test_how_it_ended_is_said(folder):
    with (folder / ledger.FILE).open("a") as file:
        file.write(json.dumps(line(20, SECONDS, end="preempted")) + "\n")
    assert telemetry.lines(telemetry.gather(folder, NOW))[0].startswith("pathology: preempted, heard of")


def test_a_folder_without_an_account_is_refused(tmp_path):
    with pytest.raises(InputError, match="name the folder of an mmkd train"):
        telemetry.gather(tmp_path)


def test_the_commands(folder, tmp_path, capsys):
    assert cli.main(["status", str(folder)]) == 0
    assert "step 20 of 40" in capsys.readouterr().out
    assert cli.main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "mmkd_jax training" in page
    for words in ("Where the time went", "lost to restarts", "grad_norm/text", "device-hours on 4 x TPU v5e", "MFU"):
        assert words in page, words
    row = {"model": "pathology", "checkpoint": "20", "dataset": "a", "task": "zeroshot", "metric": "balanced_accuracy"}
    row |= {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "seed": 0, "context": {"classes": 2}}
    results.save(folder / "results.json", [row])
    assert cli.main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    for words in ("balanced accuracy", "0.611 device-hours", "lost to restarts 27 %"):
        assert words in page, words
    capsys.readouterr()
    assert cli.main(["status", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    wrong = ["train", "--config", "none.py", "--workdir", str(tmp_path / "new"), "--profile", "3:2"]
    assert cli.main(wrong) == 2
    assert "--profile 3:2: write a step" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], ""), ([1.0], "▁"), ([2.0, 2.0], "▁▁"), ([0.0, 7.0], "▁█"), ([0.0, float("nan"), 7.0], "▁█")],
)
def test_sparklines(values, expected):
    assert telemetry.sparkline(values) == expected


def test_a_long_sparkline_is_of_means():
    assert telemetry.sparkline([0, 0, 0, 0, 4, 10, 14, 14], width=4) == "▁▁▅█"
