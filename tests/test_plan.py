"""Plans: which topologies there are, what a compiled step comes to, what is said when it cannot be done."""

import json
import os
import select
import subprocess

import processes
import pytest
import train_fixtures as tiny

from mmkd_jax import cli, io
from mmkd_jax import config as configs
from mmkd_jax.errors import InputError
from mmkd_jax.planning import child, compile, devices, estimate, findings, page, plan, topologies
from mmkd_jax.planning.count import Collective, Totals

GIB = 2.0**30
SMOKE = f"{tiny.CONFIGS}/stage1_clip.py:smoke"


@pytest.mark.parametrize(
    ("name", "same", "chips", "kind"),
    [
        ("v5e:16x16", "v5e:16x16", 256, "TPU v5 lite"),
        ("V5LITEPOD-256", "v5e:16x16", 256, "TPU v5 lite"),
        ("v5litepod-8", "v5e:2x4", 8, "TPU v5 lite"),
        ("v5p-128", "v5p:4x4x4", 64, "TPU v5"),
        ("v5p-2048", "v5p:8x8x16", 1024, "TPU v5"),
        ("v4-8", "v4:2x2x1", 4, "TPU v4"),
        ("v6e-256", "v6e:16x16", 256, "TPU v6 lite"),
        ("tpu7x-128", "tpu7x:4x4x4", 64, "TPU7x"),
        ("cpu:8", "cpu:8", 8, "cpu"),
    ],
)
def test_names_of_products_and_of_cloud_are_understood(name, same, chips, kind):
    found = topologies.find(name)
    assert (found.name, found.chips, found.kind) == (same, chips, kind)
    assert found.devices == chips * (2 if kind == "TPU7x" else 1)
    assert (found.options.get("chip_config_name") == "megacore") == (kind == "TPU v4")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5e:32x32", r"not on offer; did you mean v5e:16x16\?"),
        ("v5e:6x6", r"not on offer; did you mean v5e:4x8\?"),
        ("v5e:16x8", r"did you mean v5e:8x16\?"),
        ("v5p:16x16", r"not on offer; did you mean v5p:4x8x8\?"),
        ("v5p:8x4x4", r"did you mean v5p:4x4x8\?"),
        ("v5litepod-100", "near it are v5litepod-128 and v5litepod-64"),
        ("v9:2x2", "no TPU 'v9'"),
        ("v7-8", "Cloud has no TPU 'v7'"),
        ("", "is not a slice or devices; such as v5e:16x16"),
        ("cpu:0", "ask for 1 to 4096"),
    ],
)
def test_what_nobody_sells_is_refused_in_one_line(name, says):
    with pytest.raises(InputError, match=says) as caught:
        topologies.find(name)
    assert "\n" not in str(caught.value)


def test_every_device_of_a_topology_is_in_the_table_of_peaks():
    for name in ("v4-8", "v5e:1x1", "v5p-8", "v6e-1", "tpu7x-8"):
        assert devices.of_kind(topologies.find(name).kind).memory > 10 * GIB
    assert devices.of_kind("NVIDIA H200").flops == devices.of_kind("NVIDIA H100 80GB HBM3").flops == 989.4e12
    assert devices.of_kind("NVIDIA A100-SXM4-80GB").memory == 80e9
    assert devices.of_kind("cpu") is None


def test_time_is_what_a_hand_computes():
    """On v5e: 197 TFLOP/s, 1.5 GHz, links of 90 GB/s, of which an axis round the whole torus uses two."""
    reduced = Collective("all-reduce", ("data",), "bf16", (1000, 1000), True, False)
    totals = Totals(flops=int(197e10), cycles=int(3e7))
    totals.collectives[reduced] = 12
    topology, mesh = topologies.find("v5e:16x16"), {"data": 256, "fsdp": 1, "tensor": 1}
    found = estimate.seconds(totals, topology, mesh)
    network = 12 * 2 * 2e6 * 255 / 256 / (2 * 90e9)
    assert found["flops"] == pytest.approx(0.01)
    assert found["network"] == pytest.approx(network)
    assert found["low"] == pytest.approx(0.01)
    assert found["high"] == pytest.approx(0.02 + network)
    run = estimate.run(found, 1e9, 16384, 1000, topology, 1)
    assert run["pairs_per_second"][1] == pytest.approx(16384 / 0.01)
    assert run["utilisation"][1] == pytest.approx(16384 * 1e9 / (256 * 197e12 * 0.01))
    assert run["chip_hours"] == pytest.approx([1000 * 0.01 * 256 / 3600, 1000 * found["high"] * 256 / 3600])
    assert estimate.seconds(totals, topologies.find("cpu:8"), mesh) is None


