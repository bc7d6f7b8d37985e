"""A store's operations in terms of fsspec's file systems, and of S3 through s3fs.

Errors of the file system pass through.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any

from tiercache.model import ObjectInfo
from tiercache.store.parts import parts_in_order

_MARKS = (
    "ETag",
    "etag",
    "md5",
    "md5Hash",
    "checksum",
    "ino",
    "mtime",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "modified",
    "created",
    "Content-MD5",
    "Digest",
    "generation",
    "blob_id",
)
# Prefix of a weak ETag, which a store may give to two states of an object with different bytes.
_WEAK = "W/"
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "created")


class KeyExists(Exception):
    """The key exists."""


class FileSystemAdapter(ABC):
    """A folder of a file system, with the keys of the store. Every method raises the file system's own errors."""

    is_conditional = False
    """Whether read() itself checks if_match."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs, self.root = fs, root.rstrip("/")

    def path(self, key: str) -> str:
        """Return the file system's path of a key."""
        return f"{self.root}/{key}" if self.root else key

    @abstractmethod
    def info(self, key: str) -> ObjectInfo:
        """Return the description of an object."""

    @abstractmethod
    def read(
        self, key: str, start: int | None, end: int | None, if_match: str | None = None
    ) -> tuple[bytes, str | None]:
        """Return bytes of an object, perhaps fewer than requested, and its ETag if the answer has one."""

    @abstractmethod
    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Return the end of an object."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> ObjectInfo:
        """Write an object."""

    @abstractmethod
    def write_new(self, key: str, data: bytes) -> None:
        """Write an object. Raises FileExistsError (or S3's 412) if the key exists."""

    @abstractmethod
    def begin(self, key: str) -> Any:
        """Return a parts object for an upload: put(number, bytes), check(), complete(if_absent=), abort()."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, ignoring missing ones."""
        for key in keys:
            with suppress(FileNotFoundError):
                self.fs.rm_file(self.path(key))

    def find(self, folder: str) -> list[ObjectInfo]:
        """Return the objects below a subfolder."""
        top = self.path(folder) if folder else self.root
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(top, detail=True, withdirs=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        start = f"{self.root}/" if self.root else ""
        inside = f"{top}/" if top else ""
        return [
            to_object_info(name.removeprefix(start), about)
            for name, about in found.items()
            if name.startswith(inside) and not name.endswith("/")
        ]

    def copy(self, src: str, dst: str) -> None:
        """Copy an object."""
        self.fs.cp_file(self.path(src), self.path(dst))

    def close(self) -> None:  # noqa: B027 - most file systems have nothing to close
        """Close the connections."""


class GenericAdapter(FileSystemAdapter):
    """Any file system. The lock makes test and write of write_new() atomic within this process."""

    def __init__(self, fs: Any, root: str) -> None:
        super().__init__(fs, root)
        self._lock = Lock()

    def info(self, key: str) -> ObjectInfo:
        """Return what the file system reports about the object. A folder is not an object."""
        self.fs.invalidate_cache()
        about = self.fs.info(self.path(key))
        if about.get("type") == "directory":
            raise FileNotFoundError(key)
        return to_object_info(key, about)

    def read(
        self, key: str, start: int | None, end: int | None, if_match: str | None = None
    ) -> tuple[bytes, str | None]:
        """Read by cat_file(); the caller compares ETags."""
        del if_match
        if start is None:
            self.info(key)  # some file systems read a folder as b""
        return bytes(self.fs.cat_file(self.path(key), start=start, end=end)), None

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Read by info() and cat_file()."""
        info = self.info(key)
        if not info.n_bytes:
            return b"", info
        data, _ = self.read(key, max(info.n_bytes - n_bytes, 0), info.n_bytes)
        return data, info

    def write(self, key: str, data: bytes) -> ObjectInfo:
        """Write by pipe_file()."""
        self._with_folder(key, lambda: self.fs.pipe_file(self.path(key), data))
        return self.info(key)

    def write_new(self, key: str, data: bytes) -> None:
        """Write by pipe_file(mode="create"), after an existence check for file systems without that mode."""
        with self._lock:
            self._refuse_taken(key)
            self._with_folder(key, lambda: self.fs.pipe_file(self.path(key), data, mode="create"))

    def _refuse_taken(self, key: str) -> None:
        self.fs.invalidate_cache()
        if self.fs.exists(self.path(key)):
            raise FileExistsError(key)

    def send_file(self, source: Path, key: str, *, if_absent: bool) -> None:
        """Copy a local file to the key."""
        with self._lock:
            if if_absent:
                self._refuse_taken(key)
            self._with_folder(key, lambda: self.fs.put_file(str(source), self.path(key)))

    def _with_folder(self, key: str, write: Callable[[], object]) -> None:
        try:
            write()
        except FileNotFoundError:
            self.fs.makedirs(self.path(key).rpartition("/")[0], exist_ok=True)
            write()

    def begin(self, key: str) -> Any:
        """Return an upload whose parts are local files."""
        return _SpooledParts(self, key)


class _SpooledParts:
    """Parts in a temporary folder; the lock guards the table."""

    def __init__(self, files: GenericAdapter, key: str) -> None:
        self._files, self._key = files, key
        self._folder = tempfile.TemporaryDirectory(prefix="tiercache-upload-", ignore_cleanup_errors=True)
        self._lock = Lock()
        self._parts: dict[int, Path] = {}

    def put(self, number: int, data: bytes) -> None:
        part = Path(self._folder.name) / str(number)
        part.write_bytes(data)
        with self._lock:
            self._parts[number] = part

    def check(self) -> None:
        parts_in_order(self._parts, self._key)

    def complete(self, *, if_absent: bool) -> None:
        whole = Path(self._folder.name) / "whole"
        with whole.open("wb") as out:
            for part in parts_in_order(self._parts, self._key):
                with part.open("rb") as file:
                    shutil.copyfileobj(file, out, 1 << 20)
                part.unlink()
        self._files.send_file(whole, self._key, if_absent=if_absent)
        self.abort()

    def abort(self) -> None:
        self._folder.cleanup()


class S3fsAdapter(FileSystemAdapter):
    """S3 through s3fs's client calls. s3fs must not retry by itself.

    Args:
        run: Function that runs a coroutine function on s3fs's event loop and waits for it.
    """

    is_conditional = True

    def __init__(self, fs: Any, root: str, run: Callable[..., Any]) -> None:
        super().__init__(fs, root)
        self._run = run
        fs.retries = 1  # otherwise s3fs retries a conditional put whose answer was lost
        self.bucket, _, self._prefix = self.root.partition("/")

    def location(self, key: str) -> dict[str, str]:
        """Return Bucket and Key of a key."""
        return {"Bucket": self.bucket, "Key": f"{self._prefix}/{key}" if self._prefix else key}

    def call(self, method: str, **arguments: Any) -> Mapping[str, Any]:
        """Send one request."""
        answer: Mapping[str, Any] = self.fs.call_s3(method, **arguments)
        return answer

    def info(self, key: str) -> ObjectInfo:
        """Send one HEAD."""
        said = self.call("head_object", **self.location(key))
        return _answered(key, said, said["ContentLength"])

    def _get(self, key: str, **arguments: str) -> tuple[bytes, Mapping[str, Any]]:
        async def whole() -> tuple[bytes, Mapping[str, Any]]:
            # s3fs has no public method for a GET that also returns the ETag.
            said = await self.fs._call_s3("get_object", **self.location(key), **arguments)  # noqa: SLF001
            async with said["Body"] as body:
                return await body.read(), said

        got: tuple[bytes, Mapping[str, Any]] = self._run(whole)
        return got

    def read(
        self, key: str, start: int | None, end: int | None, if_match: str | None = None
    ) -> tuple[bytes, str | None]:
        """Send one GET."""
        arguments = {} if start is None or end is None else {"Range": f"bytes={start}-{end - 1}"}
        if if_match is not None:
            arguments["IfMatch"] = if_match
        data, said = self._get(key, **arguments)
        return data, said.get("ETag")

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Send one GET with a suffix range, and a HEAD for an empty object."""
        try:
            data, said = self._get(key, Range=f"bytes=-{n_bytes}")
        except OSError as error:
            if getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode") != 416:
                raise
            return b"", self.info(key)
        size = said.get("ContentRange", "").rpartition("/")[2] or said["ContentLength"]
        return data, _answered(key, said, int(size))

    def write(self, key: str, data: bytes) -> ObjectInfo:
        """Send one PUT."""
        return _answered(key, self.call("put_object", Body=data, **self.location(key)), len(data))

    def write_new(self, key: str, data: bytes) -> None:
        """Send one PUT with If-None-Match."""
        self.call("put_object", Body=data, IfNoneMatch="*", **self.location(key))

    def delete(self, keys: Sequence[str]) -> None:
        """Send one DELETE per object."""
        for key in keys:
            self.call("delete_object", **self.location(key))

    def begin(self, key: str) -> Any:
        """Return a multipart upload."""
        return _Multipart(self, key)

    def close(self) -> None:
        """Close the session of s3fs."""
        client = self.fs._s3  # noqa: SLF001 - s3fs closes only on garbage collection, too late for a clean exit
        if client is not None:
            self._run(client.__aexit__, None, None, None)
            self.fs._s3 = None  # noqa: SLF001


class _Multipart:
    """A multipart upload whose parts are sent as they come; the lock guards the table and the id."""

    def __init__(self, files: S3fsAdapter, key: str) -> None:
        self._files, self._key = files, key
        self._lock = Lock()
        self._id: str | None = None
        self._tags: dict[int, str] = {}

    def put(self, number: int, data: bytes) -> None:
        place = self._files.location(self._key)
        with self._lock:
            if self._id is None:
                self._id = str(self._files.call("create_multipart_upload", **place)["UploadId"])
        said = self._files.call("upload_part", UploadId=self._id, PartNumber=number + 1, Body=data, **place)
        with self._lock:
            self._tags[number] = said["ETag"]

    def check(self) -> None:
        parts_in_order(self._tags, self._key)

    def complete(self, *, if_absent: bool) -> None:
        if self._id is None:
            if if_absent:
                self._files.write_new(self._key, b"")
            else:
                self._files.write(self._key, b"")
            return
        parts = [{"PartNumber": n + 1, "ETag": tag} for n, tag in enumerate(parts_in_order(self._tags, self._key))]
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        place = self._files.location(self._key)
        self._files.call(
            "complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": parts}, **place, **condition
        )

    def abort(self) -> None:
        if self._id is not None:
            self._files.call("abort_multipart_upload", UploadId=self._id, **self._files.location(self._key))


