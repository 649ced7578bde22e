"""What all tests share: eight fake devices on the CPU, the `full` tier, and fixtures for real data and tiny sets.

Everything that must be in place before JAX starts is set while this file is imported, in every xdist worker too.
"""

import os
import pathlib
import sys

DEVICES = 8

assert "jax" not in sys.modules, "JAX was imported before the tests' conftest could give it its devices"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    if "--full" not in sys.argv:  # XLA's former way to make loops of fused operations compiles in less time
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import pytest  # noqa: E402
from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # libraries that read absl flags must not wait for app.run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the long checks (marker: full)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="a long check: run with --full"))


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The checkout."""
    return pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose programs run a few times only: compiling takes half the time without most optimisations.

    The processes that such a module starts do the same, so that they compute the same bits.
    """
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def mmkd_data() -> pathlib.Path:
    """The folder of real biomedical sets that the environment variable MMKD_DATA names; skips where it is unset."""
    if not os.environ.get("MMKD_DATA"):
        pytest.skip("needs real data: set MMKD_DATA to a folder of WebDataset sets (NAME/NAME.tar)")
    path = pathlib.Path(os.environ["MMKD_DATA"])
    assert path.is_dir(), f"MMKD_DATA names {path}, which is not a folder"
    return path
