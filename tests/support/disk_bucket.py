"""A bucket on the disk that behaves as S3 does: classes, restores, ETags of contents; and goes wrong as scripted.

An object is one file, a line of JSON and then its bytes, so that nothing of it can come apart when a process dies.
"""

import fcntl
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote, unquote

from tiercache._native.checksum import crc32c
from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ObjectInfo
from tiercache.stats import Counters
from tiercache.store.archive import crc32c_to_text
from tiercache.store.contract import Span, Store, Upload, check_key, check_spans

UNREADABLE = ("GLACIER", "DEEP_ARCHIVE")
DAY_S = 86_400.0
RESTORE_S = 5 * 3600.0
DEFAULT_RESTORE_DAYS = 10


class Died(BaseException):
    """The process is dead: whoever catches this and goes on does nothing to any store any more."""


@dataclass
class Script:
    """What goes wrong, in all buckets of a world.

    faults: [verb, calls until then, what], what: "error" (nothing was done), "lost" (it was done, and the answer lost),
    "flip" (a bit of what is read or written turns on the way). struck: of them; dead: every call raises Died. on_call:
    hears every call before it is made.
    """

    faults: list[list] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    dead: bool = False
    on_call: Callable[[str, str], object] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __reduce__(self):
        return Script, ()  # elsewhere nothing is scripted

    def due(self, verb: str, key: str) -> str:
        """What befalls this call; "": nothing."""
        if self.dead:
            raise Died
        if self.on_call is not None:
            self.on_call(verb, key)
        with self.lock:
            for fault in self.faults:
                if fault[0] == verb:
                    fault[1] -= 1
                    if fault[1] == 0:
                        self.faults.remove(fault)
                        self.struck.append(f"{fault[2]} of {verb}")
                        return fault[2]
        return ""


def read_object(path: Path) -> tuple[dict, bytes]:
    head, _, data = path.read_bytes().partition(b"\n")
    return json.loads(head), data


def write_object(path: Path, about: dict, data: bytes) -> None:
    """Atomic; not synced: no machine dies here."""
    other = path.with_name(f".{uuid.uuid4().hex}")
    other.write_bytes(json.dumps(about).encode() + b"\n" + data)
    other.replace(path)


def file_name(key: str) -> str:
    return quote(key, safe="")


def key_of(file: str) -> str:
    return unquote(file)


def about_now(data: bytes, storage_class: str) -> dict:
    """What is said of an object that is written now: its sums are of these bytes, whatever becomes of them."""
    etag, crc = hashlib.md5(data).hexdigest(), crc32c(data)
    return {"class": storage_class, "modified_s": time.time(), "restore": None, "etag": etag, "crc32c": crc}


def is_readable(about: dict) -> bool:
    restore = about["restore"]
    is_restored = restore is not None and restore["ready_s"] <= time.time() < restore["until_s"]
    return about["class"] not in UNREADABLE or is_restored


