"""TFRecord files and serialized tf.train.Example, written without TensorFlow."""

import struct

import numpy as np

from tiercache._native.checksum import crc32c


def _varint(value):
    value &= 2**64 - 1
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def field(number, content):
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _values(values, packed):
    if any(isinstance(value, bytes) for value in values):
        return field(1, b"".join(field(1, value) for value in values))
    if np.asarray(values).dtype.kind == "f":
        floats = [struct.pack("<f", value) for value in values]
        return field(2, field(1, b"".join(floats)) if packed else b"".join(b"\x0d" + one for one in floats))
    ints = [_varint(int(value)) for value in values]
    return field(3, field(1, b"".join(ints)) if packed else b"".join(b"\x08" + one for one in ints))


def example(features, *, packed=True):
    """Return a tf.train.Example with these lists of values. packed: How numbers are written; readers accept both."""
    entries = (field(1, name.encode()) + field(2, _values(values, packed)) for name, values in features.items())
    return field(1, b"".join(field(1, entry) for entry in entries))


def _masked(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecords(records):
    """Return the bytes of a TFRecord file."""
    lengths = [struct.pack("<Q", len(record)) for record in records]
    return b"".join(n + _masked(n) + data + _masked(data) for n, data in zip(lengths, records, strict=True))
