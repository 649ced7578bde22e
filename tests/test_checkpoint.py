"""Checkpoints: what counts, what stays, what comes back, and what a full disk or a damaged file does to them."""

import logging
import os
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmkd_jax import cli, io
from mmkd_jax.errors import InputError
from mmkd_jax.specs import ModelSpec
from mmkd_jax.train import checkpoint, checkpoint_tools, checksums, commits, sharding
from mmkd_jax.train.retention import Retention

META = checkpoint.describe(ModelSpec(), {"vocab.txt": b"a\nb\n"}, {"save_every": 2, "keep": 2}, {"set": "1"})


def tree(seed=0):
    draw = np.random.default_rng(seed)
    kernel = draw.normal(size=(2, 16, 8)).astype(np.float32)
    return {
        "params": {"image": {"kernel": kernel, "bias": draw.normal(size=16).astype(np.float32)}},
        "step": np.asarray(seed, np.int32),
    }


def on(mesh_sizes, values, devices=None):
    """`values` on a mesh, kernels divided over `fsdp`; and their placements."""
    mesh = sharding.make_mesh(mesh_sizes, devices)
    place = lambda x: NamedSharding(mesh, PartitionSpec(*((None, "fsdp") if x.ndim == 3 else ())))  # noqa: E731
    return jax.tree.map(lambda x: jax.device_put(x, place(x)), values)


def like(values):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), values)


def save(saver, step, scalars=None, values=None):
    saver.save(step, values or on({"data": -1}, tree(step)), META, scalars)


def written(folder, steps=(2, 4), **options):
    saver = checkpoint.Checkpoints(folder, **options)
    for step in steps:
        save(saver, step, {"loss": 1.0 / step})
    saver.close()
    return folder


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)
    return True


# Checksums


def reference(x):
    """The definition, word by word, in Python's own integers."""
    data = np.ascontiguousarray(x)
    words = data.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[data.dtype.itemsize] if data.ndim else None)
    words = words.ravel() if data.ndim else np.frombuffer(data.tobytes(), np.uint32)
    return sum(int(word) * (((i * 0x9E3779B1) % 2**32) | 1) for i, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16, np.int32, np.uint32, np.int8, np.bool_])
def test_a_checksum_is_what_it_says(kind):
    x = np.random.default_rng(0).normal(scale=50, size=(3, 4, 5)).astype(kind)
    assert checksums.checksums({"x": jnp.asarray(x)}) == {"x": reference(x)}


def test_a_checksum_is_the_same_on_any_mesh_and_sees_every_bit():
    values = tree()
    expected = {"params/image/kernel", "params/image/bias", "step"}
    sums = checksums.checksums(on({"data": 1}, values, jax.devices()[:1]))
    assert set(sums) == expected
    for sizes in ({"data": 4, "fsdp": 2}, {"data": 1, "fsdp": -1}, {"data": -1}):
        assert checksums.checksums(on(sizes, values)) == sums
    kernel = values["params"]["image"]["kernel"]
    for bit in range(0, kernel.nbytes * 8, 97):
        flipped = bytearray(kernel.tobytes())
        flipped[bit // 8] ^= 1 << bit % 8
        assert reference(np.frombuffer(flipped, np.float32)) != sums["params/image/kernel"]
    swapped = kernel.swapaxes(0, 1).reshape(kernel.shape)
    assert checksums.differing({"params": {"image": {"kernel": swapped}}}, sums) == ["params/image/kernel"]
    assert checksums.differing(values, sums) == []


@pytest.mark.parametrize("spec", [(), ("fsdp",), (("fsdp", "data"),), (None, "data"), ("data", None, "fsdp")])
def test_every_device_sums_its_own_share_and_waits_for_no_other(spec):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    x = np.random.default_rng(1).normal(size=(8, 2, 4)).astype(np.float32)
    leaf = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert checksums.checksums({"x": leaf}) == {"x": reference(x)}
    # Dozens of these are in flight at once: one that waits for others can take the thread they would need.
    program = checksums._sum_of_shares(mesh, leaf.sharding.spec).lower(leaf).compile().as_text()
    assert not re.search("all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all", program)


# What stays


def kept_after(retention, steps, scalars=lambda step: {}):
    saved = {}
    for step in steps:
        saved[step] = scalars(step)
        saved = {one: saved[one] for one in retention.stay(saved)}
    return sorted(saved)


def test_regular_ones_stay_by_number_and_temporary_ones_until_the_next():
    assert kept_after(Retention(every=10, keep=2), [10, 20, 30]) == [20, 30]
    assert kept_after(Retention(every=10, keep=2), [10, 13, 16, 20, 25]) == [10, 20, 25]
    assert kept_after(Retention(every=10, keep=1), [3, 7]) == [7]
    assert kept_after(Retention(every=10, keep=3), [10, 20, 23, 30, 37]) == [10, 20, 30, 37]


def test_the_best_stays_too():
    loss = {10: 3.0, 13: 1.0, 20: float("nan"), 30: 2.0, 40: 2.5}
    scalars = lambda step: {"loss": loss[step]}  # noqa: E731
    assert kept_after(Retention(10, 1, "min:loss"), loss, scalars) == [13, 40]
    assert kept_after(Retention(10, 1, "max:loss"), loss, scalars) == [10, 40]
    assert kept_after(Retention(10, 1), loss, scalars) == [40]
    assert Retention(1, 1, "min:loss").best_of({1: {"loss": 1.0}, 2: {"loss": 1.0}, 3: {}}) == 2
    assert Retention(1, 1, "min:loss").best_of({1: {}}) is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"best": "loss"}, "must be min:NAME or max:NAME"),
        ({"best": "least:loss"}, "must be min:NAME or max:NAME"),
        ({"keep": 0}, "must be at least 1"),
        ({"every": 0}, "must be at least 1"),
    ],
)
def test_wrong_retention_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        Retention(**options)