class DiskBucket(Store):
    """Objects below a prefix of the folder `root`; any number of them, in any number of processes. An ArchiveStore too.

    says_sums: head() gives the CRC-32C, of what was written.
    """

    min_part_bytes = 1

    def __init__(self, root: Path, url: str, script: Script, prefix: str = "", *, says_sums: bool = False) -> None:
        self.root, self.url, self.script = root, url, script
        self.prefix, self.says_sums = prefix, says_sums
        self.counters = Counters("requests", "bytes_read", "bytes_written")
        root.mkdir(parents=True, exist_ok=True)

    def __reduce__(self):
        return DiskBucket, (self.root, self.url, self.script, self.prefix)

    def _path(self, key: str) -> Path:
        return self.root / file_name(self.prefix + check_key(key))

    def _at(self, key: str) -> str:
        return f"{self.url}/{key}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def _call(self, verb: str, key: str) -> Iterator[str]:
        self.counters.add("requests")
        due = self.script.due(verb, key)
        if due == "error":
            raise StoreError(f"scripted fault in {verb}", url=self._at(key), retryable=True, status=503)
        yield due
        if due == "lost":
            maybe = {"maybe_done": True} if verb == "put_if_absent" else {}
            raise StoreError(f"scripted lost answer in {verb}", url=self._at(key), retryable=True, status=503, **maybe)

    def _found(self, key: str) -> tuple[dict, bytes]:
        try:
            return read_object(self._path(key))
        except FileNotFoundError as error:
            raise NotFound("no such object", url=self._at(key)) from error

    def _read(self, key: str, due: str) -> tuple[dict, bytes]:
        about, data = self._found(key)
        if not is_readable(about):
            text = f"InvalidObjectState: the object is in {about['class']} and must be restored first"
            raise StoreError(text, url=self._at(key), status=403, code="InvalidObjectState", archived=True)
        return about, flipped(data) if due == "flip" else data

    def _info(self, key: str, about: dict, data: bytes) -> ObjectInfo:
        return ObjectInfo(
            key,
            len(data),
            etag=f'"{about["etag"]}"',
            crc32c=about["crc32c"] if self.says_sums else None,
            modified_s=about["modified_s"],
            storage_class=about["class"] or "STANDARD",
            restore=restore_header(about),
        )

    # -- a Store ----------------------------------------------------------------------------------------------------

    def head(self, key: str) -> ObjectInfo:
        with self._call("head", key):
            return self._info(key, *self._found(key))

    def get(self, key: str) -> bytes:
        with self._call("get", key) as due:
            data = self._read(key, due)[1]
            self.counters.add("bytes_read", len(data))
            return data

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        with self._call("read_tail", key) as due:
            about, data = self._read(key, due)
            tail = data[max(len(data) - n_bytes, 0) :]
            self.counters.add("bytes_read", len(tail))
            return tail, self._info(key, about, data)

    def read_into(self, key: str, spans: Sequence[Span], *, if_match=None, cancel=None) -> None:
        check_spans(spans)
        with self._call("read_into", key) as due:
            about, data = self._read(key, due)
            self._check_match(key, about, if_match)
            if cancel is not None and cancel.is_set():
                raise StoreError("read_into: cancelled", url=self._at(key), retryable=True)
            for span, buffer in spans:
                if span.end > len(data):
                    raise StoreError(f"a range ends at {span.end}, the object at {len(data)}", url=self._at(key))
                buffer[:] = data[span.start : span.end]
                self.counters.add("bytes_read", span.n_bytes)

    def put(self, key: str, data) -> ObjectInfo:
        with self._call("put", key) as due:
            return self._keep(key, bytes(data), "", due)

    def put_if_absent(self, key: str, data) -> bool:
        with self._call("put_if_absent", key) as due:
            return self._keep_absent(key, bytes(data), "", due) is not None

    def _keep(self, key: str, data: bytes, storage_class: str, due: str = "") -> ObjectInfo:
        with self._locked():
            return self._write(key, data, storage_class, due)

    def _keep_absent(self, key: str, data: bytes, storage_class: str, due: str = "") -> ObjectInfo | None:
        with self._locked():
            return None if self._path(key).exists() else self._write(key, data, storage_class, due)

    def _write(self, key: str, data: bytes, storage_class: str, due: str) -> ObjectInfo:
        data = flipped(data) if due == "flip" else data
        about = about_now(data, storage_class)
        write_object(self._path(key), about, data)
        self.counters.add("bytes_written", len(data))
        return self._info(key, about, data)

    def create(self, key: str, *, storage_class: str | None = None, if_absent: bool = False, if_match=None) -> Upload:
        del if_absent, if_match
        with self._call("create", key):
            return _BucketUpload(self, check_key(key), storage_class or "")

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._call("delete", key), self._locked():
                self._path(key).unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = self.prefix + (prefix.removesuffix("/") + "/" if prefix else "")
        with self._call("list", prefix):
            keys = sorted(key_of(path.name) for path in self.root.iterdir() if not path.name.startswith("."))
        for whole in keys:
            if whole.startswith(start):
                key = whole[len(self.prefix) :]
                try:
                    yield self._info(key, *self._found(key))
                except NotFound:  # deleted since
                    continue

    # -- an ArchiveStore --------------------------------------------------------------------------------------------

    def _change(self, key: str, **changes) -> None:
        about, data = self._found(key)
        write_object(self._path(key), about | changes, data)

    def checksums(self, key: str) -> Mapping[str, str]:
        with self._call("head", key):
            about, _ = self._found(key)
            sums = {"ChecksumCRC32C": crc32c_to_text(about["crc32c"])} if self.says_sums else {}
            return {**sums, "ETag": f'"{about["etag"]}"'}

    def set_class(self, key: str, storage_class: str, *, if_match: str | None = None) -> ObjectInfo:
        with self._call("set_class", key), self._locked():
            about, data = self._read(key, "")
            self._check_match(key, about, if_match)
            kept = {"etag": about["etag"], "crc32c": about["crc32c"]}
            self._change(key, **about_now(data, storage_class) | kept)
            return self._info(key, *self._found(key))

    def can_copy_from(self, src: object) -> bool:
        return isinstance(src, DiskBucket)

    def copy_from(
        self,
        src: "DiskBucket",
        src_key: str,
        key: str,
        *,
        storage_class=None,
        if_match=None,
        crc32c=None,
        replaces=True,
    ) -> ObjectInfo:
        del crc32c
        with self._call("copy_from", key) as due:
            about, data = src._read(src_key, "")
            self._check_match(key, about, if_match)
            made = (self._keep if replaces else self._keep_absent)(key, data, storage_class or "", due)
            if made is None:
                raise ObjectChanged(url=self._at(key), expected="nothing")
            return made

    def _check_match(self, key: str, about: dict, if_match: str | None) -> None:
        if if_match is not None and if_match != f'"{about["etag"]}"':
            raise ObjectChanged(url=self._at(key), expected=if_match, found=about["etag"])

    def restore(self, key: str, *, days: int | None = None, speed: str = "standard") -> str:
        del speed
        with self._call("restore", key), self._locked():
            about, _ = self._found(key)
            if about["class"] not in UNREADABLE:
                return "done"
            now_s, restore = time.time(), about["restore"]
            if restore is not None and now_s < restore["until_s"]:
                return "running" if now_s < restore["ready_s"] else "done"
            ready_s = now_s + RESTORE_S
            until_s = ready_s + (DEFAULT_RESTORE_DAYS if days is None else days) * DAY_S
            self._change(key, restore={"ready_s": ready_s, "until_s": until_s})
            return "started"

    def delete_many(self, keys: Iterable[str], *, if_match=None) -> Sequence[tuple[str, str]]:
        del if_match  # not every server looks at it
        failed = []
        for key in keys:
            try:
                with self._call("delete", key), self._locked():
                    self._path(key).unlink(missing_ok=True)
            except StoreError as error:
                failed.append((key, str(error)))
        return failed


