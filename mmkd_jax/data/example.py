"""`tf.train.Example` messages without TensorFlow, through the protocol buffer that tensorflow_datasets carries.

Written as tensorflow_datasets writes a flat `FeaturesDict`: names joined with `/`, text and images as bytes lists,
numbers as int64 or float lists. Going to the message directly takes some 25 us a record, an order less than
`deserialize_example_np`, and gives the same values. What is large is put together and taken apart here
(https://protobuf.dev/programming-guides/encoding), so that it is not copied.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

Value = bytes | memoryview | str | int | Sequence[bytes] | Sequence[str] | np.ndarray
_ENTRY = _NAME = _ITEM = 0x0A  # tags of fields that have a length: the first of a message, and the second
_FEATURE = 0x12
_BYTES, _FLOATS, _INTEGERS = 0x0A, 0x12, 0x1A  # and those of the kinds of feature


def encode(values: Mapping[str, Value]) -> bytes:
    """Serialises `values`; the bytes depend on the values alone.

    Text, bytes and lists of them become bytes lists; integers, and arrays of them, int64 lists; float arrays float
    lists (the array's type decides, so that an empty one has the right kind).
    """
    return b"".join(pieces(values))


def pieces(values: Mapping[str, Value]) -> list[bytes | memoryview]:
    """What `encode` joins: bytes values are taken as they are, memoryviews too, and not copied."""
    entries = [piece for name in sorted(values) for piece in _entry(name.encode(), _feature(values[name]))]
    return _message(_ENTRY, entries)


def _entry(name: bytes, feature: list) -> list:
    return _message(_ENTRY, [*_message(_NAME, [name]), *_message(_FEATURE, feature)])


def _feature(value: Value) -> list:
    if isinstance(value, bytes | memoryview | str | list | tuple):
        items = [value] if isinstance(value, bytes | memoryview | str) else value
        listed = [_message(_ITEM, [i.encode() if isinstance(i, str) else i]) for i in items]
        return _message(_BYTES, [piece for item in listed for piece in item])
    array = np.atleast_1d(np.asarray(value))
    floats = np.issubdtype(array.dtype, np.floating)
    packed = array.astype("<f4").tobytes() if floats else b"".join(map(_varint, array.tolist()))
    return _message(_FLOATS if floats else _INTEGERS, _message(_ITEM, [packed]) if len(array) else [])


def _message(tag: int, content: list) -> list:
    """A field that has a length."""
    return [bytes([tag]) + _varint(sum(map(len, content))), *content]


def _varint(value: int) -> bytes:
    """An integer of 64 bits, seven a byte, the low ones first."""
    value, found = value % 2**64, bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def decode(data: bytes) -> dict[str, Sequence]:
    """The lists of a serialised message by name: bytes, int or float.

    Raises:
      ValueError: the bytes are no `tf.train.Example`.
    """
    example = _parsed(tf_example_pb2.Example, data)
    return {
        name: getattr(f, f.WhichOneof("kind") or "bytes_list").value for name, f in example.features.feature.items()
    }


def views(data: bytes | memoryview) -> dict[str, Sequence]:
    """As `decode`, with single bytes values as memoryviews into `data`: a message of a megabyte is not copied.

    Raises:
      ValueError, IndexError: the bytes are no `tf.train.Example`.
    """
    data = memoryview(data)
    return {name: value(data[start:stop]) for name, (start, stop) in entries(data).items()}


def entries(data: memoryview) -> dict[str, tuple[int, int]]:
    """Where the feature of each name begins and ends; what it holds is not looked at. Raises as `views` does.

    The layout is that of protocol buffers: every field is a tag of one byte, a length and so many bytes.
    """
    found = {}
    _, at, end = _field(data, 0, len(data))
    while at < end:
        _, start, at = _field(data, at, end)  # an entry of the map: a name and a feature
        _, *name = _field(data, start, at)
        _, *feature = _field(data, name[1], at)
        found[str(data[slice(*name)], "utf-8")] = tuple(feature)
    return found


def value(feature: memoryview) -> Sequence:
    """The list that one feature holds, as `views` gives it; a single bytes value ends where the feature does."""
    kind, *values = _field(feature, 0, len(feature)) if feature else (_BYTES, 0, 0)
    if kind == _BYTES:
        return _bytes_list(feature, *values)
    if kind == _INTEGERS and values[0] < values[1] and feature[values[0]] == _ITEM:
        return _varints(feature[slice(*_field(feature, *values)[1:])])
    one = _parsed(tf_feature_pb2.Feature, bytes(feature))
    return getattr(one, one.WhichOneof("kind")).value


def _field(data: memoryview, at: int, end: int) -> tuple[int, int, int]:
    """Tag of the field that begins at a place, and where its content, which has a length, begins and ends."""
    tag, size, at = data[at], data[at + 1], at + 2
    if tag & 7 != 2:
        raise ValueError(f"not a tf.train.Example: tag {tag}")
    byte, size, shift = size, size & 127, 0
    while byte > 127:
        byte, shift, at = data[at], shift + 7, at + 1
        size |= (byte & 127) << shift
    if at + size > end:
        raise ValueError("not a tf.train.Example: a field reaches beyond its message")
    return tag, at, at + size


def _bytes_list(data: memoryview, at: int, end: int) -> list[memoryview]:
    found = []
    while at < end:
        _, start, at = _field(data, at, end)
        found.append(data[start:at])
    return found


def _varints(data: memoryview) -> list[int]:
    """Signed integers of 64 bits, seven bits a byte."""
    raw, found, value, shift = bytes(data), [], 0, 0
    if max(raw, default=0) < 128:
        return list(raw)
    for byte in raw:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value - (value >> 63 << 64))
            value = shift = 0
    if shift:
        raise ValueError("not a tf.train.Example: a number is cut off")
    return found


def _parsed(kind: type, data: bytes):
    try:
        return kind.FromString(data)
    except Exception as error:  # protobuf's DecodeError is not where it was from version to version
        raise ValueError(f"not a tf.train.Example: {error}") from error