def test_warnings_name_what_should_not_be():
    config = tiny.stage1("--config.batch=512", "--config.model.image.width=1024")
    shapes = findings.parameter_shapes(config, {})
    assert shapes[(1024, 128)] == 2 * 2  # both kernels of the MLP in each of two layers
    fine = Totals()
    fine.collectives[Collective("all-reduce", ("data",), "f32", (1024, 128), True, False)] = 4
    fine.collectives[Collective("all-gather", ("data",), "f32", (512, 32), False, True)] = 1
    mesh = {"data": 8, "fsdp": 1, "tensor": 1}
    assert findings.warnings("f32[512,64]", fine, mesh, config, {}) == []
    odd = Totals()
    odd.collectives[Collective("all-reduce", ("data",), "f32", (128, 1024), True, False)] = 5
    odd.collectives[Collective("all-gather", ("data",), "f32", (1024, 128), True, False)] = 1
    odd.collectives[Collective("all-gather", ("data",), "bf16", (512, 5, 32), False, False)] = 1
    odd.collectives[Collective("all-to-all", ("data",), "f32", (8, 1, 4096), False, False)] = 19  # 512 x 512 in eighths
    odd.collectives[Collective("all-to-all", ("data",), "f32", (8, 1, 4095), False, False)] = 7
    odd.hidden["tpu_custom_call"] = 2
    text = "%fusion.3.remat = f32[2] add(%a, %b)\n f32[512,512]{1,0} dot"
    said = "\n".join(findings.warnings(text, odd, mesh, config, {}))
    for part in (
        "gradients of shape 1024x128 are reduced 5 times, not 4",
        "weights are gathered though no axis of the mesh divides them: f32[1024,128]",
        "a whole activation is gathered on every device: bf16[512,5,32]",
        "all pairs against all pairs: f32[512,512]",
        "a matrix of all pairs against all pairs is exchanged among the devices 19 times",
        "computes 1 values again",
        "tpu_custom_call (2)",
    ):
        assert part in said
    assert "weights are gathered" not in "\n".join(
        findings.warnings(text, odd, mesh | {"data": 4, "fsdp": 2}, config, {})
    )


def test_features_that_travel_more_often_than_once_are_warned_of():
    """Stage 1 gathers one side and reduces its gradient; stage 2 gathers one side of each teacher's as well."""
    mesh = {"data": 8, "fsdp": 1, "tensor": 1}
    side, other, batch = (512, 32), (48, 1, 512), ["--config.batch=512"]
    plus = configs.load(f"{tiny.CONFIGS}/stage2_mmkd.py:recipe=plus,smoke", batch)
    without, shapes = (findings.parameter_shapes(plus, names) for names in ({}, {"a": 48, "b": 48, "c": 32}))
    assert shapes[(48, 32)] == without.get((48, 32), 0) + 4  # heads of two teachers for each tower
    for config, teachers, targets in (
        (configs.load(SMOKE, batch), {}, 0),
        (plus, {"a": 48, "b": 48, "c": 32}, 1),
    ):
        fine = Totals()
        fine.collectives[Collective("all-gather", ("data",), "f32", side, False, False)] = 1 + targets
        fine.collectives[Collective("all-gather", ("data",), "f32", other, False, False)] = 2 * targets
        fine.collectives[Collective("all-reduce", ("data",), "f32", side, False, False)] = 1
        fine.collectives[Collective("all-reduce", ("data",), "f32", (512,), False, False)] = 9
        assert findings.warnings("", fine, mesh, config, teachers) == []
        padded = Totals()  # gathered by a reduction
        padded.add(fine, 1)
        padded.collectives[Collective("all-gather", ("data",), "f32", side, False, False)] -= 1
        padded.collectives[Collective("all-reduce", ("data",), "f32", side, False, False)] += 1
        assert findings.warnings("", padded, mesh, config, teachers) == []
        odd = Totals()
        odd.add(fine, 2)
        said = findings.warnings("", odd, mesh, config, teachers)
        assert f"features 512x32 are gathered {2 + 2 * targets} times, not {1 + targets}" in said
        assert "features 512x32 are reduced 2 times, not 1" in said
        assert ("features 512x48 are gathered 4 times, not 2" in said) == bool(targets)
    alien = Totals()
    alien.collectives[Collective("all-reduce", ("data",), "f32", other, False, False)] = 1
    assert findings.warnings("", alien, mesh, plus, {"a": 48}) == []  # their gather, by a reduction
    alien.collectives[Collective("all-gather", ("data",), "f32", other, False, False)] = 1
    assert findings.warnings("", alien, mesh, plus, {"a": 48}) == ["features 512x48 are reduced 1 times, not 0"]


PROGRAM = """HloModule fake

ENTRY %main (a: f32[8,32]) -> f32[8,64] {
  %a = f32[8,32]{1,0} parameter(0)
  ROOT %d = f32[8,64]{1,0} dot(%a, %a), lhs_contracting_dims={1}, backend_config={"estimated_cycles":"1500000"}
}
"""


