"""All exceptions of tiercache.

::

    TierCacheError
    ├── StoreError            a store request failed; .retryable says whether a retry can help
    │   ├── NotFound          (also FileNotFoundError) the object does not exist
    │   └── ObjectChanged     the object, or the data set under a resumed run, is not the one that was opened
    ├── CorruptShard          the bytes of a shard, segment or version differ from those written; exit code 4
    ├── CorruptCheckpoint     the bytes of a checkpoint differ from those written; exit code 4
    ├── SchemaError           (also ValueError) an invalid schema, or a value that does not match the schema
    ├── CommitConflict        another writer committed first
    ├── ArchivedShards        shards must be restored before they can be read; exit code 5
    └── UnsupportedFormat     the data was written by a newer release

An exception keeps each argument after `message` as an attribute, and builds its own message: what was expected, what
was found, where, and what to do. `details` holds further facts for the library itself; their names may change. Wrong
arguments raise plain ``ValueError`` or ``TypeError``, as in the standard library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class TierCacheError(Exception):
    """Base class of all exceptions of tiercache.

    Args:
        message: What happened.
        details: Further facts for the library itself.

    Attributes:
        exit_code: Exit code of the command when this exception ends it.
        message: The whole message.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors are pickled between processes (loader workers, `pack -j`), although __init__ takes other arguments.
        return _rebuild, (type(self), self.message, self.__dict__)


def _rebuild(cls: type[TierCacheError], message: str, attributes: dict[str, object]) -> TierCacheError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(attributes)
    return error


class StoreError(TierCacheError):
    """A store request failed.

    Args:
        message: What happened.
        url: URL of the object, without credentials.
        retryable: Whether the same request may succeed later.
        status: HTTP status; None if there is none.
        code: Error code of the server's answer, e.g. "AccessDenied", or "CacheFull"; None if there is none.
        maybe_done: Whether the store may have executed the request, e.g. because its answer was lost.
        details: Further facts for the library itself.
    """

    def __init__(
        self,
        message: str,
        *,
        url: str,
        retryable: bool = False,
        status: int | None = None,
        code: str | None = None,
        maybe_done: bool = False,
        **details: object,
    ) -> None:
        super().__init__(f"{url}: {message}", **details)
        self.url = url
        self.retryable = retryable
        self.status = status
        self.code = code
        self.maybe_done = maybe_done


class NotFound(StoreError, FileNotFoundError):
    """The object does not exist.

    Args:
        message: What happened.
        url: URL of the object, without credentials.
        retryable: Whether the same request may succeed later.
        status: HTTP status; None if there is none.
        code: Error code of the server's answer, e.g. "NoSuchKey"; None if there is none.
        maybe_done: Whether the store may have executed the request, e.g. because its answer was lost.
        details: Further facts for the library itself.
    """


class ObjectChanged(StoreError):
    """The object (or data set) is not the one that was opened.

    Args:
        message: What happened.
        url: URL of the object, without credentials.
        expected: ETag, size or fingerprint of the object that was opened.
        found: ETag, size or fingerprint of the object that was found.
        status: HTTP status; None if there is none.
        code: Error code of the server's answer; None if there is none.
        details: Further facts for the library itself.
    """

    def __init__(
        self,
        message: str = "the object changed while it was being read",
        *,
        url: str,
        expected: object = None,
        found: object = None,
        status: int | None = None,
        code: str | None = None,
        **details: object,
    ) -> None:
        super().__init__(f"{message} (expected {expected}, found {found})", url=url, status=status, code=code)
        self.details = details
        self.expected = expected
        self.found = found


