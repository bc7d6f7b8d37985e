"""DLPack tensors over a slot: their content, and the lifetime of their memory."""

from __future__ import annotations

import gc
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from tiercache._native import gather
from tiercache._native.ring import Plan, Ring, RowType, held_bytes
from tiercache.load import loader as loader_module
from tiercache.load.collate import TORCH_DTYPES
from tiercache.load.loader import TorchLibrary

N_ROWS, BATCH_ROWS = 40, 8
DTYPES = list(TORCH_DTYPES.values())
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
WIDTH = 128  # bytes of a row: smaller batches would be copied as small columns
UINT8 = RowType(1, 8, (WIDTH,))


def ring_of(rows: np.ndarray, depth: int = 2) -> Ring:
    """Batches of uint8[8, width] in the stored order."""
    ring = Ring(
        np.array([[gather.FIXED, rows.shape[1]]], np.uint32),
        batch_rows=BATCH_ROWS,
        depth=depth,
        n_threads=1,
        slot_bytes=BATCH_ROWS * rows.shape[1],
    )
    addresses = np.array([[[rows.ctypes.data, 0, 0]]], np.uint64)
    assert ring.push(Plan(addresses, np.zeros(len(rows), np.uint32), np.arange(len(rows), dtype=np.uint32), rows))
    ring.finish()
    return ring


@pytest.fixture
def rows():
    return np.random.default_rng(5).integers(0, 256, (N_ROWS, WIDTH), dtype=np.uint8)


@pytest.fixture
def ring(rows):
    ring = ring_of(rows)
    yield ring
    ring.close()


@pytest.mark.parametrize(
    ("by_dlpack", "dtype"),
    # numpy has no bfloat16, which every torch takes by DLPack
    [(True, dtype) for dtype in DTYPES] + [(False, dtype) for dtype in DTYPES if dtype is not torch.bfloat16],
    ids=str,
)
def test_a_tensor_over_a_slot_has_its_dtype_shape_and_bytes(monkeypatch, dtype, by_dlpack):
    assert loader_module._dlpack_code(NAMES[dtype]) is not None
    if not by_dlpack:  # as with a torch that does not take the dtype so
        monkeypatch.setattr(loader_module, "_dlpack_code", lambda _: None)
    for shape in ((), (3,), (2, 1, 4), (0,), (3, 0), (0, 3), (2, 0, 2)):
        check_tensor(dtype, shape)


def check_tensor(dtype, shape):
    expected = torch.arange(BATCH_ROWS * max(int(np.prod(shape)), 1)).to(dtype)[: BATCH_ROWS * int(np.prod(shape))]
    width = int(np.prod(shape)) * dtype.itemsize
    stored = expected.view(torch.uint8).numpy() if dtype is not torch.bool else expected.numpy().view(np.uint8)
    ring = ring_of(np.ascontiguousarray(stored.reshape(BATCH_ROWS, width)) if width else np.zeros((8, 0), np.uint8))
    slot = ring.take(10)
    tensor = TorchLibrary().rows_over(NAMES[dtype], shape)(slot, slot.stream_position(0)[0], slot.n_rows)
    del slot
    ring.close()
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, (BATCH_ROWS, *shape))
    assert tensor.is_contiguous()
    assert tensor.stride() == torch.empty(tensor.shape).stride()
    assert torch.equal(tensor, expected.reshape(BATCH_ROWS, *shape))
    tensor.zero_()  # it is the user's own


def test_a_tensor_without_elements_does_not_alias_the_next_column(rows, ring):
    slot = ring.take(10)
    column, nothing = (
        TorchLibrary().rows_over(dtype, shape) for dtype, shape in (("uint8", (WIDTH,)), ("int16", (0,)))
    )
    batch = {"column": column(slot, 0, slot.n_rows), "nothing": nothing(slot, 0, slot.n_rows)}
    file = io.BytesIO()
    torch.save(batch, file)  # it refuses two dtypes at one address
    file.seek(0)
    assert np.array_equal(torch.load(file)["column"].numpy(), rows[:BATCH_ROWS])