class _BucketUpload(Upload):
    """Parts in memory; None when it is over."""

    def __init__(self, bucket: DiskBucket, key: str, storage_class: str) -> None:
        self._bucket, self._key, self._class = bucket, key, storage_class
        self._parts: dict[int, bytes] | None = {}

    def put_part(self, number: int, data) -> None:
        with self._bucket._call("put_part", self._key) as due:
            if number < 0 or self._parts is None:
                raise ValueError(f"{self._key}: part {number}: parts count from 0 and come before the end")
            self._parts[number] = flipped(bytes(data)) if due == "flip" else bytes(data)

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        with self._bucket._call("complete", self._key):
            parts, self._parts = self._parts, None
            if parts is None:
                raise ValueError(f"{self._key}: the upload was completed or aborted before")
            missing = [number for number in range(len(parts)) if number not in parts]
            if missing:
                raise ValueError(f"{self._key}: part {missing[0]} is missing")
            data = b"".join(parts[number] for number in range(len(parts)))
            keep = self._bucket._keep_absent if if_absent else self._bucket._keep
            return keep(self._key, data, self._class)

    def abort(self) -> None:
        self._parts = None


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1]) if data else data


def restore_header(about: dict) -> str | None:
    restore, now_s = about["restore"], time.time()
    if restore is None or now_s >= restore["until_s"]:
        return None
    if now_s < restore["ready_s"]:
        return 'ongoing-request="true"'
    return f'ongoing-request="false", expiry-date="{formatdate(restore["until_s"], usegmt=True)}"'