def compiler(monkeypatch, needs, limit=15.75):
    """Compiling as if each pair of a device took `needs` GiB; returns the batches that were compiled."""
    asked = []

    def run(folder, topology, minutes):
        request = io.read_json(folder / "request.json")
        asked.append((request["config"]["remat"], request["config"]["batch"]))
        size = needs[request["config"]["remat"]] * request["config"]["batch"] / topology.devices
        if size > 2 * limit:
            text = f"RESOURCE_EXHAUSTED: program requires ({size:.2f}G) exceeds available HBM ({limit:.2f}G)"
            io.write_json(folder / "failure.json", {"kind": "memory", "text": text})
            return
        memory = dict.fromkeys(("argument", "output", "alias", "temp", "generated_code"), 1) | {"peak": size * GIB}
        io.write_bytes(folder / "program.txt.gz", child.gzip.compress(PROGRAM.encode()))
        io.write_json(folder / "memory.json", memory)

    monkeypatch.setattr(compile, "_run", run)
    monkeypatch.setattr(compile, "versions", lambda platform: {"jax": "1"})
    return asked


def planned(tmp_path, capsys, *words):
    code = cli.main(["plan", "--config", SMOKE, "--out", str(tmp_path), *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_plan_is_printed_saved_and_kept(tmp_path, monkeypatch, capsys):
    asked = compiler(monkeypatch, {"none": 0.5})
    words = ("--topology", "v5litepod-16", "--config.batch=64", "--config.steps=0", "--pairs", "6400")
    code, out, _ = planned(tmp_path, capsys, *words)
    assert code == 0
    assert "fits:             yes" in out
    assert "peak memory:      2.00 of 15.75 GiB" in out
    assert "estimate" in out
    made = json.loads((tmp_path / "stage1-v5e-4x4.json").read_text())
    assert made["fits"]
    assert made["mesh"] == {"data": 16, "fsdp": 1, "tensor": 1}
    assert made["flops"]["counted"] == 2 * 8 * 64 * 32
    assert made["seconds"]["high"] == pytest.approx(1e-3)
    assert made["run"]["steps"] == 20 * 6400 // 64
    text = (tmp_path / "stage1-v5e-4x4.html").read_text()
    assert "Nothing here ran on these devices" in text
    planned(tmp_path, capsys, *words)
    assert asked == [("none", 64)]  # the second time it was kept
    planned(tmp_path, capsys, *words, "--config.log_every=7")
    assert len(asked) == 1  # a field that the program does not depend on
    planned(tmp_path, capsys, *words, "--config.model.image.width=64")
    assert len(asked) == 2


def test_a_program_that_cannot_be_counted_is_refused(tmp_path, monkeypatch, capsys):
    compiler(monkeypatch, {"none": 0.5})
    monkeypatch.setitem(globals(), "PROGRAM", "HloModule cut\n")
    code, _, error = planned(tmp_path, capsys, "--topology", "v5e:2x2", "--config.batch=8")
    assert code == 2
    assert "the step compiles (peak 1.00 GiB a device), but the program's text has no entry" in error
    assert not list(tmp_path.glob("*.json"))


def test_what_does_not_fit_says_what_to_try(tmp_path, monkeypatch, capsys):
    compiler(monkeypatch, {"none": 16.0, "dots": 9.0})
    code, out, _ = planned(tmp_path, capsys, "--topology", "v5e:2x2", "--config.batch=16")
    assert code == 0
    assert "fits:             no: the compiler asks for 64.00 GiB a device, has 15.75" in out
    assert "try:              --config.remat=dots or --config.batch=8 or --config.accumulate=2" in out
    _, out, _ = planned(tmp_path, capsys, "--topology", "v5e:2x2", "--config.batch=8", "--config.remat=dots")
    assert "fits:             no" in out  # it compiled, to more than there is
    assert "peak memory:      18.00 of 15.75" in out


def test_the_largest_batch_is_found_from_above(tmp_path, monkeypatch, capsys):
    needs = {"none": 1.0, "dots": 0.1, "full": 0.01}
    asked = compiler(monkeypatch, needs)
    code, out, _ = planned(tmp_path, capsys, "--topology", "v5e:2x2", "--config.batch=8", "--largest-batch")
    assert code == 0
    made = json.loads((tmp_path / "stage1-v5e-2x2.json").read_text())
    for one in made["largest"]:
        best = 4 * int(15.75 / needs[one["remat"]])
        assert one["batch"] <= best < one["below"]
        assert one["below"] - one["batch"] <= max(4, one["batch"] // 8 + 4)
        assert one["tried"][0]["batch"] == 4 * plan.MOST
    assert len(set(asked)) == len(asked)
    assert len(asked) < 60
    assert "remat full, batch 16384: too large" in out
    assert any("remat dots" in line and "fits, peak" in line for line in out.splitlines())
    before = len(asked)
    _, out, _ = planned(tmp_path, capsys, "--topology", "v5e:2x2", "--config.batch=8", "--largest-batch")
    assert len(asked) == before
    assert "compiled earlier" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--topology", "v5e:2x3"), "is not on offer; did you mean v5e:2x2?"),
        (("--topology", "v5e:2x2", "--config.mesh.fsdp=3"), "does not fit the 4 devices of v5e:2x2"),
        (("--topology", "cpu:8", "--largest-batch"), "nothing limits the memory of cpu:8"),
        (("--topology", "v5e:2x2", "--limit", "0"), "--limit must be positive"),
        (("--topology", "v5e:2x2", "--pairs", "-5"), "--pairs must be positive"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, words, says):
    compiler(monkeypatch, {"none": 0.001})
    code, _, error = planned(tmp_path / "plans", capsys, *words)
    assert code == 2
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "plans").exists()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("late", r"took more than 0\.5 minutes; give it more by --limit"),
        ("crash", r"the compiler crashed .*exit code -11: \*\*\* SIGSEGV"),
        ("refusal", r"the compiler refuses v5e:2x2: JaxRuntimeError: no such thing"),
        ("input", r"^batch 8 is not a multiple of 3"),
    ],
)
def test_a_compiler_that_fails_is_told_and_not_kept(tmp_path, monkeypatch, how, says):
    def run(command, timeout, **_):
        if how == "late":
            raise subprocess.TimeoutExpired(command, timeout)
        folder = io.as_path(command[-1])
        if how == "refusal":
            io.write_json(folder / "failure.json", {"kind": "compiler", "text": "JaxRuntimeError: no such\nthing"})
        if how == "input":
            io.write_json(folder / "failure.json", {"kind": "input", "text": "batch 8 is not a multiple of 3"})
        return subprocess.CompletedProcess(command, -11, "", "noise\n*** SIGSEGV ***\nmore\n")

    monkeypatch.setattr(compile.subprocess, "run", run)
    monkeypatch.setattr(compile, "versions", lambda platform: {})
    topology = topologies.find("v5e:2x2")
    for _ in range(2):
        with pytest.raises(InputError, match=says) as caught:
            compile.step({"batch": 8}, topology, {}, io.as_path(tmp_path), 0.5)
        assert "\n" not in str(caught.value)