def test_memory_is_reused_only_after_the_last_tensor_over_it_is_dropped(rows, ring):
    kept, addresses = [], set()
    while not isinstance(slot := ring.take(10), int):
        kept.append(from_dlpack(slot.tensor(UINT8, 0, slot.n_rows)))
        addresses.add(kept[-1].data_ptr())
        del slot
    assert len(addresses) == N_ROWS // BATCH_ROWS
    assert np.array_equal(torch.cat(kept).numpy(), rows)


def test_an_unused_capsule_releases_the_slot(ring):
    before = held_bytes()
    slot = ring.take(10)
    capsule = slot.tensor(UINT8, 0, slot.n_rows)
    del slot
    assert held_bytes() > before
    del capsule
    assert held_bytes() == before


@pytest.mark.parametrize(("n_bytes", "is_copied"), [(512, True), (4096, True), (8192, False)])
def test_a_small_column_keeps_its_own_bytes_and_another_one_its_slot(n_bytes, is_copied):
    rows = np.random.default_rng(5).integers(0, 256, (8, 8192), dtype=np.uint8)  # 64 KiB, of which 4 KiB are a 16th
    ring, before = ring_of(rows), held_bytes()
    slot = ring.take(10)
    small = from_dlpack(slot.tensor(RowType(1, 8), 0, n_bytes))
    array = np.frombuffer(slot.column(0, n_bytes), np.uint8)
    memoryview(slot)[:8192] = bytes(8192)
    del slot
    assert small.data_ptr() % 64 == array.ctypes.data % 64 == 0
    if is_copied:
        assert held_bytes() - before == 2 * n_bytes
        assert np.array_equal(small.numpy(), rows.ravel()[:n_bytes])
        assert np.array_equal(array, rows.ravel()[:n_bytes])
    else:
        assert held_bytes() - before >= rows.nbytes
        assert not small.any()
        assert not array.any()
    del small, array
    assert held_bytes() == before
    ring.close()


def test_the_slot_is_released_when_memory_for_a_capsule_is_missing(ring):
    testcapi = pytest.importorskip("_testcapi")
    before = held_bytes()
    slot = ring.take(10)
    tensor, n_rows = slot.tensor, slot.n_rows
    try:
        testcapi.set_nomemory(0, 0)  # of Python's own; the tensor's is malloc's
        tensor(UINT8, 0, n_rows)
    except MemoryError:
        failed = True
    else:
        failed = False
    finally:
        testcapi.remove_mem_hooks()
    assert failed
    del slot, tensor
    gc.collect()
    assert held_bytes() == before


def test_any_thread_may_drop_a_tensor(rows):
    before, start = held_bytes(), threading.Barrier(4)

    def drop(held: list[torch.Tensor]) -> None:
        start.wait()
        while held:
            held.pop()

    for _ in range(50):
        ring, lists = ring_of(rows), [[] for _ in range(4)]
        while not isinstance(slot := ring.take(10), int):
            for held in lists:
                held.append(from_dlpack(slot.tensor(UINT8, 0, slot.n_rows)))
        del slot
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(drop, lists))
        ring.close()
    assert held_bytes() == before


@pytest.mark.parametrize(("offset", "n_rows"), [(0, 1 << 20), (1 << 40, 1), (64, 1 << 58)])
def test_rows_outside_the_slot_raise_an_error(ring, offset, n_rows):
    with pytest.raises(ValueError, match="the slot's"):
        ring.take(10).tensor(UINT8, offset, n_rows)


def test_an_invalid_layout_raises_an_error():
    for bits, shape in ((8, (1,) * 64), (4, (2,)), (8, (-1, -1))):
        with pytest.raises(ValueError, match="whole bytes"):
            RowType(1, bits, shape)
    with pytest.raises(OverflowError):
        RowType(1, 8, (1 << 32, 1 << 32))
