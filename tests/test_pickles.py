"""torch's files without torch: the same tensors whatever they are wrapped in, and no code that a file asks for."""

import argparse
import collections
import pickle
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from mmkd_jax.errors import InputError
from mmkd_jax.models import pickles, weights

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "a.bias": RNG.normal(size=(4,)).astype(np.float16),
    "b": RNG.normal(size=(2, 3, 1)).astype(ml_dtypes.bfloat16),
    "scale": np.float32(2.5).reshape(()),
    "ids": np.arange(5),
    "empty": np.zeros((0, 3), np.float64),
    "mask": np.array([True, False]),
    "bytes": np.arange(3, dtype=np.uint8),
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="writes the files")


def as_torch(torch, tensors):
    return {
        name: torch.from_numpy(np.array(t.astype(np.float32))).bfloat16()
        if t.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(np.array(t))
        for name, t in tensors.items()
    }


def same(found, wanted=TENSORS):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def read(path):
    return weights.read_tensors(epath.Path(path))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_torch_saves_is_read(torch, zipped, tmp_path):
    tensors = as_torch(torch, TENSORS)
    wraps = {
        "plain": tensors,
        "ordered": collections.OrderedDict(tensors),
        "checkpoint": {"epoch": 3, "name": "x", "state_dict": tensors, "optimizer": {"state": {0: torch.ones(3)}}},
        "twice": {"model": {"state_dict": tensors}},
        "arguments": {"args": argparse.Namespace(lr=1.0), "best": np.float64(0.5), "model": tensors},
        "parameters": {
            name: torch.nn.Parameter(t, requires_grad=t.is_floating_point()) if t.is_floating_point() else t
            for name, t in tensors.items()
        },
    }
    for name, value in wraps.items():
        torch.save(value, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=zipped)
        same(read(tmp_path / f"{name}.pt"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_modules_state_dict_with_views_and_shared_weights(torch, zipped, tmp_path):
    module = torch.nn.Linear(3, 4)
    table = torch.arange(24.0).reshape(4, 6)
    state = module.state_dict()  # an OrderedDict with an attribute
    state["transposed"], state["part"], state["whole"], state["expanded"] = (
        table.T,
        table[1:3, ::2],
        table,
        table[:1].expand(3, 6),
    )
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    same(read(tmp_path / "x.pth"), {name: value.numpy() for name, value in state.items()})


def test_what_is_written_torch_loads(torch, tmp_path):
    pickles.write(epath.Path(tmp_path / "x.pt"), TENSORS)
    same(read(tmp_path / "x.pt"))
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    for name, wanted in as_torch(torch, TENSORS).items():
        assert loaded[name].dtype == wanted.dtype
        assert torch.equal(loaded[name], wanted), name


class Exploit:
    """A pickle of this calls `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def zip_of(data: bytes, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return path


def legacy_of(data: bytes, path):
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + data)
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("pack", [zip_of, legacy_of, lambda data, path: (path.write_bytes(data), path)[1]])
def test_code_is_refused_and_not_run(pack, protocol, tmp_path):
    import os

    mark = tmp_path / "ran"
    crafted = [
        Exploit(os.system, f"touch {mark}"),
        Exploit(eval, f"open({str(mark)!r}, 'w')"),
        Exploit(exec, f"open({str(mark)!r}, 'w')"),
        Exploit(subprocess.check_output, ["touch", str(mark)]),
        Exploit(getattr, "x", "upper"),
        {"state_dict": {"weight": Exploit(os.system, f"touch {mark}")}},
    ]
    for value in crafted:
        path = pack(pickle.dumps(value, protocol), tmp_path / "x.pt")
        with pytest.raises(InputError, match=r"asks to run .*, which has no place in weights") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_the_exploit_is_one(tmp_path):
    """Negative control: the standard library's reader runs it."""
    pickle.loads(pickle.dumps(Exploit(exec, f"open({str(tmp_path / 'ran')!r}, 'w')")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # by name
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # by names on the stack
        b"(S'true'\nios\nsystem\n.",  # an instance
        b"(cos\nsystem\nS'true'\no.",  # an object
        b"\x80\x02cposix\nsystem\n)\x81.",  # a new object
        b"ccollections\nOrderedDict.fromkeys\n.",  # an attribute of what is allowed
        b"ctorch._utils\n__builtins__\n.",
        b"cmmkd_jax.models.pickles\nwrite\n.",
    ],
)
def test_no_opcode_reaches_code(data, tmp_path):
    with pytest.raises(InputError, match="asks to run"):
        read(zip_of(data, tmp_path / "x.pt"))


def test_names_of_training_checkpoints_are_inert(tmp_path):
    mark = tmp_path / "ran"
    data = pickle.dumps({"a": 1}, 2)[:-1] + b"0" + b"cargparse\nNamespace\n(S'x'\ntR(dS'k'\nI1\nsb."
    with pytest.raises(InputError, match="holds no dictionary of tensors"):
        read(zip_of(data, tmp_path / "x.pt"))
    assert not mark.exists()


def test_what_is_no_weights_file_is_refused_in_one_line(tmp_path, torch):
    def refused(match, name, data):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=match) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)

    pickles.write(epath.Path(tmp_path / "good.pt"), TENSORS)
    good = (tmp_path / "good.pt").read_bytes()
    refused("not a readable file of torch", "x.pt", b"")
    refused("not a readable file of torch", "x.pt", b"\x80")
    refused("not a readable file of torch", "x.bin", good[: len(good) // 2])
    refused("not one of torch", "x.pth", pickle.dumps({"a": 1}))
    refused("ends in '.onnx'", "x.onnx", good)
    zip_of(pickle.dumps([1, 2]), tmp_path / "list.pt")
    refused("holds no dictionary of tensors", "y.pt", (tmp_path / "list.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "jit.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2))
        archive.writestr("x/constants.pkl", pickle.dumps((), 2))
    refused("TorchScript archive holds code", "y.pt", (tmp_path / "jit.pt").read_bytes())
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    refused(r"asks to run torch.nn.modules.linear.Linear", "y.pt", (tmp_path / "module.pt").read_bytes())


def test_tensors_beyond_their_storage_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    pickles.write(epath.Path(path), {"w": np.arange(6.0).reshape(2, 3)})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    strides = b"(K\x03K\x01t"
    assert parts["archive/data.pkl"].count(strides) == 1
    changes = [
        ("archive/data.pkl", parts["archive/data.pkl"].replace(strides, b"(K\x04K\x01t")),
        ("archive/data.pkl", parts["archive/data.pkl"].replace(strides, b"(J\xff\xff\xff\xffK\x01t")),
        ("archive/data/0", parts["archive/data/0"][:-8]),
    ]
    for name, data in changes:
        with zipfile.ZipFile(path, "w") as archive:
            for part in parts:
                archive.writestr(part, data if part == name else parts[part])
        with pytest.raises(InputError, match="reaches beyond"):
            read(path)


def test_bytes_of_what_is_left_out_are_not_read(torch, tmp_path, monkeypatch):
    torch.save({"state_dict": {"w": torch.ones(2)}, "optimizer": {"m": torch.ones(1000)}}, tmp_path / "x.pt")
    seen = []
    whole = zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *args: seen.append(whole(*args)) or seen[-1])
    same(read(tmp_path / "x.pt"), {"w": np.ones(2, np.float32)})
    assert max(map(len, seen)) < 4000


def test_reading_loads_no_torch(tmp_path):
    pickles.write(epath.Path(tmp_path / "x.pt"), TENSORS)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from etils import epath; from mmkd_jax.models import weights\n"
        f"print(len(weights.read_tensors(epath.Path({str(tmp_path / 'x.pt')!r}))))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == str(len(TENSORS)), run.stderr
