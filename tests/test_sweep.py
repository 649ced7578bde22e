"""Sweeps: what is yielded, what is shared, where it runs, what kills leave, and the table at the end."""

import contextlib
import csv
import fcntl
import io as memory
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import data_fixtures as toy
import numpy as np
import pytest
import train_fixtures as tiny
from scipy import stats

from mmkd_jax import cli, io
from mmkd_jax import config as configs
from mmkd_jax.errors import EXIT_PREEMPTED, InputError
from mmkd_jax.evals import results
from mmkd_jax.sweeps import devices, grids, plan, runner, table
from mmkd_jax.train import metrics

TESTS = pathlib.Path(__file__).parent
CONFIG = """
from ml_collections import ConfigDict
from mmkd_jax.sweeps import grids

def get_config(arg=""):
    return ConfigDict({"name": "toy", "seed": 0, "lr": 0.1, "init": "", "teachers": ("a", "b"), "start": 0})

def sweep(config):
    return grids.grid({"lr": (0.1, config.lr * 2, 0.3), "seed": range(2)})

def shared(config):
    return {"init": ["train", "--config", "other.py", f"--config.start={config.start}"]}

def evaluate(config):
    return ["--pairs", "somewhere"]
"""
PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the caller, in the background, ignores it
from mmkd_jax import cli
from mmkd_jax.sweeps import devices, runner
runner.CHILD = (sys.executable, {child!r})
devices.groups = lambda each: [{{}}]
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def written(tmp_path):
    """A function: the address of a config file with this text."""

    def write(text=CONFIG, name="toy.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


# --- what is yielded ------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_in_order():
    runs = grids.grid({"a.b": (1, 2), "seed": range(2)})
    assert runs == [{"a.b": 1, "seed": 0}, {"a.b": 1, "seed": 1}, {"a.b": 2, "seed": 0}, {"a.b": 2, "seed": 1}]
    with pytest.raises(InputError, match="gives 'seed' no value"):
        grids.grid({"a": (1,), "seed": ()})


def test_parts_are_multiplied_and_may_not_meet():
    runs = grids.product(grids.leave_one_out(("x", "y")), grids.grid({"seed": (3, 4)}))
    assert [(run["teachers"], run["seed"]) for run in runs] == [
        (("x", "y"), 3), (("x", "y"), 4), (("y",), 3), (("y",), 4), (("x",), 3), (("x",), 4),
    ]  # fmt: skip
    with pytest.raises(InputError, match="two parts of the sweep set 'seed'"):
        grids.product([{"seed": 1}], [{"seed": 2}])


def test_draws_are_those_of_a_shorter_and_of_a_narrower_search():
    lr = grids.log_uniform(1e-5, 1e-1)
    first = grids.random(5, {"lr": lr})
    assert grids.random(9, {"lr": lr})[:5] == first
    wider = grids.random(5, {"lr": lr, "decay": grids.uniform(0, 1)})
    assert [{"lr": run["lr"]} for run in wider] == first
    assert grids.random(5, {"lr": lr}, seed=1) != first


def test_draws_cover_their_ranges():
    runs = grids.random(
        400, {"l": grids.log_uniform(1e-4, 1), "u": grids.uniform(2, 4), "c": grids.choice("p", "q", "r")}
    )
    columns = {name: np.array([run[name] for run in runs]) for name in "luc"}
    for sample in ((np.log10(columns["l"]) + 4) / 4, (columns["u"] - 2) / 2):
        assert stats.kstest(sample, "uniform").pvalue > 0.01
    assert stats.kstest(columns["l"], "uniform").pvalue < 1e-6  # negative control: not uniform as it is
    assert all((columns["c"] == name).mean() > 0.25 for name in "pqr")


def test_draws_differ_from_each_other_or_are_refused():
    runs = grids.random(3, {"c": grids.choice(1, 2, 3)})
    assert sorted(run["c"] for run in runs) == [1, 2, 3]
    with pytest.raises(InputError, match="draws 4 different runs from what gives only 3"):
        grids.random(4, {"c": grids.choice(1, 2, 3)})
    with pytest.raises(InputError, match="0 < low < high"):
        grids.log_uniform(0, 1)


@pytest.mark.parametrize("names", [("a",), ("a", "a"), ()])
def test_to_leave_one_out_takes_two(names):
    with pytest.raises(InputError, match="two different names"):
        grids.leave_one_out(names)


def test_teachers_of_a_folder_are_its_finished_sets(tmp_path):
    assert grids.teachers_in(str(tiny.world() / "features")) == ("alpha", "beta")
    (tmp_path / "half").mkdir()
    for folder in (str(tmp_path), ""):
        with pytest.raises(InputError, match="no feature set"):
            grids.teachers_in(folder)


def test_picked_fields_make_another_config_agree():
    config = tiny.stage2("mean", "--config.data.views.scale=(0.5, 0.75)", "--config.model.image.layers=1")
    words = grids.pick(config, "model", "data", "tokenizer", "batch")
    other = configs.load(f"{tiny.CONFIGS}/stage1_clip.py:smoke", words)
    for section in ("model", "data", "tokenizer", "batch"):
        assert other.to_dict()[section] == config.to_dict()[section]
    assert configs.load(f"{tiny.CONFIGS}/stage1_clip.py:smoke").model.image.layers == 2


# --- the plan -------------------------------------------------------------------------------------------------------


def test_a_plan_names_its_runs_and_shares_what_is_the_same(written, tmp_path):
    sweep = plan.load(written(), ["--config.lr=0.4"], tmp_path / "out")
    assert [run.name for run in sweep.runs] == [f"runs/lr_{lr},seed_{s}" for lr in (0.1, 0.8, 0.3) for s in (0, 1)]
    assert len(sweep.shared) == 1
    folder = str(tmp_path / "out" / sweep.shared[0].name)
    for run in sweep.runs:
        train, scored = run.commands
        assert f"--config.init={folder}" in train
        config = configs.load(train[train.index("--config") + 1], [w for w in train if w.startswith("--config.")])
        assert (config.lr, config.seed, config.init) == (run.overrides["lr"], run.overrides["seed"], folder)
        assert scored[0] == "eval"
    assert not (tmp_path / "out").exists()


def test_what_differs_is_not_shared(written, tmp_path):
    by_seed = CONFIG.replace("{config.start}", "{config.seed}")
    assert len(plan.load(written(by_seed), [], tmp_path / "out").shared) == 2
    other = plan.load(written(), ["--config.start=1"], tmp_path / "out").shared[0]
    assert other.name != plan.load(written(), [], tmp_path / "out").shared[0].name


def test_names_tell_fields_and_long_values_apart():
    names = plan._names([{"a.lr": 1, "b.lr": 2}, {"t": ("x", "y")}, {"t": "x/y"}, {"t": "x y"}, {"t": "z" * 300}, {}])
    assert names[:2] == ["a.lr_1,b.lr_2", "t_x+y"]
    assert names[-1] == "base"
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.,+-]{1,100}", name) for name in names)


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        ("def sweep(config): return [{'lrr': 1}]", "run lrr_1 of the sweep: .*no field 'lrr'; did you mean 'lr'"),
        ("def sweep(config): return [{'seed': 0.5}]", "run seed_0.5 of the sweep: config.seed takes int"),
        ("def sweep(config): return [{'lr': 1}, {'lr': 1}]", "two runs of the sweep are the same: lr_1"),
        ("def sweep(config): return [{'name': 'x'}]", "cannot override 'name'"),
        ("def sweep(config): return []", r"sweep\(\) yields no run"),
        ("def sweep(config): return 1 / 0", r"sweep\(\) fails: ZeroDivisionError"),
        ("def sweep(config): return [3]", "yields 3, not a dict"),
        ("sweep = 3", r"has no function sweep\(config\)"),
        ("def shared(config): return {'init': ['eval', '--x']}", "not 'eval --x'"),
        ("def shared(config): return ['train']", r"shared\(\) gives \['train'\], not a mapping"),
        ("def evaluate(config): return '--pairs x'", r"evaluate\(\) gives '--pairs x', not a sequence"),
        ("def evaluate(config): return None", r"evaluate\(\) gives None"),
        ("def shared(config): return {'iniT': ['train']}", "no field 'iniT'"),
    ],
)
def test_wrong_sweeps_are_one_line(written, tmp_path, sweep, says):
    address = written(CONFIG + "\n" + sweep + "\n")
    with pytest.raises(InputError, match=says) as caught:
        plan.load(address, [], tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_sweep_may_take_nothing_and_share_nothing(written, tmp_path):
    text = CONFIG.split("def sweep")[0] + "def sweep():\n    yield {'lr': 0.5}\n    yield {}\n"
    sweep = plan.load(written(text), [], tmp_path / "out")
    assert [run.name for run in sweep.runs] == ["runs/lr_0.5", "runs/base"]
    assert not sweep.shared
    assert [len(run.commands) for run in sweep.runs] == [1, 1]


def test_a_folder_is_one_sweeps_but_runs_may_be_added(written, tmp_path):
    plan.claim(plan.load(written(), [], tmp_path / "out"))
    plan.claim(plan.load(written(CONFIG.replace("range(2)", "range(3)")), [], tmp_path / "out"))
    assert len(io.read_json(tmp_path / "out" / "sweep.json")["runs"]) == 9
    with pytest.raises(InputError, match=r"holds a sweep with another config.start \(0, now 5\)"):
        plan.claim(plan.load(written(), ["--config.start=5"], tmp_path / "out"))


SHIPPED = {
    "learning_rate": (":smoke", 9, 0),
    "loss_weights": (":smoke,count=4", 4, 1),
    "leave_one_out": (":smoke,seeds=2", 6, 1),
}


def test_every_shipped_sweep_is_tested(repository):
    shipped = {path.stem for path in (repository / "configs" / "sweeps").glob("*.py")}
    assert shipped == {*SHIPPED, "ladder"}  # which has tests of its own


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sweeps_expand_to_commands_that_parse(name, tmp_path):
    argument, runs, shared = SHIPPED[name]
    more = [f"--config.score={tiny.world() / 'pairs'}"]
    more += [f"--config.features={tiny.world() / 'features'}"] if name != "learning_rate" else []
    address = f"{tiny.CONFIGS}/sweeps/{name}.py{argument}"
    sweep = plan.load(address, tiny.overrides(*more), tmp_path / "out")
    assert (len(sweep.runs), len(sweep.shared)) == (runs, shared)
    for task in (*sweep.shared, *sweep.runs):
        for verb, *words in task.commands:
            args = cli.parse(verb, words)
            if verb == "train":
                configs.load(args.config, args.overrides)


def test_leave_one_out_emits_one_feature_set(tmp_path):
    more = [f"--config.features={tiny.world() / 'features'}", "--config.weights=('b=two', 'a=one')"]
    address = f"{tiny.CONFIGS}/sweeps/leave_one_out.py:smoke,seeds=1"
    sweep = plan.load(address, tiny.overrides(*more), tmp_path / "out")
    assert [run.overrides["teachers"] for run in sweep.runs] == [("a", "b"), ("b",), ("a",)]
    emitted = [task for task in sweep.shared if task.commands[0][0] == "emit"]
    assert len(emitted) == 1
    args = cli.parse("emit", emitted[0].commands[0][1:])
    assert (args.teacher, args.views, tuple(args.scale)) == (["b=two", "a=one"], 1, (0.9, 1.0))
    assert all(f"--config.features={args.out}" in run.commands[0] for run in sweep.runs)


def test_a_dry_run_says_the_commands_and_writes_nothing(written, tmp_path, capsys):
    assert cli.main(["sweep", "--config", written(), "--workdir", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("\nmmkd train") == 7
    assert said.count("\nmmkd eval") == 6
    assert said.endswith("6 runs, 1 shared\n")
    assert not (tmp_path / "out").exists()


# --- devices --------------------------------------------------------------------------------------------------------


def test_devices_are_divided():
    assert devices.pins("cpu", 8, 1, {}) == [{}]
    assert devices.pins("gpu", 3, 1, {}) == [{"CUDA_VISIBLE_DEVICES": name} for name in "012"]
    seen = {"CUDA_VISIBLE_DEVICES": "4,GPU-a,6"}
    assert devices.pins("gpu", 3, 2, seen) == [{"CUDA_VISIBLE_DEVICES": "4,GPU-a"}]
    chips = devices.pins("tpu", 4, 2, {})
    assert [group["TPU_VISIBLE_DEVICES"] for group in chips] == ["0,1", "2,3"]
    assert {group["TPU_CHIPS_PER_PROCESS_BOUNDS"] for group in chips} == {"1,2,1"}
    assert len({group["TPU_MESH_CONTROLLER_PORT"] for group in chips}) == 2


@pytest.mark.parametrize(
    ("platform", "each", "says"), [("gpu", 5, "shows 4"), ("gpu", 0, "shows 4"), ("tpu", 3, "1, 2")]
)
def test_devices_that_are_not_there_are_refused(platform, each, says):
    with pytest.raises(InputError, match=f"--devices {each}: .*{says}"):
        devices.pins(platform, 4, each, {})


def test_this_machine_is_asked_in_another_process(monkeypatch):
    assert devices.groups() == [{}]
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    with pytest.raises(InputError, match=r"JAX finds no devices here: .*nonsense"):
        devices.groups()


# --- the runner -----------------------------------------------------------------------------------------------------


@pytest.fixture
def workers(monkeypatch, tmp_path):
    """The stand-in child in place; returns the file that its starts are written to."""
    monkeypatch.setattr(runner, "CHILD", (sys.executable, str(TESTS / "sweep_child.py")))
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))  # a script is not found beside the package
    return tmp_path / "starts"


def toy_plan(workdir, *names, shared=()):
    """A plan of runs of these names."""

    def command(name):
        return (("train", "--workdir", str(workdir / name)),)

    runs = tuple(plan.Run(f"runs/{name}", command(f"runs/{name}"), {"t": name}) for name in names)
    return plan.Plan(workdir, {}, tuple(plan.Task(name, command(name)) for name in shared), runs)


def started(path):
    """Names of what was started, in order."""
    return [pathlib.Path(line.split()[2]).name for line in path.read_text().splitlines()]


def test_a_failed_run_stops_no_other_and_is_tried_again(workers, tmp_path, capsys):
    sweep = toy_plan(tmp_path / "out", "one", "fails", "two")
    failures = runner.run(sweep, [{}])
    assert failures == [runner.Failure("runs/fails", 3, "this run fails")]
    assert "[2/3] runs/fails: failed (this run fails)" in capsys.readouterr().out
    assert started(workers) == ["one", "fails", "two"]
    assert runner.run(sweep, [{}]) == failures
    assert started(workers) == ["one", "fails", "two", "fails"]
    assert [line["step"] for line in tiny.losses(tmp_path / "out/runs/two")] == [1, 2, 3, 4]


def test_without_what_is_shared_no_run_begins(workers, tmp_path):
    sweep = toy_plan(tmp_path / "out", "one", shared=("shared/fails", "shared/good"))
    assert [failure.task for failure in runner.run(sweep, [{}])] == ["shared/fails"]
    assert started(workers) == ["fails", "good"]


def test_a_run_that_saved_and_left_ends_the_sweep_with_75(workers, tmp_path):
    sweep = toy_plan(tmp_path / "out", "one", "leaves", "two")
    with pytest.raises(SystemExit) as stop:
        runner.run(sweep, [{}])
    assert stop.value.code == EXIT_PREEMPTED
    assert started(workers) == ["one", "leaves"]
    assert [runner.is_done(sweep, run) for run in sweep.runs] == [True, False, False]


def test_other_commands_are_another_task_but_another_place_is_not(workers, tmp_path):
    sweep = toy_plan(tmp_path / "out", "one")
    runner.run(sweep, [{}])
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = toy_plan(tmp_path / "moved", "one")
    assert runner.is_done(moved, moved.runs[0])
    other = plan.Run("runs/one", (("train", "--workdir", str(tmp_path / "moved/runs/one"), "--more"),), {})
    assert not runner.is_done(moved, other)


def test_each_group_makes_one_run_at_a_time_on_its_own_devices(monkeypatch, tmp_path):
    """Two groups, four runs: the first two wait for each other, so both groups work at once."""
    code = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[3]); root = folder.parents[1]; name = folder.name
