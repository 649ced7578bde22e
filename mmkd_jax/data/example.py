"""`tf.train.Example` messages without TensorFlow, through the protocol buffer that tensorflow_datasets carries.

Written as tensorflow_datasets writes a flat `FeaturesDict`: names joined with `/`, text and images as bytes lists,
numbers as int64 or float lists. Going to the message directly takes some 25 us a record, an order less than
`deserialize_example_np`, and gives the same values.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

Value = bytes | str | int | Sequence[bytes] | Sequence[str] | np.ndarray


def encode(values: Mapping[str, Value]) -> bytes:
    """Serialises `values`; the bytes depend on the values alone.

    Text, bytes and lists of them become bytes lists; integers, and arrays of them, int64 lists; float arrays float
    lists (the array's type decides, so that an empty one has the right kind).
    """
    example = tf_example_pb2.Example()
    for name in sorted(values):
        value, feature = values[name], example.features.feature[name]
        if isinstance(value, bytes | str | list | tuple):
            items = [value] if isinstance(value, bytes | str) else value
            feature.bytes_list.value.extend(i.encode() if isinstance(i, str) else i for i in items)
            feature.bytes_list.SetInParent()
        else:
            array = np.atleast_1d(np.asarray(value))
            kind = feature.float_list if np.issubdtype(array.dtype, np.floating) else feature.int64_list
            kind.value.extend(array.tolist())
            kind.SetInParent()
    return example.SerializeToString(deterministic=True)


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

    The layout is that of protocol buffers: every field is a tag of one byte, a length and so many bytes.

    Raises:
      ValueError, IndexError: the bytes are no `tf.train.Example`.
    """
    data, found = memoryview(data), {}
    _, at, end = _field(data, 0, len(data))
    while at < end:
        _, start, at = _field(data, at, end)  # an entry of the map: a name and a feature
        _, *name = _field(data, start, at)
        _, *feature = _field(data, name[1], at)
        kind, *values = _field(data, *feature) if feature[0] < feature[1] else (_BYTES, 0, 0)
        if kind == _BYTES:
            value = _bytes_list(data, *values)
        elif kind == _INTEGERS and data[values[0] : values[0] + 1] == _PACKED:
            value = _varints(data[slice(*_field(data, *values)[1:])])
        else:
            one = _parsed(tf_feature_pb2.Feature, bytes(data[slice(*feature)]))
            value = getattr(one, one.WhichOneof("kind")).value
        found[str(data[slice(*name)], "utf-8")] = value
    return found


_BYTES, _INTEGERS = 0x0A, 0x1A  # tags of the kinds of feature
_PACKED = b"\x0a"


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
