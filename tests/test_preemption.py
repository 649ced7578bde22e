"""Stopped in every way that happens, and started again, a run ends bit for bit like one that nothing disturbed."""

import signal

import pytest
import train_fixtures as tiny
from test_train import assert_same

from mmkd_jax.errors import EXIT_PREEMPTED
from mmkd_jax.train import loop
from mmkd_jax.train.preemption import Notice, Preempted

pytestmark = pytest.mark.usefixtures("quick_compilation")


def config():
    return tiny.stage1(
        "--config.model.image.layers=1", "--config.model.text.layers=1", "--config.steps=12", "--config.save_every=5"
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, quick_compilation):
    return loop.run(config(), tmp_path_factory.mktemp("run") / "run")


def test_sigterm_saves_the_step_it_came_in_and_leaves(undisturbed, tmp_path, monkeypatch, capfd):
    real, before = loop.sharding.global_batch, signal.getsignal(signal.SIGTERM)
    calls = []

    def third(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop.sharding, "global_batch", third)
    with pytest.raises(Preempted) as left:
        loop.run(config(), tmp_path / "run")
    assert (left.value.code, left.value.step) == (EXIT_PREEMPTED, 3)
    assert "saving step 3" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "3" / "state").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    loop.run(config(), tmp_path / "run")
    assert len(calls) == 12  # nothing was done twice
    assert_same(tmp_path / "run", undisturbed)


def test_a_notice_is_heard_only_while_one_listens():
    with Notice() as notice:
        assert not notice.reached(1)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # schedulers repeat it
        assert notice.reached(2)
    with Notice() as notice:
        assert not notice.reached(1)