busy = root / f"busy{os.environ['PINNED']}"
os.close(os.open(busy, os.O_CREAT | os.O_EXCL))
if name in ("a", "b"):
    mine, other = (root / "gate.ab", root / "gate.ba")[:: 1 if name == "a" else -1]
    if name == "a":
        mine.write_text("x"); other.read_text()
    else:
        other.read_text(); mine.write_text("x")
folder.mkdir(parents=True); (folder / "pinned").write_text(os.environ["PINNED"])
busy.unlink()
"""
    root = tmp_path / "out"
    root.mkdir()
    for name in ("gate.ab", "gate.ba"):
        os.mkfifo(root / name)
    monkeypatch.setattr(runner, "CHILD", (sys.executable, "-c", code))
    sweep = toy_plan(root, "a", "b", "c", "d")
    assert runner.run(sweep, [{"PINNED": "0"}, {"PINNED": "1"}]) == []
    pinned = [(root / "runs" / name / "pinned").read_text() for name in "abcd"]
    assert {pinned[0], pinned[1]} == {"0", "1"}


def test_an_error_of_the_sweep_itself_starts_nothing_more(workers, tmp_path, monkeypatch):
    def full(path, value):
        raise OSError("no space left")

    monkeypatch.setattr(runner.io, "write_json", full)
    with pytest.raises(OSError, match="no space left"):
        runner.run(toy_plan(tmp_path / "out", "one", "two", "three"), [{}])
    assert started(workers) == ["one"]


def test_two_sweeps_do_not_work_in_one_folder(workers, tmp_path):
    sweep = toy_plan(tmp_path / "out", "one")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".sweep.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another mmkd sweep works in"):
            runner.run(sweep, [{}])
    assert not workers.exists()
    assert runner.run(sweep, [{}]) == []


def test_processes_of_a_dead_sweep_are_waited_for(workers, tmp_path, monkeypatch):
    sweep = toy_plan(tmp_path / "out", "one")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(runner, "PATIENCE", 0.3)
    with open(tmp_path / "out" / ".sweep.processes", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="processes of an earlier sweep still run"):
            runner.run(sweep, [{}])
    assert not workers.exists()


# --- kills ----------------------------------------------------------------------------------------------------------


class Sweep:
    """`mmkd sweep` in a process of its own, with the stand-in child."""

    FILES = ("table.json", "table.csv", "table.md", "report.html", "sweep.svg")

    def __init__(self, address, root, **environment):
        self.workdir, self.starts, self.gate = root / "out", root / "starts", root / "gate"
        root.mkdir(exist_ok=True)
        if not self.gate.exists():
            os.mkfifo(self.gate)
        program = PARENT.format(child=str(TESTS / "sweep_child.py"))
        self.command = [sys.executable, "-c", program, "sweep", "--config", address, "--workdir", str(self.workdir)]
        paths = {"STARTS": str(self.starts), "GATE": str(self.gate), "PYTHONPATH": str(TESTS.parent)}
        self.environment = {**os.environ, **paths, **environment}

    def start(self, hold=""):
        """The process; with `hold`, once its child waits there."""
        environment = {**self.environment, "HOLD": hold}
        options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(self.command, cwd=TESTS.parent, **options)
        if hold:
            assert self.gate.read_text() == "here"
        return process

    def finish(self, process):
        """Its exit code, and what it said."""
        out, err = process.communicate(timeout=120)
        return process.returncode, out + err

    def kill(self, hold, number=signal.SIGKILL):
        """Starts, and ends the sweep (not its child) where the child waits; returns its exit code."""
        process = self.start(hold)
        process.send_signal(number)
        return self.finish(process)[0]

    def files(self):
        """What is left, byte for byte."""
        return {name: (self.workdir / name).read_bytes() for name in self.FILES}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished sweep of six runs, and its config's address."""
    root = tmp_path_factory.mktemp("sweep")
    (root / "toy.py").write_text(CONFIG)
    sweep = Sweep(str(root / "toy.py"), root / "whole")
    code, said = sweep.finish(sweep.start())
    assert code == 0, said
    return sweep, str(root / "toy.py")


