"""Transfer of objects between tiers: streamed or copied by the server, with a checksum that is compared afterwards."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Lock
from typing import TypeAlias

from tiercache._native.checksum import combine, crc32c
from tiercache.catalog.tiers import JournalObject
from tiercache.crash_points import crash_point
from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.store import CloudStore, LocalFolder
from tiercache.store.archive import S3Archive
from tiercache.store.contract import Upload
from tiercache.tier.model import ARCHIVED, RESTORING, PlannedObject
from tiercache.tier.move.parts import (
    MOST_PARTS,
    PART_BYTES,
    CopiedPart,
    PartBufferPool,
    PartReader,
    RateLimit,
    cancelled,
    ranges_of,
)
from tiercache.tier.stores import Stores, state_of
from tiercache.waiting import SYSTEM_CLOCK, Clock

# An object as a plan or the journal expects it.
ExpectedObject: TypeAlias = PlannedObject | JournalObject


def check_absent(stores: Stores, tier: str, key: str) -> None:
    """Raise ObjectChanged if the destination has an object."""
    try:
        info = stores.head(tier, key)
    except NotFound:
        return
    # The object may be our own, if the answer of the store was lost: the next attempt compares it.
    message = "the destination was created concurrently: it is not overwritten"
    url = f"{stores.store(tier).url}/{key}"
    raise ObjectChanged(message, url=url, expected="nothing", found=f"{info.n_bytes} bytes")


def check_over(stores: Stores, tier: str, key: str, etag: str) -> None:
    """Raise ObjectChanged if the destination does not have the object with this ETag."""
    try:
        found = stores.head(tier, key).etag
    except NotFound:
        found = None
    if found != etag:
        message = "the object to replace was changed concurrently: it is not overwritten"
        raise ObjectChanged(message, url=f"{stores.store(tier).url}/{key}", expected=etag, found=found)


# Parts of one object that are read ahead of the part that is written, or in flight at once where the upload allows it.
_AHEAD = 2
_TOGETHER = 6
# Up to this size an object is read by one request, which also returns its metadata.
_SMALL_BYTES = 1 << 20
_MD5 = re.compile(r'"?[0-9a-f]{32}"?')


@dataclass(frozen=True, slots=True)
class VerifiedCopy:
    """A copy that was made and verified, as far as that is possible at once: see Transfer.needs_disk_check().

    Attributes:
        n_bytes: Size, in bytes.
        crc32c: CRC-32C of its bytes. None where the server copied and no such checksum was known: other checksums, or
            the bytes themselves, were compared then.
        etag: ETag of the copy.
    """

    n_bytes: int
    crc32c: int | None
    etag: str | None


def _nothing(_n_bytes: int) -> None:
    return


class Transfer:
    """Copies objects between tiers, changes their storage class, and deletes them.

    Thread-safe: `jobs` threads may copy. Use it as a context manager, or call close(). At most jobs x 3 parts of 8 MiB
    are in memory, and 2 more for each of its own threads. Errors are StoreError. An object at the destination stays
    until all of the source was read and, where its checksum is known, compared.
    """

    def __init__(
        self,
        stores: Stores,
        *,
        jobs: int = 8,
        rate_bytes_s: int | None = None,
        cancel: Event | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Store the arguments; no thread is started yet.

        Args:
            stores: Stores of the rule file, which stay the caller's.
            jobs: Number of objects that are copied at once.
            rate_bytes_s: Limit of all copies together, in bytes per second. None: no limit.
            cancel: Event that ends every copy soon when it is set, with a StoreError that has .cancelled.
            clock: Clock by which the rate is measured.
        """
        if jobs < 1 or (rate_bytes_s is not None and rate_bytes_s < 1):
            raise ValueError(f"jobs and rate_bytes_s must be at least 1, got {jobs} and {rate_bytes_s}")
        self._stores, self._cancel = stores, cancel or Event()
        self._pace = RateLimit(rate_bytes_s, clock, self._cancel)
        self._pool = ThreadPoolExecutor(max(jobs, _TOGETHER), thread_name_prefix="tiercache-transfer")
        self._buffers = PartBufferPool()
        self._lock, self._n_reading = Lock(), 0

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for running work, and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._buffers.clear()

    def copy(
        self,
        src: str,
        dst: str,
        one: ExpectedObject,
        *,
        on_bytes: Callable[[int], object] | None = None,
        replaces: bool | str = True,
    ) -> VerifiedCopy:
        """Copy an object to another tier, under the same key and with that tier's storage class, and verify the copy.

        The copy appears complete, and replaces what was there. If one server has both tiers, the server copies. If the
        store reports a checksum of what it received, the checksum is trusted if it equals ours. Otherwise the copy is
        read back, except for large files in local folders: these are complete and synced, and checksum_on_disk()
        reads them later.

        Args:
            src: Name of the source tier.
            dst: Name of the destination tier.
            one: Expected object: size, ETag (or else date), and CRC-32C, as far as they are known.
            on_bytes: Function that receives the length of each part that was read; called from any thread.
            replaces: False: nothing was at the destination when the caller looked, and an object that appears there
                stays. The store enforces this; for more than 1 MiB in a cloud without boto3, the destination is checked
                directly before the upload completes. An ETag: only the object with this ETag is overwritten. This is
                checked directly before; with boto3 the request names the ETag too.

        Raises:
            NotFound: The object is not in src.
            ObjectChanged: The object is not the expected one, or changed during the copy; or the destination has an
                object that must not be overwritten.
            StoreError: .archived: the object must be restored first. .cancelled: the copy was cancelled. .wrong: the
                data that arrived was not the data that was read, and the copy was removed. .spoilt: the source does not
                have the expected checksum. Otherwise a store failed.
            ValueError: Both tiers are one location: use change_class().
        """
        if self._stores.same_url(src, dst):
            raise ValueError(f"{src} and {dst} have one URL: a move between them changes the class of {one.key}")
        self._check_cancelled(src, one.key)
        said = on_bytes or _nothing
        if (
            self._stores.same_endpoint(src, dst)
            and (made := self._by_server(src, dst, one, said, replaces=replaces)) is not None
        ):
            return made
        if one.n_bytes <= _SMALL_BYTES:
            return self._at_once(src, dst, one, said, replaces=replaces)
        return self._streamed(src, dst, one, said, replaces=replaces)

    def check(self, name: str, one: ExpectedObject) -> ObjectInfo:
        """Return the metadata of an object, if it is the planned one and can be read. Raises as copy()."""
        self._check_cancelled(name, one.key)
        info = self._stores.head(name, one.key)
        self._expect(name, one, info)
        if not _is_readable(info):
            message = f"it is archived ({info.storage_class}) and must be restored first: tiercache restore {one.key}"
            raise StoreError(message, url=self._at(name, one.key), archived=True)
        return info

    def _expect(self, name: str, one: ExpectedObject, info: ObjectInfo) -> None:
        """Raise ObjectChanged if an object is not the planned one."""
        pairs: list[tuple[str, object, object]] = [("size", one.n_bytes, info.n_bytes)]
        if one.etag is not None and info.etag is not None:
            pairs.append(("ETag", one.etag, info.etag))
        elif one.modified_s is not None and info.modified_s is not None:
            # A listing and a HEAD may give the date with different fractions of a second.
            pairs.append(("date", int(one.modified_s), int(info.modified_s)))
        for what, expected, found in pairs:
            if expected != found:
                message = f"its {what} is not what was planned"
                raise ObjectChanged(message, url=self._at(name, one.key), expected=expected, found=found)

    def _at(self, name: str, key: str) -> str:
        return f"{self._stores.store(name).url}/{key}"

    def _by_server(
        self, src: str, dst: str, one: ExpectedObject, on_bytes: Callable[[int], object], *, replaces: bool | str
    ) -> VerifiedCopy | None:
        """Return the copy that the server made; None, after removing it, if checksums do not show that it is equal."""
        info = self.check(src, one)
        source, target = self._archive(src), self._archive(dst)
        if isinstance(replaces, str):
            check_over(self._stores, dst, one.key, replaces)
        self._pace.take(info.n_bytes)
        before = source.checksums(one.key)
        try:
            made = target.copy_from(
                source,
                one.key,
                one.key,
                storage_class=self._stores.file.tier(dst).storage_class,
                if_match=info.etag,
                crc32c=one.crc32c,
                if_absent=not replaces,
                over=replaces if isinstance(replaces, str) else None,
            )
        except ObjectChanged:
            if not replaces:
                check_absent(self._stores, dst, one.key)
            raise
        if one.crc32c is not None and made.crc32c is None:
            # A copy that equals the source does not show that the source is the expected object: only its bytes do.
            is_proven = _is_readable(made) and self.checksum_of(dst, made) == one.crc32c
        else:
            is_proven = _is_proven(before, target.checksums(one.key), one, made)
        if made.n_bytes != info.n_bytes or not is_proven:
            # This copy is ours, perhaps of a source that rotted: it must not stay, nor be taken for somebody else's
            # object.
            self._remove(dst, made)
            return None
        on_bytes(info.n_bytes)
        return VerifiedCopy(made.n_bytes, one.crc32c if made.crc32c is None else made.crc32c, made.etag)

    def _at_once(
        self, src: str, dst: str, one: ExpectedObject, on_bytes: Callable[[int], object], *, replaces: bool | str
    ) -> VerifiedCopy:
        """Copy a small object.

        One request reads it and its metadata, because requests dominate the cost of small objects.
        """
        self._pace.take(one.n_bytes)
        try:
            data, info = self._stores.store(src).read_tail(one.key, max(one.n_bytes, 1))
        except NotFound:
            raise
        except StoreError:
            self.check(src, one)  # raises a better error if it knows why the object cannot be read
            raise
        self._expect(src, one, info)
        on_bytes(len(data))
        with self._upload(dst, info, replaces) as (upload, _):
            upload.put_part(0, data)
            return self._completed(src, dst, one, (upload, crc32c(data)), replaces=replaces)

    def _streamed(
        self, src: str, dst: str, one: ExpectedObject, on_bytes: Callable[[int], object], *, replaces: bool | str
    ) -> VerifiedCopy:
        info = self.check(src, one)
        reading = PartReader(self._stores.store(src), info, self._cancel)
        with self._upload(dst, info, replaces) as (upload, in_order):
            crc = self._written(upload, self._parts(reading, None if in_order else upload, on_bytes))
            return self._completed(src, dst, one, (upload, crc), replaces=replaces)

    def _completed(
        self, src: str, dst: str, one: ExpectedObject, written: tuple[Upload, int], *, replaces: bool | str
    ) -> VerifiedCopy:
        """Publish and verify the copy. written: The upload, and the CRC-32C of the bytes that it was given."""
        upload, crc = written
        if one.crc32c is not None and crc != one.crc32c:
            # Before complete(), so that the object at the destination stays.
            raise _wrong(self._at(src, one.key), one.crc32c, crc, "the source")
        self._check_cancelled(dst, one.key)
        made = self._published(dst, one, upload, replaces=replaces)
        crash_point("tier_transfer.published")
        if getattr(upload, "is_confirmed", False) and made.etag is not None and made.n_bytes == one.n_bytes:
            return VerifiedCopy(one.n_bytes, crc, made.etag)
        return self._verified(dst, one.n_bytes, crc, made)

    def _published(self, dst: str, one: ExpectedObject, upload: Upload, *, replaces: bool | str) -> ObjectInfo:
        """Complete the upload, and return the object.

        Reading the source took minutes, in which somebody may have written.
        """
        if isinstance(replaces, str):
            check_over(self._stores, dst, one.key, replaces)
        made = upload.complete(if_absent=not replaces)
        if made is None:
            check_absent(self._stores, dst, one.key)
            raise ObjectChanged("the destination was changed concurrently: run again", url=self._at(dst, one.key))
        return made

    def _written(self, upload: Upload, parts: Generator[CopiedPart, None, None]) -> int:
        """Write the parts that bring their bytes, and return the CRC-32C of all. No part is in flight afterwards."""
        crc = 0
        with closing(parts):
            for number, part in enumerate(parts):
                crc = combine(crc, part.crc32c, part.n_bytes)
                if part.buffer is not None:
                    upload.put_part(number, part.buffer.data[: part.n_bytes])
                    self._buffers.give(part.buffer)
        return crc

    @contextmanager
    def _upload(self, dst: str, info: ObjectInfo, replaces: bool | str) -> Iterator[tuple[Upload, bool]]:
        """Yield an upload to a tier, and whether it needs its parts in order."""
        archive, store = self._stores.archive(dst), self._stores.store(dst)
        if archive is not None:
            over = replaces if isinstance(replaces, str) else None
            storage_class = self._stores.file.tier(dst).storage_class
            with archive.create(info.key, storage_class=storage_class, if_match=over) as upload:
                yield upload, False
            return
        if isinstance(store, CloudStore) and info.n_bytes > MOST_PARTS * PART_BYTES:
            message = f"{info.n_bytes} bytes are more than this client writes in parts of 8 MiB"
            hint = ": pip install 'tiercache[archive]'" if store.cloud == "s3" else ""
            raise StoreError(message + hint, url=f"{store.url}/{info.key}")
        with store.create(info.key) as upload:
            yield upload, True

    def _parts(
        self, reading: PartReader, upload: Upload | None, on_bytes: Callable[[int], object]
    ) -> Generator[CopiedPart, None, None]:
        """Yield the object's parts in order, read ahead.

        If upload is given, the threads that read the parts also write them.
        """
        ranges = ranges_of(reading.info.n_bytes)
        if len(ranges) == 1:
            yield self._part(reading, ranges[0], upload, on_bytes)
            return
        running: deque[Future[CopiedPart]] = deque()
        is_file = upload is None and isinstance(reading.store, LocalFolder)
        self._count(1)
        try:
            for wanted in ranges:
                # Other files that are copied at the same time keep the disks busy; a handover between threads would
                # only cost.
                if is_file and not running and self._n_reading > 1:
                    yield self._part(reading, wanted, upload, on_bytes)
                    continue
                running.append(self._pool.submit(self._part, reading, wanted, upload, on_bytes))
                if len(running) > (_AHEAD if upload is None else _TOGETHER):
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            self._count(-1)
            self._give_up(running)

    def _count(self, n: int) -> None:
        with self._lock:
            self._n_reading += n

    def _give_up(self, running: deque[Future[CopiedPart]]) -> None:
        """Wait for the parts in flight, which use the upload, and take their buffers back."""
        for future in running:
            future.cancel()
        for future in running:
            if not future.cancelled() and future.exception() is None and (buffer := future.result().buffer) is not None:
                self._buffers.give(buffer)

    def _part(
        self,
        reading: PartReader,
        wanted: tuple[int, ByteRange],
        upload: Upload | None,
        on_bytes: Callable[[int], object],
    ) -> CopiedPart:
        number, span = wanted
        self._pace.take(span.n_bytes)
        buffer = self._buffers.take(span.n_bytes)
        kept = False
        try:
            data = buffer.data[: span.n_bytes]
            reading.read(span, data)
            crc = crc32c(data)
            if upload is not None:
                upload.put_part(number, data)
            kept = upload is None
        finally:
            if not kept:
                self._buffers.give(buffer)
        on_bytes(span.n_bytes)
        return CopiedPart(crc, span.n_bytes, buffer if kept else None)

    def _verified(self, dst: str, n_bytes: int, crc: int, made: ObjectInfo) -> VerifiedCopy:
        """Return the copy, if it is there and equals what was read; otherwise remove it and raise."""
        info, found = self._looked_at(dst, made, n_bytes, crc)
        where = self._at(dst, made.key)
        if made.etag is not None and info.etag != made.etag:
            message = "somebody else has written it since it was copied"
            raise ObjectChanged(message, url=where, expected=made.etag, found=info.etag)
        if info.n_bytes != n_bytes:
            self._remove(dst, info)
            raise _wrong(where, f"{n_bytes} bytes", f"{info.n_bytes} bytes", "the copy")
        if crc in (info.crc32c, found):
            return VerifiedCopy(n_bytes, crc, info.etag)
        if not _is_readable(info):
            self._remove(dst, info)
            message = "the store names no checksum of the copy, and archived it cannot be read back: it was removed"
            raise StoreError(message, url=where, wrong=True)
        # A checksum of the store that differs does not prove a bad copy (moto computes it of something else): bytes
        # decide.
        if found is None:
            found = self.checksum_of(dst, info)
        if found != crc:
            self._remove(dst, info)
            raise _wrong(where, crc, found, "the copy")
        return VerifiedCopy(n_bytes, crc, info.etag)

    def _looked_at(self, name: str, made: ObjectInfo, n_bytes: int, crc: int) -> tuple[ObjectInfo, int | None]:
        """Return the metadata of a copy, and its CRC-32C if known. crc: CRC-32C of the bytes that were written."""
        store = self._stores.store(name)
        if n_bytes <= _SMALL_BYTES and self._stores.archive(name) is None:
            data, info = store.read_tail(made.key, n_bytes + 1)
            return info, crc32c(data)
        # A local folder has just checked the file.
        return (made, crc) if self.needs_disk_check(name) else (self._stores.head(name, made.key), None)

    def needs_disk_check(self, name: str) -> bool:
        """Return whether copies in a tier must be read from disk before their sources are deleted: files.

        Only reading a disk shows what it has, and a later read shows more: docs/design/tiers.md.
        """
        return isinstance(self._stores.store(name), LocalFolder)

    def checksum_on_disk(self, name: str, info: ObjectInfo, on_bytes: Callable[[int], object] = _nothing) -> int:
        """Return the CRC-32C of a file as its disk has it, past the page cache. on_bytes, errors: As copy()."""
        if isinstance(store := self._stores.store(name), LocalFolder):
            store.forget_cached(info.key)
        return self.checksum_of(name, info, on_bytes)

    def checksum_of(self, name: str, info: ObjectInfo, on_bytes: Callable[[int], object] = _nothing) -> int:
        """Read all bytes of an object, and return their CRC-32C. on_bytes, errors: As copy()."""
        crc = 0
        with closing(self._parts(PartReader(self._stores.store(name), info, self._cancel), None, on_bytes)) as parts:
            for part in parts:
                crc = combine(crc, part.crc32c, part.n_bytes)
                self._buffers.give(part.buffer)
        return crc

    def change_class(self, dst: str, one: ExpectedObject) -> VerifiedCopy:
        """Give an object, in place, the storage class of a tier with the same URL.

        No data is read unless checksums leave doubt.

        Raises:
            NotFound, ObjectChanged, StoreError: As copy(). .wrong: the object is not the expected one afterwards.
            ValueError: The store of the tier has no storage classes.
        """
        archive = self._archive(dst)
        info = self.check(dst, one)
        wanted = self._stores.class_of(dst)
        before = archive.checksums(one.key)
        made = info if info.storage_class == wanted else archive.set_class(one.key, wanted, if_match=info.etag)
        where = self._at(dst, one.key)
        if made.n_bytes != info.n_bytes or made.storage_class != wanted:
            found = f"{made.n_bytes} bytes, {made.storage_class}"
            raise _wrong(where, f"{info.n_bytes} bytes, {wanted}", found, "the object")
        if _is_proven(before, archive.checksums(one.key), one, made):
            return VerifiedCopy(made.n_bytes, one.crc32c if made.crc32c is None else made.crc32c, made.etag)
        # The checksums are not conclusive: a readable object is read; of an archived one only size and class are known.
        crc = self.checksum_of(dst, made) if _is_readable(made) else None
        if None not in (crc, one.crc32c) and crc != one.crc32c:
            raise _wrong(where, one.crc32c, crc, "the object")
        return VerifiedCopy(made.n_bytes, crc, made.etag)

    def delete_objects(self, name: str, objects: Sequence[ExpectedObject]) -> None:
        """Delete objects of a tier, 1,000 per request where the store can. A missing object is not an error.

        The order is not defined. Only S3 and local folders check that an object still has its ETag; a local folder
        checks directly before it unlinks each file. The caller ensures all other conditions, and the order where one
        matters.

        Raises:
            StoreError: Some objects could not be deleted; .failed names them.
        """
        archive, store = self._stores.archive(name), self._stores.store(name)
        if archive is None:
            if not isinstance(store, LocalFolder):
                store.delete([one.key for one in objects])
                return
            dated = [(one.key, one.etag) for one in objects if one.etag is not None]
            store.delete([one.key for one in objects if one.etag is None])
            if changed := [key for key, etag in dated if not store.delete_unchanged(key, etag)]:
                message = f"{len(changed)} files were changed since they were looked at, and were not deleted"
                raise StoreError(message, url=self._at(name, changed[0]), failed=tuple(changed))
            return
        if objects:
            self._check_cancelled(name, objects[0].key)
        if failed := archive.delete_many([one.key for one in objects], if_match=[one.etag for one in objects]):
            (key, reason), n_failed = failed[0], len(failed)
            message = f"{n_failed} objects could not be deleted, the first because of {reason}"
            raise StoreError(message, url=self._at(name, key), failed=tuple(key for key, _ in failed))

    def _archive(self, name: str) -> S3Archive:
        archive = self._stores.archive(name)
        if archive is None:
            raise ValueError(f"tiers.{name}: its store has no storage classes to change")
        return archive

    def _remove(self, name: str, info: ObjectInfo) -> None:
        """Delete a wrong copy, if it is still there and was not replaced by somebody else."""
        with suppress(NotFound):
            if self._stores.head(name, info.key).etag == info.etag:
                self._stores.store(name).delete([info.key])

    def _check_cancelled(self, name: str, key: str) -> None:
        if self._cancel.is_set():
            raise cancelled(self._at(name, key))


