"""What may import what, and the style that the code keeps: checked over the tree, and in fresh processes."""

import ast
import functools
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOREIGN = ("torch", "torchvision", "tensorflow", "open_clip", "timm", "keras")
CODE = sorted(p for folder in ("mmkd_jax", "teachers", "configs") for p in (ROOT / folder).rglob("*.py"))
MODULES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for p in CODE
    if p.is_relative_to(ROOT / "mmkd_jax") and p.name != "__main__.py"
)

# As if they were not installed: no finder finds them, and find_spec("tensorflow"), which etils asks, is None.
BLOCK = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {FOREIGN} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""
IMPORT_ALL = f"""
import importlib, sys
for name in {MODULES}:
    importlib.import_module(name)
print("foreign:", sorted(name for name in {FOREIGN} if name in sys.modules))
"""


def python(code: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250)


@pytest.mark.parametrize("before", ["", BLOCK], ids=["as installed", "foreign packages blocked"])
def test_every_module_imports_without_foreign_frameworks(before):
    run = python(before + IMPORT_ALL)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("foreign: []")


TRAIN = """
import sys
from mmkd_jax import cli
assert cli.main(sys.argv[1:]) == 0
print("foreign:", sorted(name for name in {FOREIGN} if name in sys.modules))
"""


@pytest.mark.parametrize(
    "before", ["", pytest.param(BLOCK, marks=pytest.mark.full)], ids=["as installed", "foreign packages blocked"]
)
def test_training_needs_and_loads_no_foreign_framework(before, tmp_path):
    """A whole run of stage 2, with its metrics and checkpoints, by the command line in a process of its own."""
    import train_fixtures as tiny

    root = tiny.world()
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # four steps: most of the time would go into compiling
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arguments = ["train", "--config", f"{tiny.CONFIGS}/stage2_mmkd.py:smoke", "--workdir", str(tmp_path / "run")]
    arguments += [f"--config.features={root / 'features'}", *tiny.overrides()]
    run = python(before + TRAIN.replace("{FOREIGN}", str(FOREIGN)), *arguments, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("foreign: []")
    assert len(tiny.losses(tmp_path / "run")) == 4
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


def test_a_foreign_framework_would_be_seen():
    """Negative control: a module of that name that a run loads is told, whatever it holds."""
    code = "import sys, types\nsys.modules['torch'] = types.ModuleType('torch')\n" + TRAIN.replace(
        "{FOREIGN}", str(FOREIGN)
    )
    run = python(code, "--version")
    assert run.stdout.strip().endswith("foreign: ['torch']")


def test_the_block_blocks():
    """Negative control of the test above."""
    for name in ("tensorflow", "torch"):
        assert f"ModuleNotFoundError: No module named '{name}'" in python(BLOCK + f"import {name}").stderr
    assert python(BLOCK + "import importlib.util as i; assert i.find_spec('torch') is None").returncode == 0


def imported(tree: ast.Module, *, top_level: bool) -> set[str]:
    """Top-level packages that a module imports: anywhere, or only while it is itself imported."""
    found = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name.split(".")[0] for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 0:
                found.add(child.module.split(".")[0])
            visit(child)

    visit(tree)
    return found


def test_what_imported_sees():
    tree = ast.parse("import a.b\nif x:\n  from c.d import e\ndef f():\n  import g")
    assert imported(tree, top_level=True) == {"a", "c"}
    assert imported(tree, top_level=False) == {"a", "c", "g"}


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_direction_of_dependencies(path):
    """teachers -> mmkd_jax, never back but for the command line and the demo, which load teachers lazily."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).parts[0]
    assert not imported(tree, top_level=True) & {"tests", "configs"}
    if package == "mmkd_jax":
        assert not imported(tree, top_level=False) & set(FOREIGN)
        assert "teachers" not in imported(tree, top_level=True)
    assert not imported(tree, top_level=True) & set(FOREIGN)


def declared(*extras: str) -> set[str]:
    """Distributions that pyproject.toml names, with those of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]
    return {Requirement(text).name.lower().replace("_", "-") for text in wanted}