LONG = [pytest.param(number, marks=pytest.mark.full) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGKILL, *LONG])
def test_a_sweep_killed_twice_ends_in_the_table_of_an_undisturbed_one(undisturbed, tmp_path, number):
    whole, address = undisturbed
    sweep = Sweep(address, tmp_path / "killed")
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: EXIT_PREEMPTED, signal.SIGINT: 130}[number]
    assert sweep.kill("runs/lr_0.1,seed_1:2", number) == expected
    assert not (sweep.workdir / "table.json").exists()
    assert sweep.kill("student=" + str(sweep.workdir / "runs/lr_0.2,seed_1") + ":0", number) == expected
    code, said = sweep.finish(sweep.start())
    assert code == 0, said
    assert sweep.files() == whole.files()
    begun = [line.split()[0] + " " + line.split("--workdir ")[-1].split()[0] for line in sweep.starts.open()]
    assert sum("shared/init" in line.split("--workdir ")[-1].split()[0] for line in sweep.starts.open()) == 1
    assert len(begun) == 13 + 3  # seven and six commands; training, evaluation and the training before it again


def test_a_run_that_lost_its_state_would_be_seen(undisturbed, tmp_path):
    """Negative control of the test above."""
    whole, address = undisturbed
    sweep = Sweep(address, tmp_path / "killed", WRONG="1")
    sweep.kill("runs/lr_0.1,seed_1:2")
    assert sweep.finish(sweep.start())[0] == 0
    assert sweep.files()["table.json"] != whole.files()["table.json"]


