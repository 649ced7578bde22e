"""The command line: exit codes, one-line errors, and help that does not load what is heavy."""

import argparse
import errno
import subprocess
import sys
import time
import types
import warnings

import pytest

from mmkd_jax import cli
from mmkd_jax.errors import InputError

HEAVY = ("jax", "flax", "numpy", "orbax", "grain", "transformers", "tensorflow", "torch")


@pytest.fixture
def verb(monkeypatch):
    """Puts a command `train` of the test's own in place: verb(run, configure)."""

    def install(run, configure=lambda parser: None):
        module = types.ModuleType("mmkd_jax.commands.train")
        module.HELP, module.run, module.configure = "train something", run, configure
        monkeypatch.setitem(sys.modules, "mmkd_jax.commands.train", module)

    return install


def raising(error):
    def run(args):
        raise error

    return run


def test_verbs_are_the_modules_of_commands(repository):
    assert set(cli.VERBS) == {p.stem for p in (repository / "mmkd_jax/commands").glob("*.py")} - {"__init__"}
    for name in cli.VERBS:
        command = cli.load_command(name)
        assert command.HELP, name
        assert "\n" not in command.HELP, name
        assert len(command.HELP) < 100, name


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], []])
def test_help_lists_every_verb(arguments, capsys):
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for name in cli.VERBS:
        assert f"\n  {name} " in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_of_a_verb(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: mmkd {name}")


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys; from mmkd_jax import cli; assert cli.main(['--help']) == 0;"
        "[cli.main([verb, '--help']) for verb in cli.VERBS];"
        f"print('heavy:', sorted(set({HEAVY}) & set(sys.modules)))"
    )
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("heavy: []")
    assert time.monotonic() - start < 10  # a tenth of a second on an idle machine; JAX alone takes longer


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert "jax" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'"),
        (["train", "--confg", "x"], "did you mean '--config'"),
        (["train"], "--config"),
        (["train", "--config"], "expected one argument"),
        (["train", "--config", "x.py", "stray"], "unexpected argument 'stray'"),
        (["train", "--config", "x.py", "--steps", "many"], "invalid int value: 'many'"),
        (["train", "--conf", "x.py"], "--conf"),  # no abbreviations
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(verb, arguments, wanted, capsys):
    def configure(parser):
        cli.add_config(parser)
        parser.add_argument("--steps", type=int)

    verb(raising(AssertionError("must not run")), configure)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert wanted in captured.err
    assert captured.err.count("\n") == 1


def test_config_fields_pass_through(verb):
    seen = []
    verb(seen.append, cli.add_config)
    assert cli.main(["train", "--config.a.b=1", "--config", "x.py:smoke", "--noconfig.c", "--config.d"]) == 0
    assert seen[0].config == "x.py:smoke"
    assert seen[0].overrides == ["--config.a.b=1", "--noconfig.c", "--config.d"]
    assert cli.main(["train", "--config", "x.py"]) == 0
    assert seen[1].overrides == []


def test_config_fields_where_there_is_no_config(verb, capsys):
    verb(raising(AssertionError("must not run")))
    assert cli.main(["train", "--config.a=1"]) == 2
    assert "takes no config fields" in capsys.readouterr().err
    verb(raising(AssertionError("must not run")), lambda parser: cli.add_config(parser, required=False))
    assert cli.main(["train", "--config.a=1"]) == 2
    assert "needs a config" in capsys.readouterr().err


def test_options_behind_a_nested_verb(verb, capsys):
    def configure(parser):
        show = parser.add_subparsers(dest="action", required=True).add_parser("show")
        show.add_argument("name")

    seen = []
    verb(seen.append, configure)
    assert cli.main(["train", "show", "x", "--verbose"]) == 0
    assert (seen[0].action, seen[0].name, seen[0].verbose) == ("show", "x", True)
    assert cli.main(["train", "shwo", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_wrong_input_is_one_line(verb, capsys):
    verb(raising(InputError("the set /x\nis damaged")))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "mmkd train: the set /x is damaged\n"


def test_verbose_shows_where_it_went_wrong(verb, capsys):
    verb(raising(InputError("the set is damaged")))
    assert cli.main(["train", "--verbose"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("mmkd train: the set is damaged\n")


def test_other_ways_out(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "mmkd train: interrupted\n"
    verb(raising(SystemExit(75)))
    assert cli.main(["train"]) == 75
    verb(raising(OSError(errno.ENOSPC, "No space left on device", "/full/disk")))
    assert cli.main(["train"]) == 2
    assert "/full/disk: No space left on device" in capsys.readouterr().err
    verb(raising(OSError(errno.EIO, "Input/output error")))  # nobody's input is wrong: keep the traceback
    with pytest.raises(OSError, match="Input/output"):
        cli.main(["train"])
    verb(raising(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError):
        cli.main(["train"])


def test_warnings_are_one_line_and_do_not_outlive_the_command(verb, capsys):
    def run(args: argparse.Namespace):
        warnings.warn("donated buffers were not usable", UserWarning, stacklevel=1)
        warnings.warn("old name", FutureWarning, stacklevel=1)

    before = warnings.showwarning
    verb(run)
    assert cli.main(["train"]) == 0
    assert capsys.readouterr().err == "warning: donated buffers were not usable\n"
    assert warnings.showwarning is before


def test_a_reader_that_leaves_early():
    code = "import sys; from mmkd_jax import cli; sys.exit(cli.main(['--help']))"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert run.stderr.read() == ""
    run.stderr.close()
    assert run.wait(timeout=60) == 141


def test_python_dash_m():
    run = subprocess.run([sys.executable, "-m", "mmkd_jax", "trian"], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("mmkd: there is no command 'trian'")
