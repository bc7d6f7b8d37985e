"""Data sets of LitData, written without litdata: one chunk for each list of records."""

import json
import struct

import numpy as np
import pyarrow as pa

NUMPY_TYPES = (
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
)


def leaf(value):
    """Return the name of the format and the bytes of a value."""
    if isinstance(value, np.ndarray):
        return f"no_header_numpy:{NUMPY_TYPES.index(str(value.dtype))}", value.tobytes()
    if isinstance(value, int):
        return "int", struct.pack("<q", value)
    return ("str", value.encode()) if isinstance(value, str) else ("bytes", value)


def write_litdata(folder, chunks, *, as_tables=False, **config):
    """Write chunks of leaves, or of tables as LitData 0.2.76 writes dicts of plain values."""
    tree = {"type": "builtins.dict", "context": json.dumps(list(chunks[0][0]))}
    tree["children_spec"] = [{"type": None, "context": None, "children_spec": []}] * len(chunks[0][0])
    formats = ["json" if as_tables else leaf(value)[0] for value in chunks[0][0].values()]
    index = {"chunks": [], "config": {"compression": None, "data_format": formats, "data_spec": json.dumps([1, tree])}}
    index["config"] |= config
    for number, rows in enumerate(chunks):
        items = []
        for row in rows:
            parts = [] if as_tables else [leaf(value)[1] for value in row.values()]
            items.append(struct.pack(f"<{len(parts)}I", *map(len, parts)) + b"".join(parts))
        offsets = np.cumsum([4 * (len(items) + 2), *map(len, items)]).astype("<u4")
        data = struct.pack("<I", len(items)) + offsets.tobytes() + b"".join(items)
        if as_tables:
            sink = pa.BufferOutputStream()
            table = pa.Table.from_pylist(rows)
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            ipc = sink.getvalue().to_pybytes()
            empty = struct.pack(f"<{len(rows) + 2}I", len(rows), *[4 * (len(rows) + 2)] * (len(rows) + 1))
            data = empty + ipc + struct.pack("<I8s", len(ipc), b"LDARW01\0")
        name = f"chunk-0-{number}.bin"
        (folder / name).write_bytes(data)
        index["chunks"].append({"chunk_bytes": len(data), "chunk_size": len(items), "dim": None, "filename": name})
    (folder / "index.json").write_text(json.dumps(index))
