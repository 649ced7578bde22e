"""The optional wandb writer, with a stand-in for the package: off by default, the same run after a restart."""

import sys
import types

import pytest

from mmkd_jax import io
from mmkd_jax.errors import InputError
from mmkd_jax.train import metrics

CONFIG = {"name": "run", "wandb": "project", "optimizer": {"lr": 0.1}}


@pytest.fixture
def wandb(monkeypatch):
    """A module `wandb` that keeps what it is told: `wandb.made` has a dict for each run."""
    module = types.ModuleType("wandb")
    module.made = []

    def init(**options):
        record = {"options": options, "lines": [], "finished": False}
        module.made.append(record)
        return types.SimpleNamespace(
            log=lambda scalars, step: record["lines"].append((step, dict(scalars))),
            finish=lambda: record.update(finished=True),
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def log(workdir, start, config, *steps):
    writer = metrics.MetricsLog(io.as_path(workdir), start, config)
    for step in steps:
        writer.write(step, {"loss": step / 2})
    writer.close()


def test_scalars_go_to_the_named_project_too(wandb, tmp_path):
    log(tmp_path, 0, CONFIG, 1, 2)
    (made,) = wandb.made
    assert made["lines"] == [(1, {"loss": 0.5}), (2, {"loss": 1.0})]
    assert made["finished"]
    options = made["options"]
    assert (options["project"], options["name"], options["config"]) == ("project", "run", CONFIG)
    assert options["dir"] == str(tmp_path)
    assert [line["loss"] for line in metrics.read(tmp_path)] == [0.5, 1.0]


def test_a_restart_goes_on_in_the_same_run_and_another_folder_in_another(wandb, tmp_path):
    log(tmp_path / "a", 0, CONFIG, 1, 2, 3)
    log(tmp_path / "a", 2, CONFIG, 3, 4)
    log(tmp_path / "b", 0, CONFIG, 1)
    first, again, other = (made["options"] for made in wandb.made)
    assert first["id"] == again["id"] != other["id"]
    assert again["resume"] == "allow"
    assert [step for step, _ in wandb.made[1]["lines"]] == [3, 4]


@pytest.mark.parametrize("config", [{"name": "run"}, {"name": "run", "wandb": ""}])
def test_it_is_off_by_default(wandb, tmp_path, config):
    log(tmp_path, 0, config, 1)
    assert wandb.made == []
    assert not (tmp_path / "wandb.json").exists()


def test_only_the_first_process_writes(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    log(tmp_path, 0, CONFIG, 1)
    assert wandb.made == []


def test_without_the_package_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(
        InputError, match=r"config\.wandb asks for wandb, which is not installed; install the extra"
    ) as error:
        log(tmp_path, 0, CONFIG, 1)
    assert "\n" not in str(error.value)
    log(tmp_path, 0, {**CONFIG, "wandb": ""}, 1)


def test_shipped_configs_have_the_field_and_leave_it_empty(repository):
    from mmkd_jax import config as configs

    for name in ("stage1_clip", "stage2_mmkd"):
        assert configs.load(f"{repository}/configs/{name}.py").wandb == ""