def test_a_finished_sweep_starts_nothing(undisturbed):
    whole, _ = undisturbed
    before, files = whole.starts.read_text(), whole.files()
    code, _ = whole.finish(whole.start())
    assert (code, whole.starts.read_text(), whole.files()) == (0, before, files)


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_real_runs_stopped_in_training_and_evaluation_end_in_the_same_table(tmp_path, monkeypatch, quick_compilation):
    """As the test below, in this process: quicker, and the faults come at chosen places."""
    scored = toy.make_pairs(tmp_path / "scored", rows={"toy.test": [row for row in range(40) if row % 5]})
    more = [f"--config.features={tiny.world() / 'features'}", f"--config.score={scored.path}"]
    more += ["--config.model.image.layers=1", "--config.model.text.layers=1"]
    address = f"{tiny.CONFIGS}/sweeps/leave_one_out.py:smoke,seeds=2"
    monkeypatch.setattr(runner._Workers, "_call", lambda self, task, command, group: cli.main(list(command)))

    def sweep(name, owner=None, function="", calls=0):
        """Makes the sweep; with `owner`, up to the so many-th call of its function."""
        made = plan.load(address, tiny.overrides(*more), tmp_path / name)
        with monkeypatch.context() as faulty:
            if owner:
                real, left = getattr(owner, function), iter(range(calls - 1))

                def fails(*args, **options):
                    if next(left, None) is None:
                        raise Killed
                    return real(*args, **options)

                faulty.setattr(owner, function, fails)
            assert runner.run(made, [{}]) == []
        table.write(made)
        return {file: (tmp_path / name / file).read_bytes() for file in Sweep.FILES}

    with pytest.raises(Killed):  # four steps of stage 1, four of the first run, three of the second
        sweep("killed", metrics.MetricsLog, "write", 11)
    assert len(os.listdir(tmp_path / "killed" / "runs")) == 2
    with pytest.raises(Killed):  # the second and the third run's evaluation go well
        sweep("killed", results, "update", 3)
    assert len(os.listdir(tmp_path / "killed" / "done")) == 1 + 3
    assert sweep("killed") == sweep("whole")
    found = io.read_json(tmp_path / "whole" / "table.json")
    values = {table.key(value): value for value in found["settings"][0]["values"]}
    assert len(found["runs"]) == 6
    assert len(set(values["train", "", "loss"]["each"])) == 2
    assert ("zeroshot", "toy", "balanced_accuracy") in values


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_real_sweep_killed_twice_ends_in_the_table_of_an_undisturbed_one(tmp_path):
    """Stage 1, six students of stage 2, each evaluated: `leave_one_out` on the tiny set."""
    scored = toy.make_pairs(tmp_path / "scored", rows={"toy.test": [row for row in range(40) if row % 5]})
    root = tiny.world()
    more = [f"--config.features={root / 'features'}", f"--config.score={scored.path}"]
    more += ["--config.model.image.layers=1", "--config.model.text.layers=1"]
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(name):
        command = [sys.executable, "-m", "mmkd_jax", "sweep", "--workdir", str(tmp_path / name)]
        command += ["--config", f"{tiny.CONFIGS}/sweeps/leave_one_out.py:smoke,seeds=2", *tiny.overrides(*more)]
        return subprocess.Popen(command, cwd=TESTS.parent, env=environment, stderr=subprocess.PIPE, text=True)

    def kill_where(name, path, text, count):
        """Kills the sweep once a file of its folder holds `text` so many times."""
        process, path = start(name), tmp_path / name / path
        while not (path.exists() and path.read_text().count(text) >= count):
            assert process.poll() is None, process.stderr.read()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.02)
        process.kill()
        process.communicate()
        assert not (tmp_path / name / "table.json").exists()

    def finish(name):
        process = start(name)
        _, complaint = process.communicate()
        assert process.returncode == 0, complaint
        return {file: (tmp_path / name / file).read_bytes() for file in Sweep.FILES}

    kill_where("killed", "runs/teachers_alpha+beta,seed_1/metrics.jsonl", "\n", 2)
    kill_where("killed", "logs/runs.teachers_beta,seed_1.log", "$ mmkd eval", 1)
    assert finish("killed") == finish("whole")
    found = io.read_json(tmp_path / "whole" / "table.json")
    values = {table.key(value): value for value in found["settings"][0]["values"]}
    assert len(found["runs"]) == 6
    assert len(set(values["train", "", "loss"]["each"])) == 2
    assert ("zeroshot", "toy", "balanced_accuracy") in values
    assert len(os.listdir(tmp_path / "whole" / "shared")) == 1


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_holds_every_number_and_nothing_of_time(undisturbed):
    whole, _ = undisturbed
    found = io.read_json(whole.workdir / "table.json")
    assert found["title"] == "toy"
    assert found["missing"] == []
    assert [one["seeds"] for one in found["settings"]] == [2, 2, 2]
    assert [one["label"] for one in found["settings"]] == ["lr = 0.1", "lr = 0.2", "lr = 0.3"]
    from sweep_child import number

    values = {table.key(value): value for value in found["settings"][1]["values"]}
    assert set(values) == {
        ("zeroshot", "first", "balanced_accuracy"), ("zeroshot", "second", "balanced_accuracy"),
        ("zeroshot", "mean", "balanced_accuracy"), ("train", "", "loss"),
    }  # fmt: skip
    names = [f"lr_0.2,seed_{seed}" for seed in (0, 1)]
    losses = [number(name, 4) for name in names]
    assert values["train", "", "loss"]["each"] == losses
    means = [(number(name, "first") + number(name, "second")) / 2 for name in names]
    mean = values["zeroshot", "mean", "balanced_accuracy"]
    np.testing.assert_allclose(mean["value"], np.mean(means))
    low, high = stats.t.interval(0.95, 1, np.mean(means), stats.sem(means))
    np.testing.assert_allclose([mean["low"], mean["high"]], [low, high])
    assert mean["interval"] == "seeds"
    for name, data in whole.files().items():
        assert b"pairs_per_second" not in data, name
        assert str(whole.workdir).encode() not in data, name