def _is_readable(info: ObjectInfo) -> bool:
    return state_of(info) not in (ARCHIVED, RESTORING)


def is_md5(etag: str) -> bool:
    """Return whether an ETag is an MD5 of all bytes. The ETag of a multipart upload depends on its part sizes."""
    return _MD5.fullmatch(etag) is not None


def _is_proven(before: Mapping[str, str], after: Mapping[str, str], one: ExpectedObject, made: ObjectInfo) -> bool:
    """Return whether the store's checksums prove that a server-side copy is equal: all common ones must be equal."""
    if None not in (one.crc32c, made.crc32c):
        return one.crc32c == made.crc32c
    names = [name for name in before.keys() & after.keys() if name != "ETag"]
    if names:
        return all(before[name] == after[name] for name in names)
    return is_md5(before.get("ETag", "")) and before["ETag"].strip('"') == after.get("ETag", "").strip('"')


def _wrong(where: str, expected: object, found: object, what: str) -> StoreError:
    message = f"{what} is not what it should be: expected {_shown(expected)}, found {_shown(found)}"
    if what == "the copy":
        message += "; it was removed"
    return StoreError(message, url=where, wrong=True, spoilt=what == "the source", expected=expected, found=found)


def _shown(value: object) -> str:
    return f"CRC-32C {value:08x}" if isinstance(value, int) else str(value)
