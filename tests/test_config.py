"""Configs: what loads, how overrides are typed, and that everything wrong is one line with the near matches."""

import json

import pytest
from absl import flags

from mmkd_jax import config
from mmkd_jax.errors import InputError

FILE = """
from ml_collections import ConfigDict, config_dict
from mmkd_jax.config import parse_arg

def get_config(arg=""):
    arg = parse_arg(arg, smoke=False, res=224, rate=0.5, name="vit", teacher=None)
    c = ConfigDict()
    c.size = arg.res
    c.double = c.get_ref("size") * 2
    c.name = arg.name
    c.smoke = arg.smoke
    c.train = ConfigDict({"lr": 1e-3, "steps": 100, "betas": (0.9, 0.99), "path": config_dict.placeholder(str)})
    c.eval = ConfigDict({"steps": 10, "sets": ("busi", "nih"), "nested": {"depth": 2}})
    c.nothing = None
    c.listed = [1, 2]
    return c
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.config.py"  # a dot in the name and no colon arguments taken for it
    path.write_text(FILE)
    return str(path)


def error(address, *overrides) -> str:
    with pytest.raises(InputError) as caught:
        config.load(address, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(tmp_path, text) -> str:
    path = tmp_path / "wrong.py"
    path.write_text(text)
    return str(path)


def test_defaults(file):
    loaded = config.load(file)
    assert (loaded.size, loaded.double, loaded.train.lr, loaded.eval.sets) == (224, 448, 1e-3, ("busi", "nih"))
    assert loaded.is_locked
    with pytest.raises(AttributeError):
        loaded.train.learning_rate = 1.0


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("--config.train.lr=3", "train.lr", 3.0),
        ("--config.train.lr=1e-4", "train.lr", 1e-4),
        ("--config.size=10", "size", 10),
        ("--config.name=a=b,c d", "name", "a=b,c d"),
        ("--config.name=", "name", ""),
        ("--config.smoke", "smoke", True),
        ("--config.smoke=TRUE", "smoke", True),
        ("--noconfig.smoke", "smoke", False),
        ("--config.eval.sets=('ham',)", "eval.sets", ("ham",)),
        ("--config.eval.sets=['ham', 'odir']", "eval.sets", ("ham", "odir")),
        ("--config.eval.sets=()", "eval.sets", ()),
        ("--config.train.betas=(1, 0.5)", "train.betas", (1.0, 0.5)),
        ("--config.train.path=gs://bucket/x", "train.path", "gs://bucket/x"),
        ("--config.eval.nested.depth=7", "eval.nested.depth", 7),
    ],
)
def test_override(file, override, field, value):
    got = config.load(file, [override])
    for part in field.split("."):
        got = got[part]
    assert got == value
    assert type(got) is type(value)
    if isinstance(value, tuple):
        assert [type(v) for v in got] == [type(v) for v in value]


def test_the_last_override_counts_and_references_follow(file):
    loaded = config.load(file, ["--config.size=1", "--config.train.lr=1", "--config.size=5", "--config.train.lr=2"])
    assert (loaded.size, loaded.double, loaded.train.lr) == (5, 10, 2.0)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("--config.train.lrr=1", "'train.lr'"),
        ("--config.lr=1", "'train.lr'"),
        ("--config.steps=1", "'train.steps'"),
        ("--config.steps=1", "'eval.steps'"),
        ("--config.zzzz=1", "known: "),
        ("--config.train.lr.x=1", "'train.lr'"),
        ("--config.size=1.5", "config.size takes int, not '1.5'"),
        ("--config.size=", "takes int"),
        ("--config.train.lr=fast", "takes float"),
        ("--config.smoke=perhaps", "takes bool"),
        ("--config.size", "--config.size=VALUE"),
        ("--noconfig.size", "--config.size=VALUE"),
        ("--noconfig.smoke=true", "--config.smoke=VALUE"),
        ("--config.eval.sets=ham", "is a tuple"),
        ("--config.eval.sets=9", "is a tuple"),
        ("--config.eval.sets=(9,)", "holds str, not 9"),
        ("--config.train.betas=('a',)", "holds float, not 'a'"),
        ("--config.train=3", "is a section: set one of its fields (betas, lr, path, steps)"),
        ("--config.nothing=3", "placeholder"),
        ("--config.listed=[3]", "is a list"),
        ("config.size=3", "--config.field=VALUE"),
        ("--config.=3", "--config.field=VALUE"),
        ("--config..=3", "no field"),
    ],
)
def test_wrong_override(file, override, wanted):
    assert wanted in error(file, override)


def test_colon_arguments(file):
    loaded = config.load(f"{file}:smoke,res=128,name=b=c")
    assert (loaded.smoke, loaded.size, loaded.double, loaded.name) == (True, 128, 256, "b=c")
    assert config.load(f"{file}:smoke=false").smoke is False
    assert config.load(f"{file}:").size == 224
    assert config.parse_arg("teacher=x,rate=2", teacher=None, rate=0.5).to_dict() == {"teacher": "x", "rate": 2.0}


@pytest.mark.parametrize(
    ("arg", "wanted"),
    [
        ("smok", "did you mean 'smoke'"),
        ("res=x", "takes int, not 'x'"),
        ("res", "res=VALUE"),
        ("smoke,smoke", "twice"),
        ("smoke,,res=1", "unknown config argument ''"),
        ("smoke=maybe", "takes bool"),
    ],
)
def test_wrong_colon_arguments(file, arg, wanted):
    message = error(f"{file}:{arg}")
    assert wanted in message
    assert file in message


def test_wrong_files(tmp_path):
    assert "no config file" in error(str(tmp_path / "absent.py"))
    assert "path/to/file.py" in error(str(tmp_path))
    assert "path/to/file.py" in error("")
    assert "get_config" in error(write(tmp_path, "x = 1"))
    assert "line 2: SyntaxError" in error(write(tmp_path, "x = 1\ndef ("))
    assert "line 2: ModuleNotFoundError" in error(write(tmp_path, "x = 1\nimport no_such_module"))
    assert "line 3: ZeroDivisionError" in error(write(tmp_path, "def get_config(arg=''):\n  x = 0\n  return 1 / x"))
    assert "gives dict" in error(write(tmp_path, "def get_config(arg=''):\n  return {}"))
    assert "takes no arguments" in error(write(tmp_path, "def get_config():\n  return None") + ":smoke")


def test_a_required_field_must_be_given(tmp_path):
    path = write(
        tmp_path,
        "from ml_collections import ConfigDict, config_dict\n"
        "def get_config():\n"
        "  return ConfigDict({'a': {'n': config_dict.placeholder(int, required=True)}, 'b': 1})\n",
    )
    assert error(path) == "needs a value: --config.a.n=..."
    assert error(path, "--config.b=2") == "needs a value: --config.a.n=..."
    assert "takes int" in error(path, "--config.a.n=x")
    assert config.load(path, ["--config.a.n=3"]).a.n == 3


def test_what_has_no_json_form_is_refused(tmp_path):
    path = write(
        tmp_path, "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'a': {'f': len}})\n"
    )
    assert "config.a.f is a builtin_function_or_method" in error(path)


def test_to_dict_is_json_with_references_resolved(file):
    record = config.to_dict(config.load(file, ["--config.size=3"]))
    assert json.loads(json.dumps(record)) == record
    assert record["double"] == 6
    assert record["eval"]["sets"] == ["busi", "nih"]
    assert record["train"]["path"] is None


def test_nothing_global_is_left(file):
    before = set(flags.FLAGS)
    first = config.load(file, ["--config.size=1"])
    second = config.load(f"{file}:res=2")
    assert (first.size, second.size) == (1, 2)
    assert set(flags.FLAGS) == before