def test_the_csv_is_the_table(undisturbed):
    whole, _ = undisturbed
    found = io.read_json(whole.workdir / "table.json")
    rows = list(csv.DictReader(memory.StringIO((whole.workdir / "table.csv").read_text())))
    expected = [(one["overrides"]["lr"], v) for one in found["settings"] for v in one["values"]]
    assert len(rows) == len(expected) == 12
    for row, (lr, value) in zip(rows, expected):
        assert (float(row["lr"]), row["metric"], float(row["value"])) == (lr, value["metric"], value["value"])
        assert (float(row["low"]), float(row["high"])) == (value["low"], value["high"])


def test_the_page_shows_every_setting_and_loads_nothing(undisturbed):
    whole, _ = undisturbed
    page = (whole.workdir / "report.html").read_text()
    for text in ("lr = 0.1", "lr = 0.3", "lr_0.2,seed_1", "mean zeroshot balanced accuracy", "final loss"):
        assert text in page
    assert not re.search(r"(src|href)=|<script|url\(", page)
    from xml.etree import ElementTree

    drawn = ElementTree.fromstring((whole.workdir / "sweep.svg").read_text())
    circles = [e for e in drawn.iter() if e.tag.endswith("circle")]
    assert len(circles) == 3 + 6  # means and seeds
    first = (whole.workdir / "table.md").read_text().splitlines()[0]
    assert first.startswith("| setting | seeds | mean zeroshot balanced accuracy |")