def _answered(key: str, said: Mapping[str, Any], n_bytes: int) -> ObjectInfo:
    when = said.get("LastModified")
    return ObjectInfo(
        key,
        n_bytes,
        etag=said.get("ETag"),
        version=said.get("VersionId"),
        modified_s=when.timestamp() if when is not None else None,
        storage_class=said.get("StorageClass"),
        restore=said.get("Restore"),
    )


def to_object_info(key: str, about: Mapping[str, Any]) -> ObjectInfo:
    """Convert an info() of fsspec to an ObjectInfo.

    The ETag is the file system's. If that is missing or weak, the ETag is built from all fields that change with a
    file, and is None if there are none.
    """
    marks = [about[name] for name in _MARKS if about.get(name) is not None]
    given = next((about[name] for name in ("ETag", "etag") if isinstance(about.get(name), str)), None)
    if given is None or given.startswith(_WEAK):
        firm = [mark for mark in marks if mark != given]
        made = '"' + "-".join(str(mark).replace('"', "") for mark in [*marks, about["size"]]) + '"'
        given = made if firm else None
    return ObjectInfo(key, _size(about), etag=given, modified_s=_time(about))


def _size(about: Mapping[str, Any]) -> int:
    size = about["size"]
    if size is None:
        raise OSError("the file system does not report the size of the object")
    return int(size)


def _time(about: Mapping[str, Any]) -> float | None:
    for name in _TIMES:
        value = about.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
