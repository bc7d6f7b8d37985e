"""The error tree.

::

    TierCacheError
    ├── StoreError            a store did not do what it was asked; .retryable says whether trying again can help
    │   ├── NotFound          (also FileNotFoundError)
    │   └── ObjectChanged     the object is no longer the one that was opened; a changed data set under a resumed run
    ├── CorruptShard          bytes are not what was written (shard, segment or version); exit code 4
    ├── SchemaError           (also ValueError) a schema, or a value that does not fit it
    ├── CommitConflict        somebody else committed first
    ├── CacheFull             what was asked to be cached has no room; exit code 6
    ├── ArchivedShards        shards that must be restored before they can be read; exit code 5
    └── UnsupportedFormat     written by a newer release than this

An error takes facts, keeps them as attributes and writes its own message: what was expected, what was found, where,
and what to do. Wrong arguments are plain ``ValueError`` and ``TypeError``, as in the standard library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class TierCacheError(Exception):
    """Base of all errors of tiercache; exit_code is what the command ends with."""

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
        # Errors cross process borders (workers, `pack -j`): keep class, text and facts.
        return _rebuild, (type(self), self.message, self.facts)


def _rebuild(cls: type[TierCacheError], message: str, facts: dict[str, Any]) -> TierCacheError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.message = message
    error.facts = facts
    return error


class StoreError(TierCacheError):
    """A store failed.

    url: redacted; retryable: whether the same call may succeed later; status: HTTP status or None.
    """

    def __init__(
        self, message: str, *, url: str, retryable: bool = False, status: int | None = None, **facts: Any
    ) -> None:
        super().__init__(f"{url}: {message}", url=url, retryable=retryable, status=status, **facts)


class NotFound(StoreError, FileNotFoundError):
    """No such object."""

    def __init__(self, message: str = "no such object", *, url: str, **facts: Any) -> None:
        super().__init__(message, url=url, **facts)


class ObjectChanged(StoreError):
    """The object (or data set) is not the one that was opened. expected, found: ETag, size or fingerprint."""

    def __init__(
        self, message: str = "", *, url: str, expected: object = None, found: object = None, **facts: Any
    ) -> None:
        text = message or "the object changed while it was being read"
        super().__init__(
            f"{text} (expected {expected}, found {found})", url=url, expected=expected, found=found, **facts
        )


class CorruptShard(TierCacheError):
    """Bytes are not what was written. url; part: what is damaged; block, column where known; reason: all else."""

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
    """A schema that cannot be, or a value that does not fit. column, record: where; expected, got: what."""

    def __init__(self, message: str, *, column: str | None = None, record: int | None = None, **facts: Any) -> None:
        places = ["" if column is None else f"column {column!r}", "" if record is None else f"record {record}"]
        where = ", ".join(p for p in places if p)
        super().__init__(f"{where}: {message}" if where else message, column=column, record=record, **facts)


class CommitConflict(TierCacheError):
    """Another writer committed first. url, number: the version that was lost."""

    def __init__(self, message: str, *, url: str, number: int | None = None, **facts: Any) -> None:
        super().__init__(f"{url}: {message}", url=url, number=number, **facts)


class CacheFull(TierCacheError):
    """No room in the local cache. need_bytes, freeable_bytes, limit_bytes."""

    exit_code = 6

    def __init__(self, message: str, *, need_bytes: int, freeable_bytes: int, limit_bytes: int, **facts: Any) -> None:
        super().__init__(
            message, need_bytes=need_bytes, freeable_bytes=freeable_bytes, limit_bytes=limit_bytes, **facts
        )


class ArchivedShards(TierCacheError):
    """Shards that must be restored first. names: which."""

    exit_code = 5

    def __init__(self, message: str, *, names: Sequence[str], **facts: Any) -> None:
        super().__init__(message, names=tuple(names), **facts)


class UnsupportedFormat(TierCacheError):
    """Written in a format that this release does not read. found, supported: versions."""

    def __init__(self, message: str, *, url: str, found: int, supported: int, **facts: Any) -> None:
        super().__init__(f"{url}: {message}", url=url, found=found, supported=supported, reason=message, **facts)
