"""TFRecord framing, the index, random reading, and what damage looks like."""

import os
import re
import struct

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from mmkd_jax.data import example, tfrecord
from mmkd_jax.errors import InputError

RECORDS = [b"", b"a", b"hello" * 100, bytes(range(256))]


def crc32c(data: bytes) -> int:
    """CRC32C bit by bit, from the polynomial (Castagnoli, reflected 0x82F63B78)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.fixture
def file(tmp_path):
    tfrecord.write(tmp_path / "x.tfrecord", RECORDS)
    return tmp_path / "x.tfrecord"


def test_polynomial_has_the_published_check_value():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4 and the CRC catalogues


def test_framing_equals_a_hand_made_one(file):
    expected = b""
    for record in RECORDS:
        length = struct.pack("<Q", len(record))
        expected += length + struct.pack("<I", masked(length)) + record + struct.pack("<I", masked(record))
    assert file.read_bytes() == expected


def test_a_record_in_pieces_is_the_record(file, tmp_path):
    tfrecord.write(tmp_path / "z.tfrecord", [[record[:3], memoryview(record)[3:]] for record in RECORDS])
    for suffix in ("", tfrecord.INDEX_SUFFIX):
        assert (tmp_path / f"z.tfrecord{suffix}").read_bytes() == (tmp_path / f"x.tfrecord{suffix}").read_bytes()


def test_tensorflow_reads_it(file):
    tf = pytest.importorskip("tensorflow", reason="the reference reader is TensorFlow's; it is not installed")
    assert [r.numpy() for r in tf.data.TFRecordDataset(str(file))] == RECORDS


def test_grain_reads_it(file):
    from grain import experimental

    assert list(experimental.TFRecordIterDataset(str(file))) == RECORDS


@pytest.mark.parametrize("index", [True, False])
def test_random_reading(file, index):
    if not index:
        os.remove(f"{file}.idx")
    reader = tfrecord.RecordReader(file)
    assert len(reader) == 4
    for i in (3, 0, 2, 1, 2):
        assert reader.read(i) == RECORDS[i]
    with pytest.raises(IndexError):
        reader.read(4)
    reader.close()


def test_a_file_that_only_epath_knows(file, monkeypatch):
    """Object stores have nothing to map: reading goes through seek and read."""
    reader = tfrecord.RecordReader(file)
    monkeypatch.setattr(reader, "_bytes", None)
    with file.open("rb") as stream:
        monkeypatch.setattr(reader, "_file", stream)
        assert [reader.read(i) for i in range(4)] == RECORDS


def test_every_flipped_byte_is_noticed_at_its_record(file):
    data = file.read_bytes()
    bounds = np.cumsum([0] + [len(r) + tfrecord.OVERHEAD for r in RECORDS])
    for offset in (*range(0, int(bounds[2]) + 30), len(data) - 1):
        flip(file, offset)
        damaged = int(np.searchsorted(bounds, offset, side="right")) - 1
        reader = tfrecord.RecordReader(file)
        with pytest.raises(InputError, match=rf"{re.escape(str(file))}: record {damaged} "):
            reader.read(damaged)
        for record in set(range(4)) - {damaged}:
            assert reader.read(record) == RECORDS[record]
        flip(file, offset)


@pytest.mark.parametrize("index", [True, False])
def test_truncation_names_file_and_record(file, index):
    data = file.read_bytes()
    if not index:
        os.remove(f"{file}.idx")
    for size, record in ((len(data) - 1, 3), (20, 1), (8, 0)):
        file.write_bytes(data[:size])
        with pytest.raises(InputError) as caught:
            tfrecord.RecordReader(file)
        assert str(file) in str(caught.value)
        assert f"record {record} " in str(caught.value)


def test_truncation_after_opening(file):
    reader = tfrecord.RecordReader(file)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(InputError, match="record 3"):
        reader.read(3)
    assert reader.read(2) == RECORDS[2]


def test_damaged_index_and_missing_file(file, tmp_path):
    for offset in (0, 9, 20, 50):
        flip(tmp_path / "x.tfrecord.idx", offset)
        with pytest.raises(InputError, match=r"x\.tfrecord\.idx is damaged"):
            tfrecord.RecordReader(file)
        flip(tmp_path / "x.tfrecord.idx", offset)
    (tmp_path / "x.tfrecord.idx").write_bytes(b"")
    with pytest.raises(InputError, match="is damaged"):
        tfrecord.RecordReader(file)
    with pytest.raises(InputError, match="does not exist"):
        tfrecord.RecordReader(tmp_path / "y")


def test_index_of_another_file_is_noticed(file, tmp_path):
    """Same size, other records: the lengths disagree."""
    tfrecord.write(tmp_path / "y", [b"a", b"", *RECORDS[2:]])
    os.replace(tmp_path / "y.idx", f"{file}.idx")
    reader = tfrecord.RecordReader(file)
    with pytest.raises(InputError, match=r"another length|cut off|checksum"):
        reader.read(0)


def test_example_messages():
    values = {"b": b"\x00\xff", "t": "é", "l": ["x", "y"], "e": [], "i": -1, "f": np.array([0.5], np.float32)}
    data = example.encode({**values, "none": np.array([], np.float32)})
    assert data == example.encode(dict(reversed({**values, "none": np.array([], np.float32)}.items())))
    got = {name: list(value) for name, value in example.decode(data).items()}
    assert got == {
        "b": [b"\x00\xff"],
        "t": ["é".encode()],
        "l": [b"x", b"y"],
        "e": [],
        "i": [-1],
        "f": [0.5],
        "none": [],
    }
    with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
        example.decode(b"\xff\xff")


MESSAGE = {
    "bytes": bytes(range(256)) * 300,
    "text": ["é", "", "x" * 127, "y" * 128],
    "nothing": [],
    "empty": b"",
    "small": np.arange(128),
    "large": np.array([0, 127, 128, 2**40, -1, 2**63 - 1, -(2**63)]),
    "no integers": np.array([], np.int64),
    "floats": np.array([0.5, -1e30], np.float32),
    "no floats": np.array([], np.float32),
    "one": 7,
}


def test_messages_are_those_of_the_protocol_buffer():
    """What is put together and taken apart by hand, against the library's own bytes and values."""
    proto = tf_example_pb2.Example()
    for name, value in MESSAGE.items():
        feature = proto.features.feature[name]
        if isinstance(value, bytes | list):
            feature.bytes_list.SetInParent()
            feature.bytes_list.value.extend(
                v.encode() if isinstance(v, str) else v for v in ([value] if isinstance(value, bytes) else value)
            )
        else:
            array = np.atleast_1d(value)
            kind = feature.float_list if array.dtype == np.float32 else feature.int64_list
            kind.SetInParent()
            kind.value.extend(array.tolist())
    data = proto.SerializeToString(deterministic=True)
    assert example.encode(MESSAGE) == data
    assert b"".join(example.pieces({**MESSAGE, "bytes": memoryview(MESSAGE["bytes"])})) == data
    read = {name: [bytes(v) if isinstance(v, memoryview) else v for v in x] for name, x in example.views(data).items()}
    assert read == {name: list(value) for name, value in example.decode(data).items()}


@pytest.mark.parametrize("cut", [1, 40, 700, 77_500])
def test_a_message_that_is_cut_off_is_refused(cut):
    data = example.encode(MESSAGE)
    with pytest.raises((ValueError, IndexError)):
        example.views(data[:-cut])
