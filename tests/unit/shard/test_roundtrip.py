"""Records of any schema read back equal: by record, by batch and as Arrow, mapped and by ranges."""

import datetime as dt
import math
import tempfile
from decimal import Decimal
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tiercache.shard.conversion import widen_bfloat16
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Column, Image, Kind, Ragged, Schema, Tensor
from tiercache.shard.values import as_batch, as_records, block_values
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.local import LocalFolder
from tiercache.store.memory import MemoryStore

DTYPES = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)] + ["float16", "float32", "float64"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ARROW = [
    ("list<int32?>", st.lists(st.none() | st.integers(-(2**31), 2**31 - 1), max_size=3)),
    (pa.large_list(pa.string()), st.lists(st.none() | TEXT, max_size=3)),
    (pa.timestamp("us"), st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2200, 1, 1))),
    (pa.date32(), st.dates()),
    (pa.decimal128(12, 3), st.integers(-(10**12) + 1, 10**12 - 1).map(lambda i: Decimal(i).scaleb(-3))),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (
        pa.struct([("a", pa.bool_()), ("b", pa.list_(pa.binary()))]),
        st.fixed_dictionaries(
            {"a": st.none() | st.booleans(), "b": st.none() | st.lists(st.binary(max_size=3), max_size=2)}
        ),
    ),
    (pa.map_(pa.string(), pa.float64()), st.lists(st.tuples(TEXT, st.floats(allow_nan=False)), max_size=2)),
    (
        pa.list_(pa.struct([("x", pa.int8())]), 2),
        st.lists(st.fixed_dictionaries({"x": st.none() | st.integers(-128, 127)}), min_size=2, max_size=2),
    ),
]


def elements(dtype: str) -> st.SearchStrategy:
    if dtype == "bool":
        return st.booleans()
    if dtype == "bfloat16":
        return st.integers(0, 2**16 - 1).map(lambda bits: float(widen_bfloat16(np.array([bits], np.uint16))[0]))
    if dtype.startswith("float"):
        return st.floats(width=int(dtype[5:]))
    limits = np.iinfo(dtype)
    return st.integers(int(limits.min), int(limits.max))


def in_some_form(array: np.ndarray) -> st.SearchStrategy:
    """The same array contiguous, strided, reversed in memory, Fortran's, read-only, big-endian, or torch's."""
    closed = array.copy()
    closed.flags.writeable = False
    forms = [array, np.asfortranarray(array), closed, array.astype(array.dtype.newbyteorder(">"))]
    forms += [np.repeat(array, 2, axis=-1)[..., ::2], np.ascontiguousarray(array[::-1])[::-1]] if array.ndim else []
    forms += [torch.from_numpy(array.copy())] if array.dtype.name not in ("uint16", "uint32", "uint64") else []
    return st.sampled_from(forms)


def arrays(dtype: str, shape: tuple[int, ...]) -> st.SearchStrategy:
    stored = "float32" if dtype == "bfloat16" else dtype
    return hnp.arrays(stored, shape, elements=elements(dtype)).flatmap(in_some_form)


@st.composite
def columns(draw):
    """(type, values) of a column; a bfloat16 value is drawn as the float that it equals."""
    nullable = draw(st.booleans())
    kind = draw(st.sampled_from(list(Kind)))
    dtype = draw(st.sampled_from([*DTYPES, "bfloat16"]))
    mark = "?" if nullable else ""
    if kind is Kind.SCALAR:
        user, values = dtype + mark, elements(dtype)
    elif kind is Kind.BOOL:
        user, values = "bool" + mark, st.booleans()
    elif kind is Kind.TENSOR:
        dtype = draw(st.sampled_from([dtype, "bool"]))
        shape = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)))
        user, values = Tensor(dtype, shape, nullable), arrays(dtype, shape)
    elif kind is Kind.RAGGED:
        dtype = draw(st.sampled_from([dtype, "bool"]))
        shape = tuple(draw(st.lists(st.none() | st.integers(0, 3), min_size=1, max_size=3).filter(lambda s: None in s)))
        user = Ragged(dtype, shape, nullable)
        dims = st.tuples(*(st.integers(0, 3) if d is None else st.just(d) for d in shape))
        values = dims.flatmap(lambda s: arrays(dtype, s))
    elif kind is Kind.IMAGE:
        user, values = Image("png", nullable), st.binary(max_size=9)
    elif kind is Kind.ARROW:
        arrow, values = draw(st.sampled_from(ARROW))
        user = Column.of("any", arrow).arrow.with_nullable(nullable)
    else:
        user = kind.value + mark
        values = {Kind.BYTES: st.binary(max_size=9), Kind.STR: TEXT, Kind.JSON: JSON}[kind]
    if nullable:
        values = st.none() | (values.filter(lambda v: v is not None) if kind is Kind.JSON else values)
    return user, values


@st.composite
def data_sets(draw):
    drawn = draw(st.lists(columns(), min_size=1, max_size=4))
    n = draw(st.integers(0, 9))
    schema = Schema.of({f"c{number}": user for number, (user, _) in enumerate(drawn)})
    rows = [{f"c{number}": draw(values) for number, (_, values) in enumerate(drawn)} for _ in range(n)]
    compression = draw(st.sampled_from(["auto", "none", "zstd", "zstd:9", {"c0": "zstd:1"}]))
    sizes = draw(st.tuples(st.sampled_from([1, 40, 300, 1 << 20]), st.sampled_from([1, 1000, 1 << 30])))
    return schema, rows, ShardOptions(block_bytes=sizes[0], shard_bytes=sizes[1], compression=compression)