def test_the_interval_is_students():
    mean, low, high = table.over_seeds([1.0, 2.0, 4.0])
    np.testing.assert_allclose((low, high), stats.t.interval(0.95, 2, 7 / 3, stats.sem([1.0, 2.0, 4.0])))
    assert mean == pytest.approx(7 / 3)
    assert high - mean > 1.5 * 1.96 * stats.sem([1.0, 2.0, 4.0])  # three seeds say little: not a normal interval
    assert table.over_seeds([3.0]) == (3.0, None, None)
    rng = np.random.default_rng(0)
    covered = [low <= 0 <= high for _, low, high in (table.over_seeds(rng.normal(size=3)) for _ in range(2000))]
    assert abs(np.mean(covered) - 0.95) < 0.02


def toy_values(**numbers):
    return [
        {"task": "train", "dataset": "", "metric": name, "value": value, "low": None, "high": None}
        for name, value in numbers.items()
    ]


def test_one_seed_keeps_its_own_interval_and_gaps_are_left_out():
    run = plan.Run("runs/x", (), {"lr": 1, "seed": 3})
    value = {"task": "zeroshot", "dataset": "d", "metric": "m", "value": 0.5, "low": 0.4, "high": 0.7}
    one = table._setting(run, [{"values": [value, *toy_values(loss=2.0)]}])
    assert [(v["low"], v["high"], v["interval"]) for v in one["values"]] == [(0.4, 0.7, "cases"), (None, None, "")]
    assert one["overrides"] == {"lr": 1}
    two = table._setting(run, [{"values": toy_values(loss=2.0, extra=1.0)}, {"values": toy_values(loss=3.0)}])
    assert [(v["metric"], v["each"]) for v in two["values"]] == [("loss", [2.0, 3.0])]


