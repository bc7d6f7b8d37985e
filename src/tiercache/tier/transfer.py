"""Transfer of objects between tiers: streamed in parts or copied by the server, with a checksum compared afterwards."""

from __future__ import annotations

import mmap
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event
from typing import NamedTuple, TypeAlias

from tiercache._native.checksum import combine, crc32c
from tiercache.crash_points import crash_point
from tiercache.distribution import install_command
from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.prices import PART_BYTES
from tiercache.store import CloudStore, LocalFolder
from tiercache.store.archive import MOST_PARTS, S3StorageClasses
from tiercache.store.contract import Upload
from tiercache.store.local import FileAttributes
from tiercache.tier.journal import CatalogEntry, PlannedObject
from tiercache.tier.stores import Stores, needs_restore

# Parts of one object that are read ahead of the part that is written, or in flight at once where the upload allows it.
_AHEAD = 2
_TOGETHER = 6
# Up to this size an object is read by one request, which also returns its metadata.
_SMALL_BYTES = 1 << 20
_MD5 = re.compile(r'"?[0-9a-f]{32}"?')


class PartBufferPool:
    """Free buffers of one part: new memory costs a page fault for every 4 KiB. Thread-safe.

    A buffer consists of whole pages, which a local folder writes with direct I/O.
    """

    def __init__(self) -> None:
        self._free: SimpleQueue[memoryview] = SimpleQueue()

    def take(self, n_bytes: int) -> memoryview:
        if n_bytes == PART_BYTES:
            with suppress(Empty):
                return self._free.get_nowait()
        # Private pages: the first touch of 128 MiB took 65 ms of CPU time, of shared pages 95 ms.
        return memoryview(mmap.mmap(-1, max(n_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:n_bytes]

    def give(self, buffer: memoryview | None) -> None:
        if buffer is not None and buffer.nbytes == PART_BYTES:
            self._free.put(buffer)


class _CopiedPart(NamedTuple):
    crc32c: int
    n_bytes: int
    buffer: memoryview | None


# What a copy may replace at its destination. False: nothing; True: any object; a string: the object with this ETag.
MayReplace: TypeAlias = bool | str


@dataclass(frozen=True, slots=True)
class _CopyRequest:
    src: str
    dst: str
    obj: PlannedObject
    on_bytes: Callable[[int], object]
    replaces: MayReplace
    written_s: float | None

    @property
    def replaced_etag(self) -> str | None:
        return self.replaces if isinstance(self.replaces, str) else None


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
        cancel: Event | None = None,
    ) -> None:
        """Start no thread yet.

        jobs: Number of objects that are copied at once. cancel: When set, every copy ends soon with a StoreError that
        has .cancelled.
        """
        self._stores, self._cancel = stores, cancel or Event()
        self._pool = ThreadPoolExecutor(max(jobs, _TOGETHER), thread_name_prefix="tiercache-transfer")
        self._buffers = PartBufferPool()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._buffers = PartBufferPool()

    def copy(
        self,
        src: str,
        dst: str,
        obj: PlannedObject,
        *,
        on_bytes: Callable[[int], object] | None = None,
        replaces: MayReplace = True,
        written_s: float | None = None,
    ) -> CatalogEntry:
        """Copy an object to another tier, under the same key and with that tier's storage class, and verify the copy.

        The copy appears complete, and replaces what was there. If one server has both tiers, the server copies. If the
        store reports a checksum of what it received, the checksum is trusted if it equals ours. Otherwise the copy is
        read back, except for large files in local folders: these are complete and synced, and checksum_on_disk()
        reads them later. The result has no checksum where the server copied and none was known: other checksums, or
        the bytes themselves, were compared then.

        A copy in a local folder keeps the modification time. A copy of a local file also keeps mode, group and, if root
        copies, owner; folders that it creates get those of the source's folders. Folders that exist keep their times,
        so that neither a move nor a recall makes an old checkpoint look like the newest.

        Args:
            src: Name of the source tier.
            dst: Name of the destination tier.
            obj: Expected object: size, ETag (or else date), and CRC-32C, as far as they are known.
            on_bytes: Function that receives the length of each part that was read; called from any thread.
            replaces: See MayReplace. False: nothing was at the destination when the caller looked, and an object that
                appears there stays. The store enforces this; for more than 1 MiB in a cloud without boto3, the
                destination is checked directly before the upload completes. An ETag: only the object with this ETag is
                overwritten. This is checked directly before; with boto3 the request names the ETag too.
            written_s: Time when the object was first written, in seconds since the epoch; None: the date in src. A
                store other than a local folder only has the date of the copy.

        Raises:
            NotFound, ObjectChanged: The object is not in src, is not the expected one or changed during the copy; or
                the destination has an object that must not be overwritten.
            StoreError: .archived: the object must be restored first. .cancelled: the copy was cancelled. .wrong: other
                data arrived than was read, and the copy was removed; or the source does not have the expected checksum.
                Otherwise a store failed.
        """
        if self._stores.same_url(src, dst):
            raise ValueError(f"{src} and {dst} have one URL: a move between them changes the class of {obj.key}")
        self._check_cancelled(src, obj.key)
        request = _CopyRequest(src, dst, obj, on_bytes or _nothing, replaces, written_s)
        made = self._copy_by_server(request) if self._stores.same_endpoint(src, dst) else None
        if made is None:
            made = self._copy_small(request) if obj.n_bytes <= _SMALL_BYTES else self._copy_in_parts(request)
        return made

    def check(self, name: str, obj: PlannedObject) -> ObjectInfo:
        """Return the metadata of an object, if it is the planned one and can be read. Raises as copy()."""
        self._check_cancelled(name, obj.key)
        info = self._stores.head(name, obj.key)
        self._expect(name, obj, info)
        if needs_restore(info):
            message = f"it is archived ({info.storage_class}) and must be restored first: tiercache tier get {obj.key}"
            raise StoreError(message, url=self._at(name, obj.key), archived=True)
        return info

    def _expect(self, name: str, obj: PlannedObject, info: ObjectInfo) -> None:
        if (difference := find_difference(obj, info)) is not None:
            what, expected, found = difference
            message = f"its {what} is not what was planned"
            raise ObjectChanged(message, url=self._at(name, obj.key), expected=expected, found=found)

    def _check_destination(self, request: _CopyRequest) -> None:
        dst, key = request.dst, request.obj.key
        try:
            found = self._stores.head(dst, key).etag
        except NotFound:
            if request.replaced_etag is None:
                return
            found = None
        if found is None or found != request.replaced_etag:
            # The object may be our own, if the answer of the store was lost: the next attempt compares it.
            message = "the destination was changed concurrently: it is not overwritten"
            expected = request.replaced_etag or "nothing"
            raise ObjectChanged(message, url=self._at(dst, key), expected=expected, found=found)

    def _at(self, name: str, key: str) -> str:
        return f"{self._stores.store(name).url}/{key}"

    def _copy_by_server(self, request: _CopyRequest) -> CatalogEntry | None:
        obj, dst = request.obj, request.dst
        info = self.check(request.src, obj)
        source, target = self._s3_classes(request.src), self._s3_classes(dst)
        if request.replaced_etag is not None:
            self._check_destination(request)
        before = source.checksums(obj.key)
        try:
            made = target.copy_from(
                source,
                obj.key,
                obj.key,
                storage_class=self._stores.file.tier(dst).storage_class,
                if_match=info.etag,
                crc32c=obj.crc32c,
                replaces=request.replaces,
            )
        except ObjectChanged:
            if not request.replaces:
                self._check_destination(request)
            raise
        if obj.crc32c is not None and made.crc32c is None:
            # A copy that equals the source does not show that the source is the expected object: only its bytes do.
            is_proven = not needs_restore(made) and self.checksum_of(dst, made) == obj.crc32c
        else:
            is_proven = _is_proven(before, target.checksums(obj.key), obj, made)
        if made.n_bytes != info.n_bytes or not is_proven:
            # This copy is ours, perhaps of a source that rotted: it must not stay, nor be taken for somebody else's
            # object.
            self._remove(dst, made)
            return None
        request.on_bytes(info.n_bytes)
        return CatalogEntry(made.n_bytes, made.etag, obj.crc32c if made.crc32c is None else made.crc32c)

    def _copy_small(self, request: _CopyRequest) -> CatalogEntry:
        """Copy an object of one part by one request for bytes and metadata: requests dominate the cost."""
        src, obj = request.src, request.obj
        try:
            data, info = self._stores.store(src).read_tail(obj.key, max(obj.n_bytes, 1))
        except NotFound:
            raise
        except StoreError:
            self.check(src, obj)  # raises a better error if it knows why the object cannot be read
            raise
        self._expect(src, obj, info)
        request.on_bytes(len(data))
        with self._upload(request.dst, info, request) as upload:
            upload.put_part(0, data)
            return self._complete(request, upload, crc32c(data))

    def _copy_in_parts(self, request: _CopyRequest) -> CatalogEntry:
        info = self.check(request.src, request.obj)
        with self._upload(request.dst, info, request) as upload:
            is_ordered = self._stores.s3_classes(request.dst) is None
            parts = self._parts(request.src, info, request.on_bytes, None if is_ordered else upload)
            crc = 0
            with closing(parts):  # no part is in flight afterwards
                for number, part in enumerate(parts):
                    crc = combine(crc, part.crc32c, part.n_bytes)
                    if part.buffer is not None:
                        upload.put_part(number, part.buffer)
                        self._buffers.give(part.buffer)
            return self._complete(request, upload, crc)

    def _complete(self, request: _CopyRequest, upload: Upload, crc: int) -> CatalogEntry:
        dst, obj = request.dst, request.obj
        if obj.crc32c is not None and crc != obj.crc32c:
            # Before complete(), so that the object at the destination stays.
            raise _wrong(self._at(request.src, obj.key), obj.crc32c, crc, "the source")
        self._check_cancelled(dst, obj.key)
        if request.replaced_etag is not None:  # reading the source took minutes, in which somebody may have written
            self._check_destination(request)
        made = upload.complete(if_absent=not request.replaces)
        if made is None:
            self._check_destination(request)
            raise ObjectChanged("the destination was changed concurrently: run again", url=self._at(dst, obj.key))
        crash_point("tier_transfer.published")
        if getattr(upload, "is_confirmed", False) and made.etag is not None and made.n_bytes == obj.n_bytes:
            return CatalogEntry(obj.n_bytes, made.etag, crc)
        return self._verify(dst, obj.n_bytes, crc, made)

    @contextmanager
    def _upload(self, dst: str, info: ObjectInfo, request: _CopyRequest) -> Iterator[Upload]:
        s3_classes, store = self._stores.s3_classes(dst), self._stores.store(dst)
        if s3_classes is not None:
            storage_class = self._stores.file.tier(dst).storage_class
            with s3_classes.create(info.key, storage_class=storage_class, if_match=request.replaced_etag) as upload:
                yield upload
            return
        if isinstance(store, CloudStore) and info.n_bytes > MOST_PARTS * PART_BYTES:
            message = f"{info.n_bytes} bytes are more than this client writes in parts of 8 MiB"
            hint = f": {install_command('archive')}" if store.cloud == "s3" else ""
            raise StoreError(message + hint, url=f"{store.url}/{info.key}")
        if isinstance(store, LocalFolder):
            with store.create(info.key, attributes=self._kept_attributes(request, info)) as upload:
                yield upload
            return
        with store.create(info.key) as upload:
            yield upload

    def _kept_attributes(self, request: _CopyRequest, info: ObjectInfo) -> Sequence[FileAttributes] | None:
        store = self._stores.store(request.src)
        if isinstance(store, LocalFolder):
            return store.attributes(info.key)
        written_s = info.modified_s if request.written_s is None else request.written_s
        if written_s is None:
            return None
        written_ns = int(written_s // 1) * 10**9 + round(written_s % 1 * 1e9)  # a product would lose 100 ns
        return [FileAttributes(written_ns, written_ns)] * len(info.key.split("/"))

    def _parts(
        self, name: str, info: ObjectInfo, on_bytes: Callable[[int], object], upload: Upload | None = None
    ) -> Generator[_CopiedPart, None, None]:
        """Yield the parts of an object, in order and read ahead: of 8 MiB, or longer where S3 allows no more parts.

        If upload is given, the threads that read the parts also write them, and no part has a buffer.
        """
        n_bytes = info.n_bytes
        step = max(PART_BYTES, -(-n_bytes // MOST_PARTS))
        starts = range(0, n_bytes, step) or range(1)

        def part(number: int) -> _CopiedPart:
            span = ByteRange(starts[number], min(starts[number] + step, n_bytes))
            buffer = self._buffers.take(span.n_bytes)
            self._read(name, info, span, buffer)
            crc = crc32c(buffer)
            if upload is not None:
                upload.put_part(number, buffer)
                self._buffers.give(buffer)
            on_bytes(span.n_bytes)
            return _CopiedPart(crc, span.n_bytes, buffer if upload is None else None)

        if len(starts) == 1:
            yield part(0)
            return
        running: deque[Future[_CopiedPart]] = deque()
        try:
            for number in range(len(starts)):
                running.append(self._pool.submit(part, number))
                if len(running) > (_AHEAD if upload is None else _TOGETHER):
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:  # the parts in flight use the upload
            for future in running:
                future.cancel()
            for future in running:
                if not future.cancelled() and future.exception() is None:
                    self._buffers.give(future.result().buffer)

    def _read(self, name: str, info: ObjectInfo, span: ByteRange, buffer: memoryview) -> None:
        self._check_cancelled(name, info.key)
        if span.n_bytes:
            store = self._stores.store(name)
            try:
                store.read_into(info.key, [(span, buffer)], if_match=info.etag, cancel=self._cancel)
            except StoreError as error:
                if self._cancel.is_set():
                    raise _cancelled(error.url) from error
                raise

    def _verify(self, dst: str, n_bytes: int, crc: int, made: ObjectInfo) -> CatalogEntry:
        store, info, found = self._stores.store(dst), made, None
        if n_bytes <= _SMALL_BYTES and self._stores.s3_classes(dst) is None:
            data, info = store.read_tail(made.key, n_bytes + 1)
            found = crc32c(data)
        elif isinstance(store, LocalFolder):
            found = crc  # the folder has just checked the file
        else:
            info = self._stores.head(dst, made.key)
        where = self._at(dst, made.key)
        if made.etag is not None and info.etag != made.etag:
            message = "somebody else has written it since it was copied"
            raise ObjectChanged(message, url=where, expected=made.etag, found=info.etag)
        if info.n_bytes != n_bytes:
            self._remove(dst, info)
            raise _wrong(where, f"{n_bytes} bytes", f"{info.n_bytes} bytes", "the copy")
        if crc in (info.crc32c, found):
            return CatalogEntry(n_bytes, info.etag, crc)
        if needs_restore(info):
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
        return CatalogEntry(n_bytes, info.etag, crc)

    def checksum_on_disk(self, name: str, info: ObjectInfo) -> int:
        """Return the CRC-32C of a file as its disk has it, past the page cache. Raises as copy()."""
        if isinstance(store := self._stores.store(name), LocalFolder):
            store.forget_cached(info.key)
        return self.checksum_of(name, info)

    def checksum_of(self, name: str, info: ObjectInfo, on_bytes: Callable[[int], object] = _nothing) -> int:
        """Read all bytes of an object, and return their CRC-32C. on_bytes, errors: As copy()."""
        crc = 0
        with closing(self._parts(name, info, on_bytes)) as parts:
            for part in parts:
                crc = combine(crc, part.crc32c, part.n_bytes)
                self._buffers.give(part.buffer)
        return crc

    def change_class(self, dst: str, obj: PlannedObject) -> CatalogEntry:
        """Give an object, in place, the storage class of a tier with the same URL. Raises as copy().

        No data is read unless checksums leave doubt. .wrong: The object is not the expected one afterwards.
        """
        s3_classes = self._s3_classes(dst)
        info = self.check(dst, obj)
        wanted = self._stores.class_of(dst)
        before = s3_classes.checksums(obj.key)
        made = info if info.storage_class == wanted else s3_classes.set_class(obj.key, wanted, if_match=info.etag)
        where = self._at(dst, obj.key)
        if made.n_bytes != info.n_bytes or made.storage_class != wanted:
            found = f"{made.n_bytes} bytes, {made.storage_class}"
            raise _wrong(where, f"{info.n_bytes} bytes, {wanted}", found, "the object")
        if _is_proven(before, s3_classes.checksums(obj.key), obj, made):
            return CatalogEntry(made.n_bytes, made.etag, obj.crc32c if made.crc32c is None else made.crc32c)
        # The checksums are not conclusive: a readable object is read; of an archived one only size and class are known.
        crc = None if needs_restore(made) else self.checksum_of(dst, made)
        if None not in (crc, obj.crc32c) and crc != obj.crc32c:
            raise _wrong(where, obj.crc32c, crc, "the object")
        return CatalogEntry(made.n_bytes, made.etag, crc)

    def delete_objects(self, name: str, objects: Sequence[PlannedObject]) -> None:
        """Delete objects of a tier, 1,000 per request where the store can. A missing object is not an error.

        The order is not defined. Only S3 and local folders check that an object still has its ETag; a local folder
        checks directly before it unlinks each file. Raises StoreError; .failed names the objects that were not deleted.
        """
        s3_classes, store = self._stores.s3_classes(name), self._stores.store(name)
        if s3_classes is None:
            if not isinstance(store, LocalFolder):
                store.delete([obj.key for obj in objects])
                return
            left = {obj.key: reason for obj in objects if (reason := _delete_file(store, obj))}
            if left:
                key, reason = next(iter(left.items()))
                message = f"{len(left)} files were not deleted, the first because {reason}"
                raise StoreError(message, url=self._at(name, key), failed=tuple(left))
            return
        if objects:
            self._check_cancelled(name, objects[0].key)
        if failed := s3_classes.delete_many([obj.key for obj in objects], if_match=[obj.etag for obj in objects]):
            (key, reason), n_failed = failed[0], len(failed)
            message = f"{n_failed} objects could not be deleted, the first because of {reason}"
            raise StoreError(message, url=self._at(name, key), failed=tuple(key for key, _ in failed))

    def _s3_classes(self, name: str) -> S3StorageClasses:
        s3_classes = self._stores.s3_classes(name)
        if s3_classes is None:
            raise ValueError(f"tiers.{name}: its store has no storage classes to change")
        return s3_classes

    def _remove(self, name: str, info: ObjectInfo) -> None:
        with suppress(NotFound):
            if self._stores.head(name, info.key).etag == info.etag:
                self._stores.store(name).delete([info.key])

    def _check_cancelled(self, name: str, key: str) -> None:
        if self._cancel.is_set():
            raise _cancelled(self._at(name, key))


def _delete_file(folder: LocalFolder, obj: PlannedObject) -> str:
    try:
        if obj.etag is None:
            folder.delete([obj.key])
        elif not folder.delete_unchanged(obj.key, obj.etag):
            return "it was changed since it was looked at"
    except StoreError as error:
        return str(error)
    return ""


def find_difference(obj: PlannedObject, info: ObjectInfo) -> tuple[str, object, object] | None:
    pairs: list[tuple[str, object, object]] = [("size", obj.n_bytes, info.n_bytes)]
    if obj.etag is not None and info.etag is not None:
        pairs.append(("ETag", obj.etag, info.etag))
    elif obj.modified_s is not None and info.modified_s is not None:
        # A listing and a HEAD may give the date with different fractions of a second.
        pairs.append(("date", int(obj.modified_s), int(info.modified_s)))
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def is_md5(etag: str) -> bool:
    """Return whether an ETag is an MD5 of all bytes. The ETag of a multipart upload depends on its part sizes."""
    return _MD5.fullmatch(etag) is not None


def _is_proven(before: Mapping[str, str], after: Mapping[str, str], obj: PlannedObject, made: ObjectInfo) -> bool:
    """Return whether the store's checksums prove that a server-side copy is equal: all common ones must be equal."""
    if None not in (obj.crc32c, made.crc32c):
        return obj.crc32c == made.crc32c
    names = [name for name in before.keys() & after.keys() if name != "ETag"]
    if names:
        return all(before[name] == after[name] for name in names)
    return is_md5(before.get("ETag", "")) and before["ETag"].strip('"') == after.get("ETag", "").strip('"')


def _wrong(where: str, expected: object, found: object, what: str) -> StoreError:
    message = f"{what} is not what it should be: expected {_shown(expected)}, found {_shown(found)}"
    if what == "the copy":
        message += "; it was removed"
    return StoreError(message, url=where, wrong=True, expected=expected, found=found)


def _shown(value: object) -> str:
    return f"CRC-32C {value:08x}" if isinstance(value, int) else str(value)


def _cancelled(where: str) -> StoreError:
    return StoreError("cancelled", url=where, retryable=True, cancelled=True)
