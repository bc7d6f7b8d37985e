"""Many frames are decoded to reused memory, by libzstd and without it."""

import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.shard import codec
from tiercache.shard.codec import HUGE_PAGE_BYTES, BufferPool, address_of


def frames_of(contents: list[bytes], stored: list[bytes] | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    kept = [np.frombuffer(s, np.uint8) for s in stored or [codec.compress(c, 3) for c in contents]]
    numbers = ([address_of(k) for k in kept], [len(k) for k in kept], [len(c) for c in contents])
    return [np.array(n, np.uint64) for n in numbers], kept


@pytest.fixture(params=["libzstd", "python"])
def way(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(codec, "_decode_native", lambda *_: 0)
    elif codec.find_libzstd() is None:
        pytest.skip("no libzstd here")


@given(contents=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=12))
def test_decoding_many_frames_gives_the_content_of_each(contents):
    frames, kept = frames_of(contents)
    memory, addresses = codec.decode(*frames)
    places = (addresses - np.uint64(address_of(memory))).tolist()
    assert [memory[p : p + len(c)].tobytes() for p, c in zip(places, contents, strict=True)] == contents
    assert all(address % 64 == 0 for address in addresses.tolist())
    assert len(kept) == len(contents)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [0, 2])
def test_a_frame_that_cannot_be_decoded_is_named_by_its_number(bad):
    contents = [bytes([n]) * 1000 for n in range(3)]
    stored = [codec.compress(c, 3) for c in contents]
    stored[bad] = stored[bad][:-3] + b"\xff\xff\xff"
    frames, _kept = frames_of(contents, stored)
    with pytest.raises(codec.BadFrameError) as caught:
        codec.decode(*frames)
    assert caught.value.number == bad


@pytest.mark.usefixtures("way")
def test_a_frame_of_another_length_than_stated_is_an_error():
    frames, _kept = frames_of([b"a" * 10, b"b" * 10], [codec.compress(b"a" * 10, 3), codec.compress(b"b" * 11, 3)])
    with pytest.raises(codec.BadFrameError, match="11 bytes, expected 10"):
        codec.decode(*frames)


def test_the_pool_reuses_memory_while_some_is_in_use_and_frees_it_afterwards():
    pool = BufferPool()
    first, second = pool.allocate(3 << 20), pool.allocate(3 << 20)
    address = address_of(second)
    assert address % HUGE_PAGE_BYTES == 0
    part = second[100:200]  # whoever holds a part holds all of it
    del second
    assert pool.used_bytes == 8 << 20
    del part
    assert (pool.used_bytes, pool.free_bytes) == (4 << 20, 4 << 20)
    again = pool.allocate(3 << 20)
    assert address_of(again) == address
    del first, again
    gc.collect()
    assert (pool.used_bytes, pool.free_bytes) == (0, 0)


def test_the_pool_keeps_at_most_as_much_memory_as_is_in_use():
    pool = BufferPool()
    kept = pool.allocate(2 << 20)
    for _ in range(4):
        loans = [pool.allocate(2 << 20) for _ in range(4)]
        del loans
        assert pool.free_bytes <= pool.used_bytes
    assert kept.nbytes == 2 << 20
