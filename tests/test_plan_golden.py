"""Plans for TPUs against recorded ones: FLOPs, collectives and peak memory, by the compiler they were recorded with.

`python tests/test_plan_golden.py NAME ...` records plans anew (all without names). Compiled programs are kept in the
folder MMKD_PLANS, where it is set; there a program is not compiled again that the same sources, config and versions of
the compiler made.
"""

import importlib.metadata
import json
import os
import pathlib
import sys

import pytest
import train_fixtures as tiny

from mmkd_jax import cli, io

GOLDEN = pathlib.Path(__file__).parent / "golden" / "plans"
LAYERS = ("--config.remat=full", "--config.dtype=bfloat16", "--config.batch=64")
FULL = ("--config.batch=16384",)
VIT_L = ("width=1024", "layers=24", "heads=16", "mlp_width=4096", "patch=14")
VIT_H = ("width=1280", "layers=32", "heads=16", "mlp_width=5120", "patch=14")


def image(fields: tuple[str, ...]) -> tuple[str, ...]:
    """Changes for an image tower of another size, on a mesh that divides the weights over one side of the torus."""
    return (*FULL, "--config.mesh.fsdp=4", *(f"--config.model.image.{field}" for field in fields))


# What is planned: config, its changes, topology.
PLANS = {
    "smoke-v5e-2x4": ("stage1_clip.py:smoke", LAYERS, "v5e:2x4"),
    "smoke-2x-v5e-2x4": ("stage2_mmkd.py:recipe=plus,smoke", (*LAYERS, "--config.mesh.slices=2"), "v5e:2x4"),
    "stage1-v5e-16x16": ("stage1_clip.py", FULL, "v5e:16x16"),
    "stage1-v6e-16x16": ("stage1_clip.py", FULL, "v6e:16x16"),
    "stage1-v5p-4x4x4": ("stage1_clip.py", FULL, "v5p:4x4x4"),
    "stage2-v5e-16x16": ("stage2_mmkd.py:recipe=plus", FULL, "v5e:16x16"),
    "stage2-v6e-16x16": ("stage2_mmkd.py:recipe=plus", FULL, "v6e:16x16"),
    "stage2-v5p-4x4x4": ("stage2_mmkd.py:recipe=plus", FULL, "v5p:4x4x4"),
    "vit-l-v5p-4x4x4": ("stage1_clip.py", image(VIT_L), "v5p:4x4x4"),
    "vit-h-v5p-4x4x4": ("stage1_clip.py", image(VIT_H), "v5p:4x4x4"),
    "stage1-2x-v5e-16x16": ("stage1_clip.py", (*FULL, "--config.mesh.slices=2"), "v5e:16x16"),
}
KEPT = ("batch", "mesh", "fits", "versions", "cycles", "collectives", "warnings")
RECORDED = sorted(path.stem for path in GOLDEN.glob("*.json"))


def planned(name: str, out: pathlib.Path) -> dict:
    """What is compared of a plan."""
    address, changes, topology = PLANS[name]
    out = pathlib.Path(os.environ.get("MMKD_PLANS", out)) / name
    words = ("--config", f"{tiny.CONFIGS}/{address}", "--topology", topology, "--out", str(out), *changes)
    assert cli.main(["plan", *words, "--limit", "180"]) == 0
    made = json.loads(next(out.glob("*.json")).read_text())
    versions = {package: version for package, version in made["versions"].items() if package != "python"}
    kept = {key: made[key] for key in KEPT} | {"versions": versions}
    return kept | {"peak": made["memory"]["peak"], "flops": made["flops"]["counted"]}


def test_there_is_something_recorded():
    assert RECORDED
    assert set(RECORDED) <= set(PLANS)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_plans_fit_and_exchange_what_they_must(name):
    """A warning would say of a gradient that is reduced twice, a matrix of all pairs, a side that travels twice ..."""
    recorded = json.loads((GOLDEN / f"{name}.json").read_text())
    assert recorded["fits"]
    assert recorded["warnings"] == []


@pytest.mark.full
@pytest.mark.timeout(11_000)
@pytest.mark.parametrize("name", RECORDED)
def test_plans_are_as_recorded(name, tmp_path):
    """Exactly, since the same compiler makes the same program; another compiler is no error of ours."""
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    for package in ("jax", "libtpu"):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
        if found != expected["versions"][package]:
            pytest.skip(f"recorded with {package} {expected['versions'][package]}, here is {found}")
    made = planned(name, tmp_path)
    assert {key: made[key] for key in made if key != "versions"} == {
        key: expected[key] for key in expected if key != "versions"
    }


if __name__ == "__main__":
    import tempfile

    for chosen in sys.argv[1:] or PLANS:
        with tempfile.TemporaryDirectory() as folder:
            io.write_json(GOLDEN / f"{chosen}.json", planned(chosen, pathlib.Path(folder)))