def test_a_scalar_that_is_not_reported_cannot_be_best(tmp_path):
    saver = checkpoint.Checkpoints(tmp_path, best="min:los")
    with pytest.raises(InputError, match="did you mean 'loss'"):
        save(saver, 1, {"loss": 1.0})
    saver.close()


def test_on_disk_is_what_should_stay(tmp_path):
    saver = checkpoint.Checkpoints(tmp_path, every=10, keep=1, best="min:loss")
    for step, loss in {10: 3.0, 13: 1.0, 20: 2.0, 25: 4.0, 30: 2.5}.items():
        save(saver, step, {"loss": loss})
    saver.close()
    assert sorted(int(name) for name in os.listdir(tmp_path / "checkpoints")) == [13, 30]
    assert commits.committed(io.as_path(tmp_path / "checkpoints")) == [13, 30]


def test_a_scalar_that_is_no_number_is_left_out(tmp_path):
    """Of a step that was skipped; it is no reason to refuse the save, and never the best."""
    saver = checkpoint.Checkpoints(tmp_path, every=10, keep=1, best="min:loss")
    for step, loss in {10: 2.0, 20: float("nan"), 30: 3.0}.items():
        save(saver, step, {"loss": loss, "grad_norm": 1.0})
        saver._settle()
        scalars = (tmp_path / "checkpoints" / str(step) / "metrics" / "metrics").read_text()
        assert io.json.loads(scalars) == {"grad_norm": 1.0, **({} if step == 20 else {"loss": loss})}
    saver.close()
    assert checkpoint.Checkpoints(tmp_path).steps() == [10, 30]


def test_going_back_deletes_what_is_newer_than_the_regular_one(tmp_path, full_disk):
    saver = checkpoint.Checkpoints(tmp_path, every=10, keep=3)
    for step in (10, 17, 20):
        save(saver, step)
    saver._settle()
    full_disk()
    save(saver, 25, values=big(25))
    assert saver.back(20) == 10
    full_disk(False)
    save(saver, 13)  # smaller than what was there before
    saver.close()
    assert checkpoint.Checkpoints(tmp_path).steps() == [10, 13]
    again = checkpoint.Checkpoints(tmp_path, every=10)
    assert again.back(10) == 0
    assert again.steps() == []
    again.close()


