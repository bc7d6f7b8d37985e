"""Mapped pages brought into memory before the gather asks for them, so that rows in any order cost no disk reads.

A mapping costs nothing until it is touched, and then a disk read for each place that is touched first: rows in random
order read a disk at its worst. The blocks of a window are known before its first row is served, so they are read whole,
in the order of the file, by the threads that load windows, while the window before is served.

Rows at random places miss the processor's table of addresses with nearly every row, unless the file lies in memory, and
is mapped, in pieces of 2 MiB. Linux does so on file systems with large folios (ext4 since 6.16) where a mapping is
advised to before its first fault. Shuffled rows then come 1.0 to 1.07 times as fast, and reading 512 MiB
takes 0.007 s of a processor instead of 0.18 for WILLNEED, which makes pages of 4 KiB.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from concurrent.futures import Future
from functools import cache
from typing import TYPE_CHECKING, cast

import numpy as np

from tiercache import config
from tiercache._native.residence import are_resident

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from tiercache.load.window import Loaded, Threads
    from tiercache.order import Window
    from tiercache.shard.blocks import Blocks

# Of the memory that the process does not use itself, for the pages of one window of each stream: two are near at a
# time, and pages beyond that would push out pages that are still to be served.
NEAR_SHARE = 3
# Asked for at once: enough for any disk to be read at its full speed, and closing never waits for more.
STEP_BYTES = 4 << 20
_HUGE_BYTES = 2 << 20
# The kernel reads whole huge pages then, so that blocks that lie scattered bring near what lies beside them: up to so
# many times what is wanted where all of the data set stays in memory anyway, and where it does not.
_MOST_BESIDE, _MOST_BESIDE_IF_LARGER = 4.0, 1.25
_LINUX = sys.platform == "linux"
# Of Linux: COLD since 5.4, POPULATE_READ since 5.14.
_RANDOM, _WILLNEED, _DONTNEED, _HUGEPAGE, _NOHUGEPAGE, _COLD, _POPULATE_READ = 1, 3, 4, 14, 15, 20, 22
# Before it, advice to read ext4 by huge pages would make larger reads of small pages, fewer at a time.
_HUGE_SINCE = (6, 16)


class Ahead:
    """Keeps the mapped pages of the windows of an epoch near while they are served. For the planner's thread.

    stored_bytes: of the whole data set: if it fits memory, pages that were served stay for the next epoch.
    """

    def __init__(self, threads: Threads, stored_bytes: int) -> None:
        self._threads = threads
        self._stored_bytes = stored_bytes
        self._near: list[tuple[Window, list[Blocks]]] = []

    def bring_near(
        self, windows: Sequence[Loaded], serving: Sequence[Window], *, is_served: bool = False
    ) -> list[Future[int]]:
        """Start reading what is mapped of windows into memory, as much as there is room for; returns at once.

        What there is no room for is read when its rows are gathered, and if they are shuffled then without their
        neighbours. Of the windows brought before, pages of those that are not served any more are let go.

        Args:
            windows: that were loaded.
            serving: which windows are, or will be next, these among them.
            is_served: whether rows of these windows are being gathered already. If they may be in any order,
                nothing is read by huge pages: the first batch would wait for one for each of its rows.

        Returns:
            For each Blocks that is read a future of the bytes that are near. A range that cannot be read is no error
            here: whoever needs it finds out, and says which it was.
        """
        if not _LINUX or not windows:
            return []  # what the numbers above mean elsewhere is not known
        free_bytes = self._threads.limit_bytes - config.private_bytes()
        fits = self._stored_bytes <= free_bytes
        self._let_go(serving, larger=not fits)
        room_bytes = free_bytes // NEAR_SHARE
        reads: list[Future[int]] = []
        for loaded in windows:
            sizes = [int(blocks.pages[:, 1].sum()) for blocks in loaded.held]
            n_near = count_near(sizes, room_bytes)
            room_bytes -= sum(sizes[:n_near])
            if loaded.window.key is not None:
                for blocks in loaded.held[n_near:]:
                    _expect_single_rows(blocks.pages)
            # Kept until the window is served; decoded blocks are not, for theirs is memory that others need before.
            self._near.append((loaded.window, [blocks for blocks in loaded.held if not blocks.private_bytes]))
            waits = is_served and not loaded.window.is_in_order
            most = 0.0 if waits else _MOST_BESIDE if fits else _MOST_BESIDE_IF_LARGER
            reads += [self._start(blocks, most) for blocks in loaded.held[:n_near] if len(blocks.pages)]
        return reads

    def _start(self, blocks: Blocks, most: float) -> Future[int]:
        # Asking takes 0.2 ms for 512 MiB that are mapped (in Python, step by step, it took 2.5 ms of an epoch of 21),
        # populating them again 18 to 33 ms of a core, in each epoch.
        pages = blocks.pages
        if is_in_memory(blocks):
            near: Future[int] = Future()
            near.set_result(int(pages[:, 1].sum()))
            return near
        huge = _kernel() >= _HUGE_SINCE and share_of_huge_pages(pages) <= most and _expect(pages, _HUGEPAGE)
        return self._threads.executor.submit(_read, blocks, self._threads.stop, huge)

    def _let_go(self, serving: Sequence[Window], *, larger: bool) -> None:
        """Forget windows that were served; if the data set is larger than memory, mark their pages as first to go."""
        ids = set(map(id, serving))
        gone = [near for near in self._near if id(near[0]) not in ids]
        self._near = [near for near in self._near if id(near[0]) in ids]
        for blocks in [blocks for _, of_window in gone for blocks in of_window] if larger else []:
            self._threads.executor.submit(_cool, blocks)


def is_in_memory(blocks: Blocks) -> bool:
    """Whether all that is mapped of blocks is in memory, and whoever says so may be believed."""
    return _LINUX and blocks.tells_residence and are_resident(blocks.pages)


def plan_steps(pages: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Pages as steps of STEP_BYTES at most, in order, cut at multiples of it: (address, bytes) of each.

    Args:
        pages: uint64[n, 2], (address, bytes), rising.
    """
    return [
        (max(at, start), min(at + STEP_BYTES, start + n_bytes) - max(at, start))
        for start, n_bytes in pages.tolist()
        for at in range(start // STEP_BYTES * STEP_BYTES, start + n_bytes, STEP_BYTES)
    ]


def count_near(sizes: Sequence[int], room_bytes: int) -> int:
    """How many of the first parts fit room_bytes together."""
    return int(np.searchsorted(np.cumsum(np.array(sizes, np.int64)), room_bytes, side="right"))


def share_of_huge_pages(pages: NDArray[np.uint64]) -> float:
    """Bytes of the huge pages that these pages, at least one, lie in, over their own. pages: as of plan_steps."""
    firsts, lasts = pages[:, 0] // _HUGE_BYTES, (pages.sum(axis=1) - 1) // _HUGE_BYTES
    n_pages = int((lasts - firsts + 1).sum()) - int((firsts[1:] == lasts[:-1]).sum())
    return n_pages * _HUGE_BYTES / int(pages[:, 1].sum())


def _expect_single_rows(pages: NDArray[np.uint64]) -> None:
    """Let the kernel read the pages that are touched and no others from their first to their last.

    Else it reads what lies around, and throws out what it read before: 1 MiB for 256 rows so, and 336 MiB where huge
    pages were expected before.
    """
    if len(pages):
        _expect(pages, _NOHUGEPAGE)
        _expect(pages, _RANDOM)


def _expect(pages: NDArray[np.uint64], advice: int) -> bool:
    """Advise the kernel of all that lies from the first to the last page.

    The range is not split by block: each piece with advice of its own counts against the process's mappings.
    """
    start, stop = int(pages[0, 0]), int(pages[-1].sum())
    return _advise(start, stop - start, advice)


def _read(blocks: Blocks, stop: Future[None], huge: bool) -> int:
    """Have the pages of blocks read and mapped, step by step; how many bytes are."""
    steps = plan_steps(blocks.pages)
    # The disk hears of all of it at once; the steps then wait for what is under way.
    for address, n_bytes in steps if not huge else ():
        _advise(address, n_bytes, _WILLNEED)
    near_bytes = 0
    for address, n_bytes in steps:
        # A kernel before 5.14 refuses to populate: its reads are under way nevertheless, each page's first touch finds
        # them. A file that was cut short is refused too (EFAULT), and is no signal here.
        if stop.done() or not _advise(address, n_bytes, _POPULATE_READ):
            break
        near_bytes += n_bytes
    return near_bytes


def _cool(blocks: Blocks) -> None:
    """Unmap pages that were served, which stay in the cache as those that are thrown out first.

    Finding pages to throw out among mapped ones cost half of the disk's speed: 300 and 426 MB/s without this, 625 with
    it, and 510 to 900 for reads that map nothing. DONTNEED alone makes it worse: it counts unmapped pages as used.
    """
    steps = plan_steps(blocks.pages)
    for advice in (_COLD, _DONTNEED):
        for address, n_bytes in steps:
            _advise(address, n_bytes, advice)


def _advise(address: int, n_bytes: int, advice: int) -> bool:
    """Whether the kernel did so. ctypes and not mmap.madvise, which holds the GIL while the disk is read."""
    return _libc_madvise()(address, n_bytes, advice) == 0


@cache
def _kernel() -> tuple[int, int]:
    """The kernel's version; (0, 0): it says none."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@cache
def _libc_madvise() -> Callable[[int, int, int], int]:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return cast("Callable[[int, int, int], int]", madvise)
