"""Meaning of the exceptions of fsspec's file systems. Pure."""

from __future__ import annotations

import errno
import re

from tiercache.errors import NotFound, ObjectChanged, StoreError

_SECRET = re.compile(r"\?[^\s\"',)]*|(?<=://)[^/\s@\"']*@")
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_NOT_DONE = (429, 503)
_RETRYABLE = (errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE)
_NOT_SENT = ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "ConnectionRefusedError")
_BROKEN = (
    "ReadTimeoutError", "ConnectionClosedError", "ResponseStreamingError", "IncompleteReadError", "HTTPClientError",
    "ClientPayloadError", "ServerDisconnectedError", "ClientOSError", "FSTimeoutError", "ProxyConnectionError",
)  # fmt: skip


def to_store_error(error: BaseException, doing: str, url: str) -> StoreError:
    """Convert an error to a StoreError with .status, .retryable and .sent (False if the request was never sent)."""
    status = status_of(error)
    shown = _SECRET.sub("", str(error).strip() or type(error).__name__)
    code = _answer(error).get("Error", {}).get("Code")
    code = None if code is None or str(code) == str(status) else str(code)
    if code is not None and code not in shown:  # s3fs keeps only the message
        shown = f"{code}: {shown}"
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        return NotFound(f"no such object ({doing})", url=url, status=status)
    if status == 412:
        return ObjectChanged(f"the object does not have the requested ETag ({doing})", url=url, status=status)
    if isinstance(error, NotImplementedError):
        return StoreError(f"{doing}: not supported by this kind of store ({shown})", url=url)
    names = {kind.__name__ for kind in type(error).__mro__}
    sent = names.isdisjoint(_NOT_SENT)
    if status is not None:
        retryable = status in _TRY_AGAIN or is_conflict(error)
    elif isinstance(error, PermissionError | FileExistsError):
        retryable = False
    else:
        lost = isinstance(error, TimeoutError | ConnectionError) or not names.isdisjoint((*_NOT_SENT, *_BROKEN))
        retryable = lost or (isinstance(error, OSError) and error.errno in _RETRYABLE)
    return StoreError(
        f"{doing}: {shown}", url=url, retryable=retryable, status=status, sent=sent, code=code, text=shown
    )


def may_have_taken_effect(error: StoreError) -> bool:
    """Return whether a failed write may still have taken effect."""
    status = error.facts.get("status")
    if status is not None:
        return status >= 500 and status not in _NOT_DONE
    return bool(error.facts.get("sent", False)) and error.retryable


def exists_already(error: BaseException) -> bool:
    """Return whether a conditional write was refused because the key exists."""
    return isinstance(error, FileExistsError) or status_of(error) == 412


def is_conflict(error: BaseException) -> bool:
    """Return whether S3 refused the write because another conditional write of the key is running."""
    return _answer(error).get("Error", {}).get("Code") == "ConditionalRequestConflict"


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the error or its cause, or None."""
    status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", getattr(error, "status", None))
    return status if isinstance(status, int) else None


def _answer(error: BaseException) -> dict[str, dict[str, object]]:
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return response
    return {}