def write(store, schema, rows, options, cuts):
    """Write rows[0:cuts[0]] one by one, the rest in batches that end at cuts."""
    with ShardWriter(store, schema, options) as writer:
        edges = [0, *sorted(cuts), len(rows)]
        for number, (start, end) in enumerate(pairwise(edges)):
            if number % 2 == 0:
                for row in rows[start:end]:
                    writer.write(row)
            elif end > start:
                writer.write_batch({name: [row[name] for row in rows[start:end]] for name in schema.names})
    return writer.finish()


def same(got, written, dtype=None) -> bool:
    if written is None or got is None:
        return got is None and written is None
    if isinstance(got, torch.Tensor):
        got = got.float().numpy()[()]  # of one element a number, which may be NaN
    if isinstance(written, torch.Tensor):
        written = written.numpy()
    if isinstance(written, float) and not isinstance(got, np.ndarray):
        return math.isclose(got, written, rel_tol=0, abs_tol=0) or (math.isnan(got) and math.isnan(written))
    if isinstance(written, np.ndarray):
        equal = np.array_equal(got, written, equal_nan=written.dtype.kind == "f")
        return equal and got.dtype == written.dtype.newbyteorder("=")
    return bool(got == written)


def check(rows, records):
    assert len(records) == len(rows)
    for written, got in zip(rows, records, strict=True):
        assert [(name, got[name], written[name]) for name in written if not same(got[name], written[name])] == []


def by_record(readers):
    return [record for r in readers for record in as_records(r.take(range(r.n_records), range(len(r.schema))))]


def by_single_record(readers):
    return [as_records(r.take([i], range(len(r.schema))))[0] for r in readers for i in range(r.n_records)]


def by_block(readers):
    records = []
    for reader in readers:
        numbers = range(len(reader.schema))
        blocks = reader.load_blocks(range(reader.footer.n_blocks), numbers)
        # from the last row to the first, so that blocks are mixed up with their order
        block = np.repeat(np.arange(len(blocks.blocks), dtype=np.uint32), blocks.n_rows)[::-1].copy()
        row = np.concatenate([np.arange(0, dtype=np.uint32), *(np.arange(n, dtype=np.uint32) for n in blocks.n_rows)])[
            ::-1
        ].copy()
        records += as_records(block_values(blocks, numbers, block, row))[::-1]
    return records


def through_arrow(readers, schema):
    """Written again from the Arrow arrays of the blocks, and read."""
    store = MemoryStore("round-trip-arrow")
    with ShardWriter(store, schema, ShardOptions(block_bytes=200)) as writer:
        for reader in readers:
            for block in range(reader.footer.n_blocks):
                loaded = reader.load_blocks([block], range(len(schema)))
                arrays = [loaded.array(0, number) for number in range(len(schema))]
                batch = pa.RecordBatch.from_arrays(arrays, schema=schema.arrow)
                batch.validate(full=True)
                writer.write_batch(batch)
    return by_block([ShardReader(store, info.name, info=info) for info in writer.finish()])


@given(data=data_sets(), cuts=st.lists(st.integers(0, 9), max_size=3))
def test_written_records_are_read_back_equal(data, cuts):
    schema, rows, options = data
    cuts = [min(cut, len(rows)) for cut in cuts]
    remote, other = MemoryStore("round-trip"), MemoryStore("round-trip-as-one-batch")
    infos = write(remote, schema, rows, options, cuts)
    readers = [ShardReader(remote, info.name, info=info, verify="always") for info in infos]
    assert sum(r.n_records for r in readers) == sum(info.n_records for info in infos) == len(rows)
    for read in (by_record, by_single_record, by_block):
        check(rows, read(readers))
    check(rows, through_arrow(readers, schema))
    if not any(column.kind is Kind.ARROW for column in schema.columns):  # their blocks are cut by the mean of a batch
        again = write(other, schema, rows, options, [0])
        chunks = [[s.get(i.name)[64 : i.footer_offset] for i in of] for s, of in ((remote, infos), (other, again))]
        assert chunks[0] == chunks[1]


@given(data=data_sets())
def test_records_of_a_local_folder_are_read_back_equal(data):
    schema, rows, options = data
    with tempfile.TemporaryDirectory() as folder:
        store = LocalFolder(folder)
        infos = write(store, schema, rows, options, [])
        readers = [ShardReader(store, info.name) for info in infos]
        try:
            assert all(reader.local_copy is not None for reader in readers)
            check(rows, by_block(readers))
            check(rows, by_record(readers))
        finally:
            for reader in readers:
                reader.close()


def test_bfloat16_is_read_as_a_torch_tensor():
    store = MemoryStore("round-trip-bf16")
    given_values = torch.tensor([[1.0, -2.5], [float("inf"), 3.0e38]], dtype=torch.bfloat16)
    with ShardWriter(store, Schema.of({"x": Tensor("bfloat16", (2,)), "y": "bfloat16"}), ShardOptions()) as writer:
        writer.write_batch({"x": given_values, "y": given_values[:, 1]})
    (info,) = writer.finish()
    batch = as_batch(ShardReader(store, info.name).take([1, 0], [0, 1]))
    assert batch["x"].dtype == torch.bfloat16
    assert torch.equal(batch["x"], given_values.flip(0))
    assert torch.equal(batch["y"], given_values[:, 1].flip(0))