class CorruptShard(TierCacheError):
    """The bytes of a shard, segment or version differ from those that were written.

    Args:
        message: Description of the defect.
        url: URL of the object, without credentials.
        part: Corrupt part of the object, e.g. "footer" or "segment"; "" if unknown.
        block: Number of the corrupt block; None if unknown.
        column: Name of the corrupt column; None if unknown.
        record: Number of the corrupt record in the data set; None if unknown.
        location: Shard, block and row in the data set, which the loader sets; None if unknown.
        details: Further facts for the library itself.

    Attributes:
        reason: The message without its location.
    """

    exit_code = 4

    def __init__(
        self,
        message: str,
        *,
        url: str,
        part: str = "",
        block: int | None = None,
        column: str | None = None,
        record: int | None = None,
        location: tuple[int, int | None, int | None] | None = None,
        **details: object,
    ) -> None:
        places = [part, "" if block is None else f"block {block}", "" if column is None else f"column {column!r}"]
        where = ", ".join(p for p in places if p)
        super().__init__(f"{url}: {where + ': ' if where else ''}{message}", **details)
        self.reason = message
        self.url = url
        self.part = part
        self.block = block
        self.column = column
        self.record = record
        self.location = location


class CorruptCheckpoint(TierCacheError):
    """The bytes of a checkpoint's file differ from those that were written, or a file is missing.

    Args:
        message: Description of the defect.
        url: URL of the file, without credentials.
        part: Corrupt part of the checkpoint, e.g. "manifest" or the name of a tensor; "" if unknown.
        details: Further facts for the library itself.

    Attributes:
        reason: The message without its location.
    """

    exit_code = 4

    def __init__(self, message: str, *, url: str, part: str = "", **details: object) -> None:
        super().__init__(f"{url}: {part + ': ' if part else ''}{message}", **details)
        self.reason = message
        self.url = url
        self.part = part


class SchemaError(TierCacheError, ValueError):
    """A schema is invalid, or a value does not match the schema.

    Args:
        message: What was expected and what was found.
        column: Name of the column; None if the error has no column.
        record: Index of the record; None if the error has no record.
        expected: Type or value that was expected.
        got: Type or value that was found.
        details: Further facts for the library itself.
    """

    def __init__(
        self,
        message: str,
        *,
        column: str | None = None,
        record: int | None = None,
        expected: object = None,
        got: object = None,
        **details: object,
    ) -> None:
        places = ["" if column is None else f"column {column!r}", "" if record is None else f"record {record}"]
        where = ", ".join(p for p in places if p)
        super().__init__(f"{where}: {message}" if where else message, **details)
        self.column = column
        self.record = record
        self.expected = expected
        self.got = got


class CommitConflict(TierCacheError):
    """Another writer committed first.

    Args:
        message: What happened.
        url: URL of the data set, without credentials.
        number: Version number that the other writer took; None if unknown.
        details: Further facts for the library itself.
    """

    def __init__(self, message: str, *, url: str, number: int | None = None, **details: object) -> None:
        super().__init__(f"{url}: {message}", **details)
        self.url = url
        self.number = number


class ArchivedShards(TierCacheError):
    """Shards are in archive storage and must be restored before they can be read.

    A data set with archived shards raises this exception when it is opened, or when such a shard is read that was
    archived later. `tiercache tier get` restores the shards; read them again after it has ended.

    Args:
        message: What happened and what to do.
        names: Names of the shards.
        url: URL of the data set, without credentials.
        n_bytes: Bytes of the shards; 0 if unknown.
        command: Command line that shows what the restore costs and how long it takes, and makes it; "" if unknown.
        details: Further facts for the library itself.
    """

    exit_code = 5

    def __init__(
        self,
        message: str,
        *,
        names: Sequence[str],
        url: str = "",
        n_bytes: int = 0,
        command: str = "",
        **details: object,
    ) -> None:
        super().__init__(message, **details)
        self.names = tuple(names)
        self.url = url
        self.n_bytes = n_bytes
        self.command = command


class UnsupportedFormat(TierCacheError):
    """The data has a format version that this release cannot read, because a newer release wrote it.

    Nothing is wrong with the data: upgrade tiercache to read it.

    Args:
        message: What happened.
        url: URL of the object, without credentials.
        found: Format version of the data.
        supported: Newest format version that this release reads.
        details: Further facts for the library itself.

    Attributes:
        reason: The message without the URL.
    """

    def __init__(self, message: str, *, url: str, found: int, supported: int, **details: object) -> None:
        super().__init__(f"{url}: {message}", **details)
        self.reason = message
        self.url = url
        self.found = found
        self.supported = supported
