"""Large parts of new files go past the page cache where the system can, and every byte arrives in any case."""

from __future__ import annotations

import errno
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tiercache.errors import StoreError
from tiercache.store import local
from tiercache.store.local import ALIGN_BYTES, MIN_BYTES, DirectWriter, LocalFolder

SIZES = (MIN_BYTES - 1, MIN_BYTES, MIN_BYTES + 1, 2 * MIN_BYTES + ALIGN_BYTES - 1, 3 * MIN_BYTES)


@pytest.fixture(autouse=True)
def from_the_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays in the cache because it is written first."""
    monkeypatch.setattr(local, "CACHED_BYTES", 0)


def aligned(n_bytes: int, shift: int = 0) -> np.ndarray:
    """Random bytes that begin `shift` behind a multiple of ALIGN_BYTES."""
    memory = np.random.default_rng(n_bytes).integers(0, 256, n_bytes + 2 * ALIGN_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGN_BYTES + shift
    return memory[start : start + n_bytes]


def upload(folder: Path, parts: list[np.ndarray]) -> bytes:
    """What the file holds once the parts were uploaded."""
    made = LocalFolder(folder).create("a/b")
    for number, part in enumerate(parts):
        made.put_part(number, part.data)
    made.complete()
    return (folder / "a/b").read_bytes()


def test_parts_of_any_size_and_alignment_are_written_completely(tmp_path: Path) -> None:
    for n_bytes, shift in product(SIZES, (0, 1, 512)):
        parts = [aligned(n_bytes, shift), aligned(MIN_BYTES, shift), aligned(5)]
        written = upload(tmp_path / f"{n_bytes}-{shift}", parts)
        assert written == b"".join(part.tobytes() for part in parts), (n_bytes, shift)


def test_only_aligned_pages_of_large_parts_are_written_directly(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        writer = DirectWriter(file.fileno())
        if not writer.write(aligned(MIN_BYTES).data, 0):
            pytest.skip(f"{tmp_path} is on a file system without direct writes")
        assert writer.write(aligned(MIN_BYTES + 7).data, MIN_BYTES) == MIN_BYTES
        assert writer.write(aligned(MIN_BYTES - 1).data, 0) == 0
        assert writer.write(aligned(MIN_BYTES).data, 1) == 0
        assert writer.write(aligned(MIN_BYTES, shift=8).data, 0) == 0
        writer.close()
        writer.close()
        assert writer.write(aligned(MIN_BYTES).data, 0) == 0


def test_a_file_system_that_refuses_direct_writes_is_written_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = aligned(2 * MIN_BYTES)
    for refusal, n_written in product((errno.EINVAL, errno.EFAULT), (0, ALIGN_BYTES, ALIGN_BYTES + 1)):
        monkeypatch.setattr(local, "os", Refusing(refusal, n_written))
        written = upload(tmp_path / f"{refusal}-{n_written}", [part, part])
        assert written == 2 * part.tobytes(), (refusal, n_written)


class Refusing:
    """A system whose descriptors for direct writes take some bytes once, and then nothing."""

    O_DIRECT = os.O_WRONLY

    def __init__(self, refusal: int, n_written: int) -> None:
        self.refusal, self.n_written, self.direct = refusal, n_written, set()

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def open(self, path: str, *flags: int, **more: int) -> int:
        fd = os.open(path, *flags, **more)
        self.direct.update([fd] if str(path).startswith("/proc/self/fd/") else [])
        return fd

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        if fd not in self.direct:
            return os.pwrite(fd, data, offset)
        n_bytes, self.n_written = self.n_written, 0
        if not n_bytes:
            raise OSError(self.refusal, "no")
        return os.pwrite(fd, data[:n_bytes], offset)


def test_a_full_disk_is_an_error_of_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DirectWriter, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(DirectWriter, "write", full)
    made = LocalFolder(tmp_path).create("a")
    with pytest.raises(StoreError, match="No space left"):
        made.put_part(0, aligned(MIN_BYTES).data)
    made.abort()
    assert list(tmp_path.iterdir()) == []