WAIT = """
import sys
from etils import epath
from mmkd_jax.planning import compile, topologies
compile._run(epath.Path(sys.argv[1]), topologies.find("cpu:1"), 5)
"""


@pytest.mark.timeout(120)
def test_a_compiler_ends_with_the_plan_that_started_it(tmp_path):
    """Its request is a pipe that nothing is written to: it waits there, as if it compiled, when the plan is killed."""
    os.mkfifo(tmp_path / "request.json")
    plan_ = processes.start(["-c", WAIT, str(tmp_path)])
    with (tmp_path / "request.json").open("wb") as request:  # opens once the compiler reads
        poll = select.poll()
        poll.register(request, select.POLLERR)
        assert not poll.poll(0)
        plan_.kill()
        assert poll.poll(60_000)  # nobody reads any more


def test_a_page_shows_a_plan_that_does_not_fit():
    made = {
        "name": "x", "batch": 8, "remat": "none", "form": "plain", "mesh": {"data": 4}, "versions": {"jax": "1"},
        "topology": {"name": "v5e:2x2", "kind": "TPU v5 lite", "chips": 4, "slices": 2}, "fits": False,
        "needed": 20 * GIB, "allowed": 15.75 * GIB, "try": ["--config.remat=dots"],
    }  # fmt: skip
    text = page.page(made)
    assert "20.00 GiB" in text
    assert "--config.remat=dots" in text
    assert "2 x v5e:2x2" in text


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["stage1_clip.py:smoke", "stage2_mmkd.py:recipe=plus,smoke"])
def test_a_smoke_config_is_planned_for_fake_devices(tmp_path, capsys, stage):
    words = ("--topology", "cpu:4", "--config.batch=8", "--teachers", "a=24", "b=40")
    code = cli.main(["plan", "--config", f"{tiny.CONFIGS}/{stage}", "--out", str(tmp_path), *words])
    assert code == 0, capsys.readouterr().err
    made = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert made["warnings"] == []
    assert 0.9 < made["flops"]["ratio"] < 1.1  # no remat: what the model needs and hardly more
    gathered = [row for row in made["collectives"] if row["kind"] == "all-gather"]
    assert all(row["dtype"] in ("f32", "pred") for row in gathered)
