"""Files of checkpoints written to a store, checked there, and committed by their manifest; threads that do so.

A CheckpointWriter writes to one store: to the local folder from host memory, or to the remote store from the local
files or from host memory. A file is one upload of the Store interface, so it appears complete and, in a folder,
durable. The manifest is put last and only if every file has been checked at the store.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Condition, ExceptHookArgs, Lock, Thread, current_thread
from typing import TypeVar

from tiercache._native.checksum import crc32c
from tiercache.checkpoint.layout import (
    METRICS_NAME,
    SHARED_FOLDER,
    STATE_NAME,
    Manifest,
    StoredFile,
    TensorEntry,
    encode_manifest,
    encode_metrics,
    key_of,
    manifest_key,
    metrics_key,
    parse_name,
    reference_key,
    shared_digest,
    shared_path,
    tensor_digest,
)
from tiercache.checkpoint.safetensors_file import PAGE_BYTES
from tiercache.checkpoint.staging import SHARED_NAME, StagedFile
from tiercache.crash_points import crash_point
from tiercache.errors import CommitConflict, CorruptCheckpoint, NotFound, StoreError
from tiercache.model import ByteRange
from tiercache.store import CloudStore, LocalFolder, Store, Upload
from tiercache.store.archive import MOST_PARTS, S3StorageClasses, has_boto3

T = TypeVar("T")

# Part of an upload, of whole pages: direct writes need them.
PART_BYTES = 8 << 20
# A put whose answer was lost is repeated if the store does not have the manifest.
_COMMIT_ATTEMPTS = 3


def may_be_committed(error: BaseException) -> bool:
    """Return whether the checkpoint of a failed save may exist: the answer to the put of its manifest was lost."""
    return isinstance(error, CommitConflict) or bool(getattr(error, "maybe_done", False))


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that is to be written.

    Attributes:
        path: Path in the checkpoint, as in a manifest.
        n_bytes: Size.
        parts: Function that returns the bytes in parts; a part is used only until the next one is requested.
        crc32c: Checksum that the bytes must have; None if they are in host memory.
    """

    path: str
    n_bytes: int
    parts: Callable[[], Iterator[memoryview]]
    crc32c: int | None = None


