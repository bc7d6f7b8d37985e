"""All exceptions of tiercache.

::

    TierCacheError
    ├── StoreError            a store request failed; .retryable says whether a retry can help
    │   ├── NotFound          (also FileNotFoundError) the object does not exist
    │   └── ObjectChanged     the object, or the data set under a resumed run, is not the one that was opened
    ├── CorruptShard          the bytes of a shard, segment or version differ from those written; exit code 4
    ├── SchemaError           (also ValueError) an invalid schema, or a value that does not match the schema
    ├── CommitConflict        another writer committed first
    ├── CacheFull             the cache has not enough space for the request; exit code 6
    ├── ArchivedShards        shards must be restored before they can be read; exit code 5
    └── UnsupportedFormat     the data was written by a newer release

An exception takes facts as arguments, keeps them as attributes and builds its own message: what was expected, what was
found, where, and what to do. Wrong arguments raise plain ``ValueError`` or ``TypeError``, as in the standard library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class TierCacheError(Exception):
    """Base class of all exceptions of tiercache.

    Args:
        message: The message.
        facts: Facts about the error, which become attributes of the exception.

    Attributes:
        exit_code: Exit code of the command when this exception ends it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(name)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors are pickled between processes (loader workers, `pack -j`): keep class, message and facts.
        return _rebuild, (type(self), self.message, self.facts)


def _rebuild(cls: type[TierCacheError], message: str, facts: dict[str, Any]) -> TierCacheError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.message = message
    error.facts = facts
    return error


class StoreError(TierCacheError):
    """A store request failed.

    Args:
        message: What happened.
        url: URL of the object, without credentials.
        retryable: Whether the same request may succeed later.
        status: HTTP status; None if there is none.
        facts: Further facts.
    """

    def __init__(
        self, message: str, *, url: str, retryable: bool = False, status: int | None = None, **facts: Any
    ) -> None:
        super().__init__(f"{url}: {message}", url=url, retryable=retryable, status=status, **facts)


class NotFound(StoreError, FileNotFoundError):
    """The object does not exist.

    Args:
        message: What happened.
        url: URL of the object, without credentials.
        facts: Further facts, see StoreError.
    """

    def __init__(self, message: str = "no such object", *, url: str, **facts: Any) -> None:
        super().__init__(message, url=url, **facts)


class ObjectChanged(StoreError):
    """The object (or data set) is not the one that was opened.

    Args:
        message: What happened; "": the object changed while it was being read.
        url: URL of the object, without credentials.
        expected: ETag, size or fingerprint of the object that was opened.
        found: ETag, size or fingerprint of the object that was found.
        facts: Further facts, see StoreError.
    """

    def __init__(
        self, message: str = "", *, url: str, expected: object = None, found: object = None, **facts: Any
    ) -> None:
        text = message or "the object changed while it was being read"
        super().__init__(
            f"{text} (expected {expected}, found {found})", url=url, expected=expected, found=found, **facts
        )


class CorruptShard(TierCacheError):
    """The bytes of a shard, segment or version differ from those that were written.

    Args:
        message: What is wrong; kept as the attribute reason.
        url: URL of the object, without credentials.
        part: Damaged part of the object, e.g. "footer" or "segment"; "" if unknown.
        block: Number of the damaged block; None if unknown.
        column: Name of the damaged column; None if unknown.
        facts: Further facts.
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
        **facts: Any,
    ) -> None:
        places = [part, "" if block is None else f"block {block}", "" if column is None else f"column {column!r}"]
        where = ", ".join(p for p in places if p)
        text = f"{url}: {where + ': ' if where else ''}{message}"
        super().__init__(text, url=url, part=part, block=block, column=column, reason=message, **facts)


class SchemaError(TierCacheError, ValueError):
    """A schema is invalid, or a value does not match the schema.

    Args:
        message: What was expected and what was found.
        column: Name of the column; None if the error has no column.
        record: Index of the record; None if the error has no record.
        facts: Further facts, e.g. expected and got.
    """

    def __init__(self, message: str, *, column: str | None = None, record: int | None = None, **facts: Any) -> None:
        places = ["" if column is None else f"column {column!r}", "" if record is None else f"record {record}"]
        where = ", ".join(p for p in places if p)
        super().__init__(f"{where}: {message}" if where else message, column=column, record=record, **facts)


class CommitConflict(TierCacheError):
    """Another writer committed first.

    Args:
        message: What happened.
        url: URL of the data set, without credentials.
        number: Version number that the other writer took; None if unknown.
        facts: Further facts.
    """

    def __init__(self, message: str, *, url: str, number: int | None = None, **facts: Any) -> None:
        super().__init__(f"{url}: {message}", url=url, number=number, **facts)


class CacheFull(TierCacheError):
    """The local cache has not enough space.

    Args:
        message: What happened.
        need_bytes: Bytes that the request needs.
        freeable_bytes: Bytes that eviction could free.
        limit_bytes: Size limit of the cache.
        facts: Further facts.
    """

    exit_code = 6

    def __init__(self, message: str, *, need_bytes: int, freeable_bytes: int, limit_bytes: int, **facts: Any) -> None:
        super().__init__(
            message, need_bytes=need_bytes, freeable_bytes=freeable_bytes, limit_bytes=limit_bytes, **facts
        )


class ArchivedShards(TierCacheError):
    """Shards are in archive storage and must be restored before they can be read.

    Args:
        message: What happened and what to do.
        names: Names of the shards.
        facts: Further facts.
    """

    exit_code = 5

    def __init__(self, message: str, *, names: Sequence[str], **facts: Any) -> None:
        super().__init__(message, names=tuple(names), **facts)


class UnsupportedFormat(TierCacheError):
    """The data has a format version that this release cannot read.

    Args:
        message: What happened; kept as the attribute reason.
        url: URL of the object, without credentials.
        found: Format version of the data.
        supported: Newest format version that this release reads.
        facts: Further facts.
    """

    def __init__(self, message: str, *, url: str, found: int, supported: int, **facts: Any) -> None:
        super().__init__(f"{url}: {message}", url=url, found=found, supported=supported, reason=message, **facts)
