"""Files of checkpoints written to a store, checked there, and committed by their manifest; threads that do so.

A CheckpointWriter writes to one store: to the local folder from host memory, or to the remote store from the local
files or from host memory. A file is one upload of the Store interface, so it appears complete and, in a folder,
durable. The manifest is put last and only if every file has been checked at the store.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Condition, ExceptHookArgs, Lock, Thread, current_thread
from typing import TypeVar

from tiercache._native.checksum import crc32c
from tiercache.checkpoint.format import (
    METRICS_NAME,
    PAGE_BYTES,
    STATE_NAME,
    Manifest,
    StoredFile,
    TensorEntry,
    encode_manifest,
    encode_metrics,
    manifest_key,
    metrics_key,
    parse_name,
)
from tiercache.checkpoint.staging import StagedFile
from tiercache.crash_points import crash_point
from tiercache.errors import CommitConflict, CorruptCheckpoint, NotFound, StoreError
from tiercache.keep import PIN_NAME
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
        url: URL of the file from which they come; "" if they are in host memory.
    """

    path: str
    n_bytes: int
    parts: Callable[[], Iterator[memoryview]]
    crc32c: int | None = None
    url: str = ""


class CheckpointWriter:
    """Writes checkpoints to one store. Thread-safe."""

    def __init__(self, store: Store, n_streams: int, *, keeps_metrics: bool = True) -> None:
        self.store, self._n_streams, self._keeps_metrics = store, n_streams, keeps_metrics
        self._classes: S3StorageClasses | None = None
        if isinstance(store, CloudStore) and store.cloud == "s3" and has_boto3():
            # boto3 sends a checksum with every part, which the server compares, and asks for that of the whole object.
            with suppress(ValueError):  # an option that only obstore has
                self._classes = S3StorageClasses(store)

    def close(self) -> None:
        if self._classes is not None:
            self._classes.close()
        self.store.close()

    def write_staged(
        self, name: str, files: Sequence[StagedFile], state_text: bytes, metrics: Mapping[str, float]
    ) -> tuple[list[StoredFile], dict[str, TensorEntry]]:
        """Write the files of a staged state and check them. Return the files, and the tensors by their names."""
        crash_point("checkpoint_write.begun")

        def write(number: int, file: StagedFile) -> tuple[StoredFile, dict[str, TensorEntry]]:
            path = f"tensors-{number:05d}-of-{len(files):05d}.safetensors"
            stored = self.write(name, SourceFile(path, file.layout.n_bytes, partial(self._parts_of, file.pieces)))
            return stored, {
                one.name: TensorEntry(path, file.layout.offsets[one.name], one.n_bytes, one.dtype, one.shape)
                for one in file.specs.values()
            }

        written = in_parallel([partial(write, *one) for one in enumerate(files, start=1)], self._n_streams)
        texts = {STATE_NAME: state_text}
        if metrics:
            texts[METRICS_NAME] = encode_metrics(metrics)
        stored = [*(one for one, _ in written), *self.write_texts(name, texts)]
        tensors = {name: entry for _, entries in written for name, entry in entries.items()}
        crash_point("checkpoint_write.files_written")
        return stored, tensors

    def write_texts(self, name: str, texts: Mapping[str, bytes]) -> list[StoredFile]:
        files = [SourceFile(path, len(text), partial(iter, [memoryview(text)])) for path, text in texts.items()]
        return [self.write(name, file) for file in files]

    def upload(self, manifest: Manifest, local: Store) -> None:
        """Write the files of a local checkpoint, and check them. Raises CorruptCheckpoint if a local one changed."""
        crash_point("checkpoint_upload.begun")

        def upload(file: StoredFile) -> None:
            key = f"{manifest.name}/{file.path}"
            parts = partial(_parts_of_file, local, key, file.n_bytes)
            self.write(manifest.name, SourceFile(file.path, file.n_bytes, parts, file.crc32c, f"{local.url}/{key}"))

        in_parallel([partial(upload, file) for file in manifest.files], self._n_streams)
        crash_point("checkpoint_upload.files_written")

    def upload_checkpoint(self, manifest: Manifest, local: Store) -> None:
        """Upload and commit a local checkpoint. After an error, the files stay: a later upload writes them again.

        Raises:
            NotFound: The local checkpoint was deleted meanwhile, and must not come back.
        """
        self.upload(manifest, local)
        pin_key = f"{manifest.name}/{PIN_NAME}"
        with suppress(NotFound):  # pinned since it was saved
            self.store.put(pin_key, local.get(pin_key))
        local.head(manifest_key(manifest.name))
        self.commit(manifest)

    def commit(self, manifest: Manifest) -> None:
        """Put the manifest: from now on the checkpoint exists.

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
        """Delete the files of a save of this process whose manifest was never put; gc() does if this fails."""
        with suppress(StoreError):
            self.store.delete([*(info.key for info in self.store.list(f"{name}/")), metrics_key(name)])
            crash_point("checkpoint_discard.deleted")
            if isinstance(self.store, LocalFolder):
                self.store.remove_empty(name)

    def abort_uploads(self, age_s: float) -> None:
        """Abort the uploads of checkpoints that began so long ago that their process must have been killed.

        Only S3 through boto3 lists them; elsewhere their parts stay until a rule of the store removes them.
        """
        if self._classes is None:
            return
        until_s = time.time() - age_s
        for upload in [*self._classes.unfinished_uploads()]:
            if upload.started_s <= until_s and parse_name(upload.key.split("/")[0]):
                self._classes.abort(upload.key, upload.upload_id)

    def write(self, name: str, source: SourceFile) -> StoredFile:
        """Write a file of a checkpoint and check it at the store. Errors as for write_staged()."""
        key, crc = f"{name}/{source.path}", 0
        upload: Upload
        with (self._classes or self.store).create(key) as upload:
            for number, part in enumerate(source.parts()):
                crc = crc32c(part, crc)
                upload.put_part(number, part)
                crash_point("checkpoint_write.part")
            if source.crc32c not in (None, crc):
                message = f"the local file has CRC-32C {crc:08x}, {source.crc32c:08x} was written: it was not uploaded"
                raise CorruptCheckpoint(message, url=source.url)
            upload.complete()
            crash_point("checkpoint_write.published")
        # A file that was written to a folder has been synced. Reading it back from the disk would take as long again;
        # the upload from it, and verify(), compare its checksum.
        is_confirmed = isinstance(self.store, LocalFolder) or getattr(upload, "is_confirmed", False)
        self._check(key, source.n_bytes, crc, is_confirmed=is_confirmed)
        crash_point("checkpoint_write.checked")
        return StoredFile(source.path, source.n_bytes, crc)

    def _parts_of(self, pieces: Sequence[memoryview]) -> Iterator[memoryview]:
        step = part_bytes(sum(piece.nbytes for piece in pieces))
        if not isinstance(self.store, LocalFolder):
            yield from equal_parts(pieces, step)
            return
        for piece in pieces:  # as they lie, at pages: a copy could not be written with direct I/O
            yield from (piece[start : start + step] for start in range(0, piece.nbytes, step))

    def _check(self, key: str, n_bytes: int, crc: int, *, is_confirmed: bool) -> None:
        """Check size and checksum of an object at the store.

        is_confirmed: Whether the bytes need not be read: the server has returned a matching checksum of every part, or
            this process has checked them before.

        The store's own checksum is used if there is one; otherwise the bytes are read.

        Raises:
            NotFound: The store does not have the object.
            StoreError: They differ; "wrong" is in the details.
        """
        info = (self._classes or self.store).head(key)
        expected, found = f"{n_bytes} bytes", f"{info.n_bytes} bytes"
        if info.n_bytes == n_bytes:
            if info.crc32c == crc or (info.crc32c is None and is_confirmed):
                return
            # A checksum that differs does not prove a wrong object: some servers compute it of something else.
            read = 0
            for part in _parts_of_file(self.store, key, n_bytes):
                read = crc32c(part, read)
            if read == crc:
                return
            expected, found = f"CRC-32C {crc:08x}", f"CRC-32C {read:08x}"
        message = f"the store has {found}, {expected} was written"
        raise StoreError(message, url=f"{self.store.url}/{key}", wrong=True, expected=expected, found=found)


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