class SharedTensors:
    """The shared tensors of one store that checkpoints of this process use, so that none is deleted under them.

    Thread-safe.

    A save claims a tensor before it looks whether the store has it. A deletion holds the lock from the check of the
    claims until the tensor is deleted. So the save either finds the tensor and keeps it, or writes it again.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._keys: dict[str, set[str]] = {}

    def claim(self, name: str, key: str) -> bool:
        """Note that a checkpoint uses a tensor. The claim holds until release().

        Returns:
            Whether another checkpoint of this process uses it.
        """
        with self._lock:
            self._keys.setdefault(name, set()).add(key)
            return any(key in keys for other, keys in self._keys.items() if other != name)

    def release(self, name: str) -> None:
        """Forget the claims of a checkpoint that does not exist, or no longer."""
        with self._lock:
            self._keys.pop(name, None)

    def delete_unclaimed(self, keys: Iterable[str], delete: Callable[[list[str]], object]) -> list[str]:
        """Call delete() with those keys that no checkpoint of this process uses, and return them."""
        with self._lock:
            claimed = set().union(*self._keys.values())
            found = [key for key in keys if key not in claimed]
            if found:
                delete(found)
            return found


class CheckpointWriter:
    """Writes checkpoints to one store. Thread-safe.

    Args:
        store: Store of the checkpoints.
        n_streams: Number of files that are written in parallel.
        shared: Claims of shared tensors in this store.
        find_referenced: Function that returns the keys of the shared tensors of visible checkpoints. A tensor that is
            in the store, and is neither among them nor claimed, is written again: another process may be deleting it
            (retention.py). None: every tensor in the store is used.
        keeps_metrics: Whether the metrics are put beside the checkpoints too, where they stay if these are moved.
    """

    def __init__(
        self,
        store: Store,
        n_streams: int,
        shared: SharedTensors,
        find_referenced: Callable[[], Container[str]] | None = None,
        *,
        keeps_metrics: bool = True,
    ) -> None:
        self.store, self._n_streams, self.shared = store, n_streams, shared
        self._find_referenced, self._keeps_metrics = find_referenced, keeps_metrics
        # Keys by the name of the save for which they were found: of a save, and of a repeated upload.
        self._referenced: dict[str, Container[str]] = {}
        self._classes: S3StorageClasses | None = None
        if isinstance(store, CloudStore) and store.cloud == "s3" and has_boto3():
            # boto3 sends a checksum with every part, which the server compares, and asks for that of the whole object.
            with suppress(ValueError):  # an option that only obstore has
                self._classes = S3StorageClasses.of(store)
        self._lock = Lock()
        self._checked: dict[str, int] = {}  # checksums of shared tensors that were checked at the store

    def close(self) -> None:
        """Close the connections."""
        if self._classes is not None:
            self._classes.close()
        self.store.close()

    def write_staged(
        self,
        name: str,
        files: Sequence[StagedFile],
        state_text: bytes,
        metrics: Mapping[str, float],
    ) -> tuple[list[StoredFile], dict[str, TensorEntry]]:
        """Write the files of a staged state and check them. Return the files, and the tensors by their names.

        Args:
            name: Name of the checkpoint.
            files: Staged files, whose memory must stay until the call returns.
            state_text: Text of the state without its tensors.
            metrics: Metrics by name; no file without one.

        Raises:
            StoreError: The store failed; the files that were written are not deleted.
        """
        crash_point("checkpoint_write.begun")
        numbered = [file for file in files if not file.is_shared]
        paths = {
            id(file): f"tensors-{number:05d}-of-{len(numbered):05d}.safetensors"
            for number, file in enumerate(numbered, start=1)
        }

        def write(file: StagedFile) -> tuple[StoredFile, dict[str, TensorEntry]]:
            digest = _digest_of(file) if file.is_shared else None
            path = paths[id(file)] if digest is None else shared_path(digest)
            source = SourceFile(path, file.layout.n_bytes, partial(self._parts_of, file.pieces))
            stored = self.write(name, source) if digest is None else self.share(name, source)
            return stored, {
                state_name: TensorEntry(
                    path,
                    file.layout.offsets[file_name],
                    file.specs[file_name].n_bytes,
                    file.specs[file_name].dtype,
                    file.specs[file_name].shape,
                    digest,
                )
                for file_name, state_name in file.names.items()
            }

        written = in_parallel([partial(write, file) for file in files], self._n_streams)
        texts = [(STATE_NAME, state_text)]
        if metrics:
            texts.append((METRICS_NAME, encode_metrics(metrics)))
        small = [SourceFile(path, len(text), partial(iter, [memoryview(text)])) for path, text in texts]
        stored = {one.path: one for one, _ in written} | {one.path: self.write(name, one) for one in small}
        tensors = {name: entry for _, entries in written for name, entry in entries.items()}
        crash_point("checkpoint_write.files_written")
        return list(stored.values()), tensors

    def upload(self, manifest: Manifest, local: Store) -> None:
        """Write the files of a checkpoint that is committed in a local folder, and check them.

        Raises:
            CorruptCheckpoint: A local file has other bytes than were written.
            StoreError: See write_staged().
        """
        crash_point("checkpoint_upload.begun")
        with self._lock:
            self._referenced.pop(manifest.name, None)  # an earlier attempt may have found them long ago

        def upload(file: StoredFile) -> None:
            key = key_of(manifest.name, file.path)
            parts = partial(_parts_of_file, local, key, file.n_bytes)
            source = SourceFile(file.path, file.n_bytes, parts, file.crc32c)
            try:
                if shared_digest(file.path) is None:
                    self.write(manifest.name, source)
                else:
                    self.share(manifest.name, source)
            except _WrongSource as error:
                message = (
                    f"the local file has CRC-32C {error.found:08x}, {file.crc32c:08x} was written: it was not uploaded"
                )
                raise CorruptCheckpoint(message, url=f"{local.url}/{key}") from None

        in_parallel([partial(upload, file) for file in manifest.files], self._n_streams)
        crash_point("checkpoint_upload.files_written")

    def commit(self, manifest: Manifest) -> None:
        """Put the manifest: from now on the checkpoint exists. Then put the reference to its shared tensors.

        So a folder with a reference and without a manifest is never an unfinished save, but one that another program
        moves. If the reference is not put, the next collection does so.

        Raises:
            CommitConflict: The store has another manifest of this name.
            StoreError: The put failed; the checkpoint may exist if .maybe_done is True.
        """
        text = encode_manifest(manifest)
        crash_point("checkpoint_commit.files_checked")
        if self._keeps_metrics:  # before the manifest: from then on the tier engine may move or archive the checkpoint
            self.store.put(metrics_key(manifest.name), encode_metrics(manifest.metrics))
        self._put_manifest(manifest_key(manifest.name), text)
        crash_point("checkpoint_commit.committed")
        if _has_shared(manifest):
            with suppress(StoreError):
                self.store.put(reference_key(manifest.name), text)

    def commit_late(self, manifest: Manifest) -> None:
        """Commit a checkpoint that is not the newest: the tier engine may move it once it has a manifest.

        Therefore the reference is put first. If a kill leaves it without a manifest, the upload is repeated.

        Raises:
            CommitConflict, StoreError: See commit().
        """
        key = reference_key(manifest.name)
        is_new = _has_shared(manifest) and self.store.put_if_absent(key, encode_manifest(manifest))
        try:
            self.commit(manifest)
        except StoreError as error:
            if is_new and not may_be_committed(error):
                with suppress(StoreError):  # a later upload uses it, or delete() removes it
                    self.store.delete([key])
            raise

    def _put_manifest(self, key: str, text: bytes) -> None:
        for attempt in range(_COMMIT_ATTEMPTS):
            try:
                if self.store.put_if_absent(key, text):
                    return
            except StoreError as error:
                if not error.maybe_done:
                    error.maybe_done = attempt > 0  # an earlier put may have had an effect
                    raise
            try:
                found = self.store.get(key)
            except NotFound:
                continue  # the answer was lost, and the put had no effect
            except StoreError as error:
                error.maybe_done = True
                raise
            if found == text:
                return
            raise CommitConflict("another manifest has been put under this name", url=f"{self.store.url}/{key}")
        raise StoreError("the answers of all puts were lost", url=f"{self.store.url}/{key}", maybe_done=True)

    def discard(self, name: str) -> None:
        """Release the shared tensors and delete the files of a save that was not committed.

        Errors are ignored, because gc() deletes the files too.

        Only for a save of this process whose manifest was never put.
        """
        self.shared.release(name)
        with suppress(StoreError):
            self.store.delete([*(info.key for info in self.store.list(f"{name}/")), metrics_key(name)])
            crash_point("checkpoint_discard.deleted")
            if isinstance(self.store, LocalFolder):
                self.store.remove_empty(name)

    def abort_uploads(self, age_s: float) -> int:
        """Abort the uploads of checkpoints that began so long ago that their process must have been killed.

        Only S3 through boto3 lists them; elsewhere their parts stay until a rule of the store removes them.

        Args:
            age_s: Age of an upload in seconds from which it is aborted.

        Returns:
            Number of aborted uploads.

        Raises:
            StoreError: They cannot be listed.
        """
        if self._classes is None:
            return 0
        until_s = time.time() - age_s
        found = [
            upload
            for upload in self._classes.unfinished_uploads()
            if upload.started_s <= until_s
            and (upload.key.startswith(SHARED_FOLDER) or parse_name(upload.key.split("/")[0]))
        ]
        for upload in found:
            self._classes.abort(upload.key, upload.upload_id)
        return len(found)

    def share(self, name: str, source: SourceFile) -> StoredFile:
        """Write a shared tensor if the store does not have it, or has other bytes. Errors as for write_staged().

        A tensor that this process has neither written nor checked is checked as a new file is, and a local one is read.
        """
        key, crc = key_of(name, source.path), source.crc32c
        is_claimed = self.shared.claim(name, key)
        crash_point("checkpoint_write.claimed")
        if crc is None:
            crc = _crc_of(source.parts())
        with self._lock:
            is_known = self._checked.get(key) == crc
        try:
            # A tensor that this process has checked is not read again, but must still be there.
            self._check(key, source.n_bytes, crc, is_confirmed=is_known)
            is_usable = is_claimed or self._is_referenced(name, key)
        except StoreError as error:
            if not isinstance(error, NotFound) and not error.details.get("wrong"):
                raise
            is_usable = False
        if not is_usable:
            self.write(name, source)
        with self._lock:
            self._checked[key] = crc
        return StoredFile(source.path, source.n_bytes, crc)

    def _is_referenced(self, name: str, key: str) -> bool:
        """Return whether a checkpoint that was visible after the save `name` began refers to a shared tensor."""
        if self._find_referenced is None:
            return True
        with self._lock:
            if name not in self._referenced:
                self._referenced = {**dict([*self._referenced.items()][-1:]), name: self._find_referenced()}
            return key in self._referenced[name]

    def write(self, name: str, source: SourceFile) -> StoredFile:
        """Write a file of a checkpoint and check it at the store. Errors as for write_staged()."""
        key, crc = key_of(name, source.path), 0
        with self._create(key) as upload:
            for number, part in enumerate(source.parts()):
                crc = crc32c(part, crc)
                upload.put_part(number, part)
                crash_point("checkpoint_write.part")
            if source.crc32c not in (None, crc):
                raise _WrongSource(crc)
            upload.complete()
            crash_point("checkpoint_write.published")
        # A file that was written to a folder has been synced. Reading it back from the disk would take as long again;
        # the upload from it, and verify(), compare its checksum.
        is_confirmed = isinstance(self.store, LocalFolder) or getattr(upload, "is_confirmed", False)
        self._check(key, source.n_bytes, crc, is_confirmed=is_confirmed)
        crash_point("checkpoint_write.checked")
        return StoredFile(source.path, source.n_bytes, crc)

    def _parts_of(self, pieces: Sequence[memoryview]) -> Iterator[memoryview]:
        """Yield the parts of a file in host memory."""
        step = part_bytes(sum(piece.nbytes for piece in pieces))
        if not isinstance(self.store, LocalFolder):
            yield from equal_parts(pieces, step)
            return
        for piece in pieces:  # as they lie, at pages: a copy could not be written with direct I/O
            yield from (piece[start : start + step] for start in range(0, piece.nbytes, step))

    def _create(self, key: str) -> Upload:
        return self.store.create(key) if self._classes is None else self._classes.create(key)

    def _check(self, key: str, n_bytes: int, crc: int, *, is_confirmed: bool) -> None:
        """Check size and checksum of an object at the store.

        is_confirmed: Whether the bytes need not be read: the server has returned a matching checksum of every part, or
            this process has checked them before.

        The store's own checksum is used if there is one; otherwise the bytes are read.

        Raises:
            NotFound: The store does not have the object.
            StoreError: They differ; "wrong" is in the details.
        """
        info = self.store.head(key) if self._classes is None else self._classes.head(key)
        if info.n_bytes != n_bytes:
            raise self._wrong(key, f"{n_bytes} bytes", f"{info.n_bytes} bytes")
        if info.crc32c == crc or (info.crc32c is None and is_confirmed):
            return
        # A checksum that differs does not prove a wrong object: some servers compute it of something else.
        # No ETag is required: another rank may write an equal shared tensor again meanwhile.
        found = _crc_of(_parts_of_file(self.store, key, n_bytes))
        if found != crc:
            raise self._wrong(key, f"CRC-32C {crc:08x}", f"CRC-32C {found:08x}")

    def _wrong(self, key: str, expected: str, found: str) -> StoreError:
        message = f"the store has {found}, {expected} was written"
        return StoreError(message, url=f"{self.store.url}/{key}", wrong=True, expected=expected, found=found)


class _WrongSource(Exception):
    """The bytes of a source are not those that were expected. found: their CRC-32C."""

    def __init__(self, found: int) -> None:
        super().__init__()
        self.found = found


def _has_shared(manifest: Manifest) -> bool:
    return any(shared_digest(file.path) for file in manifest.files)


def part_bytes(n_bytes: int) -> int:
    """Return the size of the parts of a file: of whole pages, and as many as S3 allows."""
    return max(PART_BYTES, -(-n_bytes // MOST_PARTS // PAGE_BYTES) * PAGE_BYTES)


def equal_parts(pieces: Iterable[memoryview], step: int) -> Iterator[memoryview]:
    """Yield the bytes of the pieces in parts of one size; a part that two pieces contain is a copy."""
    held = bytearray()
    for piece in pieces:
        start = min(step - len(held), piece.nbytes) if held else 0
        held += piece[:start]
        if len(held) == step:
            yield memoryview(held)
            held = bytearray()
        end = start + (piece.nbytes - start) // step * step
        yield from (piece[position : position + step] for position in range(start, end, step))
        held += piece[end:]
    if held:
        yield memoryview(held)


def _parts_of_file(store: Store, key: str, n_bytes: int) -> Iterator[memoryview]:
    """Yield the parts of an object, in one buffer."""
    step = part_bytes(n_bytes)
    buffer = memoryview(bytearray(min(step, n_bytes)))
    for start in range(0, n_bytes, step):
        part = ByteRange(start, min(start + step, n_bytes))
        store.read_into(key, [(part, buffer[: part.n_bytes])])
        yield buffer[: part.n_bytes]


def _crc_of(parts: Iterable[memoryview]) -> int:
    crc = 0
    for part in parts:
        crc = crc32c(part, crc)
    return crc


def _digest_of(file: StagedFile) -> str:
    """Return the digest of the only tensor of a shared file."""
    (spec,) = file.specs.values()
    return tensor_digest(spec.dtype, spec.shape, _after(file.pieces, file.layout.offsets[SHARED_NAME]))


def _after(pieces: Iterable[memoryview], n_bytes: int) -> Iterator[memoryview]:
    """Yield the pieces without their first n_bytes."""
    for piece in pieces:
        yield piece[min(n_bytes, piece.nbytes) :]
        n_bytes = max(n_bytes - piece.nbytes, 0)


# -- threads ---------------------------------------------------------------------------------------------------------


def in_parallel(calls: Sequence[Callable[[], T]], n_threads: int) -> list[T]:
    """Return the results of calls that are made by several threads, the caller's own included.

    After an error, no further call begins, and the error is raised when the running ones have ended: nothing that they
    read or write is used after the return. If fewer threads can be started, those make all calls. The threads are not
    those of a pool of the library, whose pools start no thread any more while the interpreter ends.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    lock, numbers = Lock(), iter(range(len(calls)))

    def work() -> None:
        while not errors:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                results[number] = calls[number]()
            except BaseException as error:  # noqa: BLE001 -- a thread's top: raised below, as is an interrupt
                errors.append(error)

    threads: list[Thread] = []
    with suppress(RuntimeError):  # the limit of threads
        for _ in range(min(n_threads, len(calls)) - 1):
            thread = Thread(target=work, name="tiercache-checkpoint-file")
            thread.start()
            threads.append(thread)
    try:
        work()
    finally:
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(calls))]


class TaskThread:
    """Runs tasks one after another in a thread that exists only while there are tasks. Thread-safe.

    The interpreter waits for such a thread when it ends, so no task is lost; an idle one would make it wait for ever.

    Args:
        name: Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = Condition()
        self._tasks: list[Callable[[], object]] = []
        self._is_running = False

    def submit(self, task: Callable[[], object]) -> None:
        """Run a task, which handles its own errors, after the earlier ones.

        Raises:
            RuntimeError: No thread can be started: the limit of threads, or the interpreter ends. The task is not run.
        """
        with self._changed:
            if not self._is_running:
                # Under the lock, so that no other thread leaves a task to a thread that cannot be started.
                Thread(target=self._run, name=self._name).start()
                self._is_running = True
            self._tasks.append(task)

    def join(self) -> None:
        """Wait until all tasks are done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_running)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._tasks:
                    self._is_running = False
                    self._changed.notify_all()
                    return
                task = self._tasks.pop(0)
            try:
                task()
            except BaseException:  # noqa: BLE001 -- a thread's top: a defect is reported, and later tasks run
                threading.excepthook(ExceptHookArgs((*sys.exc_info(), current_thread())))
            del task  # it may hold the memory of a state