@functools.cache
def holders_of_packages() -> dict[str, list[str]]:
    """The distributions that hold each package: {package: [distribution]}."""
    # google is a namespace that many share; google.protobuf is what is meant here.
    return {**metadata.packages_distributions(), "google": ["protobuf"]}


def undeclared(tree: ast.Module, names: set[str]) -> set[str]:
    """Packages that a module imports anywhere and that no distribution among `names` holds."""
    own = {*sys.stdlib_module_names, *FOREIGN, "mmkd_jax", "teachers"}
    return {
        package
        for package in imported(tree, top_level=False) - own
        if not {name.lower().replace("_", "-") for name in holders_of_packages().get(package, [])} & names
    }


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_imported_is_declared(path):
    """Not left to what another package happens to bring; a source may need the extra that it asks for."""
    names = declared("demo", "parquet") if "sources" in path.parts else declared()
    assert undeclared(ast.parse(path.read_text()), names) == set()


def test_undeclared_imports_are_seen():
    tree = ast.parse("import pytest, numpy, torch\ndef f():\n  import pydicom, transformers")
    assert undeclared(tree, declared()) == {"pytest", "pydicom", "transformers"}
    assert undeclared(tree, declared("demo", "test")) == set()


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_style(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 300, "a module of more than 300 lines: is there a second thing in it?"
    assert text == "" or ast.get_docstring(tree), "a module without a docstring"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines: its steps would read better by name"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
    for node in public(tree):
        assert ast.get_docstring(node), f"line {node.lineno}: {node.name} is public and has no docstring"


def public(tree: ast.Module) -> list[ast.ClassDef | ast.FunctionDef]:
    """Public functions and classes of a module, and the public methods of those classes."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef) and not node.bases:  # an override has its base's docstring
                found += [m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
    return found


def test_style_sees_what_is_missing():
    tree = ast.parse("class A:\n  def f(self): pass\n  def _g(self): pass\ndef h(): pass\nclass _B: pass")
    assert [node.name for node in public(tree)] == ["A", "f", "h"]
    assert not any(ast.get_docstring(node) for node in public(tree))


def closure(requirements: list[str]) -> dict[str, str]:
    """Installed packages that `requirements` bring with them: {package: the one that asked for it}."""
    found, queue = {}, [(requirement, "pyproject.toml") for requirement in requirements]
    while queue:
        text, why = queue.pop()
        requirement = Requirement(text)
        extras = requirement.extras or {""}
        name = requirement.name.lower().replace("_", "-")
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not wanted or name in found:
            continue
        found[name] = why
        try:
            children = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for child in children:
            marker = Requirement(child).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                queue.append((child.split(";")[0], name))
    return found


def test_no_requirement_brings_another_framework():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = closure(project["dependencies"] + extras["demo"] + extras["test"])
    assert {"jax", "numpy", "tensorstore", "pydicom"} <= set(found)  # tensorstore comes by way of orbax
    foreign = {name: why for name, why in found.items() if name.split("-")[0] in (*FOREIGN, "tf", "nvidia")}
    assert set(foreign) <= {"tensorflow-datasets", "tensorflow-metadata"}  # which need no TensorFlow
    assert not {"tensorflow", "torch"} & set(found)


def test_nothing_of_one_machine_in_tracked_files():
    """No absolute path of a checkout, a home folder or a temporary folder in code and documents."""
    wrong = re.compile(r"(?<![\w.$}-])/(work|root|home/\w+|tmp/\w+)/")
    files = [*CODE, *ROOT.glob("*.*"), *ROOT.glob("launch/*"), *ROOT.glob("tests/*.*"), *ROOT.glob("*/README.md")]
    for path in files:
        if path.is_file() and path != pathlib.Path(__file__):
            assert not wrong.search(path.read_text()), path


def test_wrong_paths_are_seen():
    for text, seen in [(" /home/me/x", True), ("cd /home/me", True), ("$root/x", False), ("a/home/b", False)]:
        assert bool(re.search(r"(?<![\w.$}-])/(work|root|home/\w+|tmp/\w+)/", text + "/")) is seen, text
