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
    found: dict[str, Sequence] = {}
    for _, features in _fields(memoryview(data)):
        for _, entry in _fields(features):
            parts = dict(_fields(entry))
            ((kind, values),) = _fields(parts[_VALUE]) or [(_BYTES, b"")]
            if kind == _BYTES:
                found[str(parts[_KEY], "utf-8")] = [value for _, value in _fields(values)]
            else:
                feature = _parsed(tf_feature_pb2.Feature, bytes(parts[_VALUE]))
                found[str(parts[_KEY], "utf-8")] = getattr(feature, feature.WhichOneof("kind")).value
    return found


_KEY = _BYTES = 0x0A  # tags of the first and second field that have a length
_VALUE = 0x12


def _fields(data: memoryview) -> list[tuple[int, memoryview]]:
    """Tag and content of the fields of a message, all of which have a length."""
    found, at = [], 0
    while at < len(data):
        tag, size, shift, at = data[at], 0, 0, at + 1
        if tag & 7 != 2:
            raise ValueError(f"not a tf.train.Example: tag {tag}")
        while True:
            byte = data[at]
            size |= (byte & 127) << shift
            shift, at = shift + 7, at + 1
            if byte < 128:
                break
        if at + size > len(data):
            raise ValueError("not a tf.train.Example: a field reaches beyond its message")
        found.append((tag, data[at : at + size]))
        at += size
    return found


def _parsed(kind: type, data: bytes):
    try:
        return kind.FromString(data)
    except Exception as error:  # protobuf's DecodeError is not where it was from version to version
        raise ValueError(f"not a tf.train.Example: {error}") from error