def test_by_time_one_is_due_when_the_minutes_have_passed(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    saver = checkpoint.Checkpoints(tmp_path, every=100, minutes=2.0)
    assert saver.due(100)
    assert not saver.due(150)
    now[0] += 119
    assert not saver.overdue()
    now[0] += 2
    assert saver.overdue()
    save(saver, 7)
    assert not saver.overdue()
    saver.close()
    never = checkpoint.Checkpoints(tmp_path / "other", minutes=0.0)
    now[0] += 1e9
    assert not never.overdue()
    never.close()


# What counts


def test_what_was_saved_comes_back_on_any_mesh(tmp_path):
    values = on({"data": 4, "fsdp": 2}, tree(4))
    saver = checkpoint.Checkpoints(tmp_path)
    save(saver, 4, values=values)
    saver.close()
    for sizes, devices in (({"data": -1}, 8), ({"data": 2}, 2), ({"data": 1}, 1), ({"data": 1, "fsdp": 8}, 8)):
        wanted = like(on(sizes, tree(0), jax.devices()[:devices]))
        again, meta = checkpoint.Checkpoints(tmp_path).restore(4, wanted)
        assert same(again, tree(4))
        assert meta["data"] == META["data"]
        placed = again["params"]["image"]["kernel"].sharding
        assert placed.is_equivalent_to(wanted["params"]["image"]["kernel"].sharding, 3)


def test_a_checkpoint_counts_when_its_mark_is_there(tmp_path):
    written(tmp_path)
    (tmp_path / "checkpoints" / "4" / commits.COMMIT).unlink()
    saver = checkpoint.Checkpoints(tmp_path)
    assert saver.latest() == 2
    assert saver.steps() == [2]
    assert checkpoint.find(tmp_path).name == "2"
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.find(tmp_path / "checkpoints" / "4")
    save(saver, 4)  # what an interrupted save left is written over
    save(saver, 6)
    (tmp_path / "checkpoints" / "5").mkdir()
    saver.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["4", "6"]


def test_nothing_is_renamed(tmp_path, monkeypatch):
    """Object stores cannot."""

    def refuse(source, *rest, **options):
        assert "checkpoints" not in os.fspath(source), f"renamed {source}"

    for name in ("rename", "renames", "replace"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(shutil, "move", refuse)
    saver = checkpoint.Checkpoints(tmp_path)
    save(saver, 1)
    saver.close()
    monkeypatch.undo()
    assert checkpoint.Checkpoints(tmp_path).latest() == 1


def test_half_deleted_it_does_not_count(tmp_path, monkeypatch):
    saver = checkpoint.Checkpoints(tmp_path, keep=1)
    save(saver, 1)
    save(saver, 2)
    saver._settle()

    def stopped(step):
        assert not (tmp_path / "checkpoints" / str(step) / commits.COMMIT).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(saver._manager, "delete", stopped)
    with pytest.raises(KeyboardInterrupt):
        saver.close()
    assert (tmp_path / "checkpoints" / "1").exists()
    assert checkpoint.Checkpoints(tmp_path).steps() == [2]


# Faults


@pytest.fixture
def full_disk(monkeypatch):
    """A function that makes every file of more than a kilobyte fail, in native code too, or lets them be again."""
    monkeypatch.setattr(checkpoint, "PAUSES", (0.0, 0.0, 0.0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(full=True):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]) if full else before)

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_storage_librarys_pages_are_told_where_they_are_asked_for():
    absl = logging.getLogger("absl")
    told = lambda place: absl.filter(absl.makeRecord("absl", logging.ERROR, place, 1, "a page", (), None))  # noqa: E731
    before = absl.level
    try:
        absl.setLevel(logging.ERROR)
        assert not told("/lib/orbax/checkpoint/manager.py")
        assert told("/lib/grain/reader.py")
        absl.setLevel(logging.INFO)  # --verbose
        assert told("/lib/orbax/checkpoint/manager.py")
    finally:
        absl.setLevel(before)


def big(step):
    return on({"data": -1}, {"params": {"kernel": np.random.default_rng(step).normal(size=(64, 64))}})


def test_a_save_that_fails_is_tried_again_with_a_later_state(tmp_path, full_disk, caplog):
    saver = checkpoint.Checkpoints(tmp_path, every=2)
    save(saver, 2, values=big(2))
    saver._settle()
    full_disk()
    save(saver, 4, values=big(4))
    saver._settle()
    assert saver.steps() == [2]
    assert saver.overdue()  # at the next occasion, not only at the next regular step
    full_disk(False)
    save(saver, 5, values=big(5))
    saver.close()
    assert checkpoint.Checkpoints(tmp_path).steps() == [2, 5]
    warnings = [record for record in caplog.records if record.name == "mmkd_jax.train.checkpoint"]
    assert [record.levelno for record in warnings] == [logging.WARNING]
    assert "checkpoint 4 of" in warnings[0].getMessage()


def test_a_disk_that_stays_full_ends_the_run_and_leaves_the_last_good_checkpoint(tmp_path, full_disk):
    saver = checkpoint.Checkpoints(tmp_path)
    save(saver, 2, values=big(2))
    saver._settle()
    full_disk()
    save(saver, 4, values=big(4))
    with pytest.raises(InputError, match=r"attempt 4; the last good one is .*/checkpoints/2; the same") as caught:
        saver.close()
    assert "File too large" in str(caught.value)
    assert "\n" not in str(caught.value)
    full_disk(False)
    again = checkpoint.Checkpoints(tmp_path)
    assert again.latest() == 2
    assert same(again.restore(2, like(big(0)))[0], big(2))


@pytest.mark.parametrize("moment", ["save", "wait_until_finished"])
def test_a_process_that_is_gone_is_not_told_as_a_full_disk(tmp_path, monkeypatch, moment):
    saver = checkpoint.Checkpoints(tmp_path)

    def connection_closed(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    def save_and_wait():
        save(saver, 1)
        saver._settle()

    with monkeypatch.context() as patch:
        patch.setattr(saver._manager, moment, connection_closed)
        with pytest.raises(jax.errors.JaxRuntimeError, match="closed by peer"):
            save_and_wait()


def test_a_state_whose_memory_was_taken_is_not_written_again(tmp_path, full_disk):
    saver = checkpoint.Checkpoints(tmp_path)
    values = big(1)
    full_disk()
    save(saver, 1, values=values)
    saver._settle()
    jax.tree.map(lambda x: x.delete(), values)
    full_disk(False)
    saver.close()  # as when something else ended the run
    assert checkpoint.Checkpoints(tmp_path).steps() == []


def data_files(folder):
    return sorted(path for path in (folder / "state").rglob("*") if path.is_file() and path.name != commits.COMMIT)


def complaint(restore):
    """What is said; nothing if what comes back is what was saved."""
    try:
        return "" if same(restore(), tree(4)) else "unreachable"
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_with_the_one_before(tmp_path, harm):
    """Every file of the state in turn: it either does not matter to what comes back, or is told in one line."""
    written(tmp_path / "run")
    wanted = like(on({"data": -1}, tree(0)))
    told = 0
    for file in data_files(tmp_path / "run" / "checkpoints" / "4"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        hurt = tmp_path / "copy" / file.relative_to(tmp_path / "run")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 16
        {
            "flip": lambda path=hurt, data=data: path.write_bytes(data),
            "cut": lambda path=hurt, data=data: path.write_bytes(data[: len(data) // 2]),
            "gone": lambda path=hurt: path.unlink(),
        }[harm]()
        said = complaint(lambda: checkpoint.Checkpoints(tmp_path / "copy").restore(4, wanted)[0])
        if said:
            told += 1
            assert f"{tmp_path / 'copy'}/checkpoints/4" in said
            assert "the one before is 2" in said
            assert "\n" not in said
        shutil.rmtree(tmp_path / "copy")
    assert told >= 2


def test_other_bits_than_were_saved_are_seen_whatever_the_storage_says(tmp_path):
    written(tmp_path)
    other = {**META, "checksums": {**checksums.checksums(tree(4)), "params/image/bias": 1}}
    (tmp_path / "checkpoints" / "4" / "meta" / "metadata").write_bytes(io.json.dumps(other).encode())
    wanted = like(on({"data": -1}, tree(0)))
    with pytest.raises(InputError, match="params/image/bias came back with other bits"):
        checkpoint.Checkpoints(tmp_path).restore(4, wanted)
    with pytest.raises(InputError, match="params/image/bias came back with other bits"):
        checkpoint.load_params(tmp_path, wanted["params"])
    kernel = {"image": {"kernel": wanted["params"]["image"]["kernel"]}}
    assert same(checkpoint.load_params(tmp_path, kernel)["image"]["kernel"], tree(4)["params"]["image"]["kernel"])


def test_moved_away_the_one_before_is_used(tmp_path):
    written(tmp_path)
    shutil.move(tmp_path / "checkpoints" / "4", tmp_path / "damaged")
    saver = checkpoint.Checkpoints(tmp_path)
    assert saver.latest() == 2
    assert same(saver.restore(2, like(on({"data": -1}, tree(0))))[0], tree(2))


def test_a_damaged_record_is_told_too(tmp_path):
    written(tmp_path)
    (tmp_path / "checkpoints" / "4" / "meta" / "metadata").write_bytes(b"{")
    with pytest.raises(InputError, match=r"checkpoints/4 cannot be read .*the one before is 2"):
        checkpoint.load_meta(tmp_path)


# Parameters only, and by rule


def test_parameters_alone_and_only_what_a_rule_allows_may_be_missing(tmp_path):
    written(tmp_path)
    wanted = like(on({"data": 1}, tree(0), jax.devices()[:1]))["params"]
    assert same(checkpoint.load_params(tmp_path, wanted), tree(4)["params"])
    head = {"heads": {"new": wanted["image"]["bias"]}, **wanted}
    with pytest.raises(InputError, match="has no parameter heads/new"):
        checkpoint.load_params(tmp_path, head)
    with pytest.raises(InputError, match="has no parameter heads/new"):
        checkpoint.load_params(tmp_path, head, fresh=("^head/",))
    assert checkpoint.load_params(tmp_path, head, fresh=("^heads/",)).keys() == {"image"}
    wrong = {"image": {**wanted["image"], "bias": jax.ShapeDtypeStruct((3,), np.float32)}}
    with pytest.raises(InputError, match=r"image/bias is \(16,\) in checkpoint .*, the model wants \(3,\)"):
        checkpoint.load_params(tmp_path, wrong, fresh=(".*",))


# The command


def command(capsys, *arguments):
    code = cli.main(["checkpoint", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out.strip().splitlines(), out.err.strip().splitlines()


def test_ls_and_show(tmp_path, capsys):
    written(tmp_path, (2, 4, 5), every=2)
    (tmp_path / "checkpoints" / "2" / commits.COMMIT).unlink()
    code, lines, _ = command(capsys, "ls", tmp_path)
    assert code == 0
    assert [line.split()[0] for line in lines] == ["2", "4", "5"]
    assert lines[0].endswith("not whole")
    assert "loss 0.2500" in lines[1]
    assert lines[2].endswith("latest, temporary")
    code, lines, _ = command(capsys, "show", tmp_path / "checkpoints" / "4")
    shown = io.json.loads("\n".join(lines))
    assert (code, shown["scalars"], shown["data"]) == (0, {"loss": 0.25}, {"set": "1"})
    assert shown["count"] == {"image": 2 * 16 * 8 + 16, "all": 2 * 16 * 8 + 16}
    assert shown["parameters"]["image/kernel"] == "float32 [2, 16, 8]"


def test_diff(tmp_path, capsys):
    written(tmp_path)
    first, second = tmp_path / "checkpoints" / "2", tmp_path / "checkpoints" / "4"
    assert command(capsys, "diff", first, first)[1] == ["no difference"]
    code, lines, _ = command(capsys, "diff", first, second)
    a, b = (tree(step)["params"]["image"]["bias"].astype(np.float64) for step in (2, 4))
    expected = f"{np.linalg.norm(b - a) / np.linalg.norm(a):.3g}, largest {np.abs(b - a).max():.3g}"
    assert code == 0
    assert [line.split(":")[0] for line in lines] == ["image/bias", "image/kernel"]
    assert lines[0].endswith(f"relative change {expected}")
    other = checkpoint.Checkpoints(tmp_path / "other")
    meta = {**META, "config": {"save_every": 3, "keep": 2}}
    other.save(1, {"params": {"image": {"bias": jnp.zeros(3)}, "new": jnp.zeros(2)}}, meta)
    other.close()
    lines = command(capsys, "diff", first, tmp_path / "other")[1]
    assert "config.save_every: 2, then 3" in lines
    assert "image/bias: (16,), then (3,)" in lines
    assert "image/kernel: only in the first" in lines
    assert "new: only in the second" in lines


def test_average(tmp_path, capsys):
    written(tmp_path / "run")
    folders = [tmp_path / "run" / "checkpoints" / str(step) for step in (2, 4)]
    code, lines, _ = command(capsys, "average", *folders, "--out", tmp_path / "mean")
    assert (code, lines) == (0, [str(tmp_path / "mean" / "checkpoints" / "4")])
    mean = checkpoint_tools.parameters(tmp_path / "mean")
    for name in ("kernel", "bias"):
        a, b = (tree(step)["params"]["image"][name].astype(np.float64) for step in (2, 4))
        np.testing.assert_array_equal(mean[f"image/{name}"], ((a + b) / 2).astype(np.float32))
    assert checkpoint.load_meta(tmp_path / "mean")["average"] == [str(folder) for folder in folders]


def test_what_cannot_be_averaged_is_refused(tmp_path, capsys):
    run = written(tmp_path / "run") / "checkpoints"
    other = checkpoint.Checkpoints(tmp_path / "other")
    other.save(1, {"params": {"image": {"bias": jnp.zeros(3)}}}, META)
    other.close()
    for paths, says in (
        ((run / "2",), "takes two checkpoints or more"),
        ((run / "4", tmp_path / "run"), "is given twice"),
        ((run / "2", tmp_path / "other"), "they differ in parameter image/bias"),
        ((run / "2", tmp_path / "nothing"), "holds no checkpoint"),
    ):
        code, _, errors = command(capsys, "average", *paths, "--out", tmp_path / "mean")
        assert (code, len(errors), says in errors[-1]) == (2, 1, True), errors
        assert not (tmp_path / "mean").exists()
    code, _, errors = command(capsys, "average", run / "2", run / "4", "--out", tmp_path / "run")
    assert (code, "choose another --out" in errors[-1]) == (2, True)
