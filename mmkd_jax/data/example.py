"""`tf.train.Example` messages without TensorFlow, through the protocol buffer that tensorflow_datasets carries.

Written as tensorflow_datasets writes a flat `FeaturesDict`: names joined with `/`, text and images as bytes lists,
numbers as int64 or float lists. Going to the message directly takes some 25 us a record, an order less than
`deserialize_example_np`, and gives the same values.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

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
    try:
        example = tf_example_pb2.Example.FromString(data)
    except Exception as error:  # protobuf's DecodeError is not where it was from version to version
        raise ValueError(f"not a tf.train.Example: {error}") from error
    return {
        name: getattr(f, f.WhichOneof("kind") or "bytes_list").value for name, f in example.features.feature.items()
    }