def test_a_table_of_a_half_made_sweep_says_what_is_missing(workers, tmp_path):
    sweep = toy_plan(tmp_path / "out", "<b>one</b>".replace("/", "-"), "fails")
    runner.run(sweep, [{}])
    found = table.write(sweep)
    assert found["missing"] == ["fails"]
    assert "Missing: fails" in (tmp_path / "out" / "table.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>one" not in page
    assert "&lt;b&gt;one" in page


def test_scored_in_another_way_no_older_number_stays(written, workers, tmp_path):
    """Half a sweep is scored on one set, then all of it on another."""
    half = CONFIG.replace("range(2)", "range(1)")
    before = plan.load(written(half), [], tmp_path / "out")
    assert runner.run(before, [{}]) == []
    assert {value["dataset"] for value in table.collect(before)["runs"][0]["values"]} == {"first", "second", "mean", ""}
    after = plan.load(written(CONFIG.replace("somewhere", "elsewhere")), [], tmp_path / "out")
    assert not any(runner.is_done(after, one) for one in after.runs)
    assert runner.run(after, [{}]) == []
    runs = table.collect(after)["runs"]
    assert len(runs) == 6
    assert all({value["dataset"] for value in one["values"]} == {"third", ""} for one in runs)
    assert table.collect(before)["runs"] == []  # what is whole by other commands is not whole by these


def test_fields_that_change_no_result_may_change_between_parts_of_a_sweep(tmp_path):
    def load(*more):
        return plan.load(f"{tiny.CONFIGS}/sweeps/learning_rate.py:smoke", tiny.overrides(*more), tmp_path / "out")

    plan.claim(load())
    plan.claim(load("--config.watchdog=1.0", "--config.mesh.fsdp=2"))
    with pytest.raises(InputError, match=r"another config\.spikes\.action"):
        plan.claim(load("--config.spikes.action=skip"))


def test_the_command_names_what_failed(written, tmp_path, monkeypatch, workers, capsys):
    monkeypatch.setattr(devices, "groups", lambda each: [{}])
    address = written(CONFIG.replace('"name": "toy",', '"name": "toy", "t": "",').replace(
        'grids.grid({"lr": (0.1, config.lr * 2, 0.3), "seed": range(2)})', '[{"t": "fine"}, {"t": "fails"}]'
    ))  # fmt: skip
    assert cli.main(["sweep", "--config", address, "--workdir", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("mmkd sweep: 1 of 3 parts of the sweep failed, first runs/t_fails (exit code 3: this run")
    assert json.loads((tmp_path / "out" / "table.json").read_text())["missing"] == ["t_fails"]
