"""Meaning of obstore's exceptions, parsed from their text: obstore exposes status and kind nowhere else. Pure."""

from __future__ import annotations

import json
import re

from tiercache.errors import NotFound, ObjectChanged, StoreError

_STATUS = re.compile(r"status code: (\d{3})\b ?([^:\n]*):? ?(.*)", re.DOTALL)
_KIND = re.compile(r"HttpError \{\s*kind: (\w+)")
_CAUSES = re.compile(r'(?:message|error): "?([^"\n]+?)"?,?\n')
# Metadata services, which clients ask for credentials if the options contain none.
_METADATA = re.compile(r"/latest/(?:api/token|meta-data)|/computeMetadata/|/metadata/identity/")
_XML = re.compile(r"<(Code|Message)>([^<]{1,300})</")
_SERVER = re.compile(r"performing \w+ (https?://[^/\s]+)")
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
_SECRET = re.compile(r"\?[^\s\"',)]*|(?<=://)[^/\s@\"']*@")
_DEBUG = "\n\nDebug source"
_BODY_CHARS = 200
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
# Statuses with which the server says that it did not execute the request; after other errors of a write this is
# unknown.
_NOT_DONE = (429, 503)
_TOO_FAR = 416
_CHANGED = 412
CONFLICT = 409


def to_store_error(error: BaseException, doing: str, url: str, endpoint: str = "") -> StoreError:
    """Convert an error of obstore to a StoreError with .status, .code, .retryable and .sent (whether it was sent).

    Args:
        error: Error of obstore.
        doing: Operation, for messages.
        url: URL of the object, for messages.
        endpoint: Server of the request, for messages.
    """
    text = str(error)
    status, said = _status(text), _said(text)
    code = said.get("Code")
    shown = _shown(text, status, said, endpoint)
    name = type(error).__name__
    if isinstance(error, FileNotFoundError):
        what = "bucket" if "NoSuchBucket" in text else "object"
        return NotFound(f"no such {what} ({doing})", url=url, status=status)
    if name in ("PreconditionError", "NotModifiedError") or status == _CHANGED:
        return ObjectChanged(f"the object does not have the requested ETag ({doing})", url=url, status=status)
    if "RangeNotSupported" in text or "non-partial" in text:
        message = f"{doing}: the server sent the whole object instead of a range; it may not support range requests"
        return StoreError(message, url=url, retryable=True, no_range=True)
    if name in ("NotSupportedError", "NotImplementedError"):
        return StoreError(f"{doing}: not supported by this kind of store ({shown})", url=url, no_range=True)
    if _METADATA.search(text) and status not in _TRY_AGAIN:
        message = (
            f"{doing}: no credentials: none in storage_options, the environment or a profile, and the metadata service "
            f"of a cloud machine gave none ({shown}); for a public bucket set anon=True or skip_signature=True"
        )
        return StoreError(message, url=url)
    if certificate := _CERTIFICATE.search(text):
        message = (
            f"{doing}: the certificate of {endpoint or 'the server'} is not trusted ({certificate[1]}); "
            "set root_certificate= or AWS_CA_BUNDLE to a file of trusted certificates"
        )
        return StoreError(message, url=url, sent=False)
    kind = _KIND.search(text)
    retryable = status in _TRY_AGAIN or "ConditionalRequestConflict" in text if status else kind is not None
    sent = not (kind is not None and kind[1] == "Connect")
    return StoreError(
        f"{doing}: {shown}", url=url, retryable=retryable, status=status, sent=sent, code=code, text=shown
    )


def knows_no_range(error: StoreError) -> bool:
    """Return whether a range request failed because the store does not support that kind of range."""
    return bool(error.facts.get("no_range", False))


def exists_already(error: BaseException) -> bool:
    """Return whether a conditional put failed because the key exists, not because of a concurrent write."""
    return type(error).__name__ == "AlreadyExistsError" and "ConditionalRequestConflict" not in str(error)


def may_have_taken_effect(error: StoreError) -> bool:
    """Return whether a failed write may have taken effect: it was sent, and no answer says that it was refused."""
    status = error.facts.get("status")
    if error.facts.get("before_request"):
        return False
    if status is not None:
        return status >= 500 and status not in _NOT_DONE
    return bool(error.facts.get("sent", False)) and error.retryable


def is_beyond_end(error: StoreError) -> bool:
    """Return whether the store answered that the range starts beyond the end of the object."""
    return error.facts.get("status") == _TOO_FAR


def _status(text: str) -> int | None:
    match = _STATUS.search(text.partition(_DEBUG)[0])
    return int(match[1]) if match else None


def _said(text: str) -> dict[str, str]:
    """Return Code and Message of the answer's body, from XML (S3, STS, Azure) or JSON (Google); {} without a body."""
    match = _STATUS.search(text.partition(_DEBUG)[0])
    if match is None:
        return {}
    body = match[3].strip()
    if not body.startswith("{"):
        return dict(_XML.findall(body))
    try:
        said = json.loads(body)
    except ValueError:
        return {}
    inner = said.get("error", said)
    if isinstance(inner, dict):  # {"error": {"code": 401, "status": "UNAUTHENTICATED", "message": "..."}}
        found = {"Code": inner.get("status") or inner.get("code"), "Message": inner.get("message")}
    else:  # OAuth: {"error": "invalid_grant", "error_description": "..."}
        found = {"Code": inner, "Message": said.get("error_description")}
    return {name: str(value) for name, value in found.items() if value}


def _shown(text: str, status: int | None, said: dict[str, str], endpoint: str) -> str:
    """Return the part of the text for the user: status, code and message of the body, or the cause. Without secrets."""
    first, _, debug = text.partition(_DEBUG)
    match = _STATUS.search(first)
    if match:
        body = ": ".join(said[name] for name in ("Code", "Message") if name in said) or match[3].strip()
        if body.startswith("<"):
            body = ""  # an HTML page
        return _hide(f"HTTP {status} {match[2].strip()}{': ' if body else ''}{body[:_BODY_CHARS]}")
    kind, causes = _KIND.search(debug), _CAUSES.findall(debug)
    if kind:
        server = _SERVER.search(first)
        where = _hide(server[1] if server else endpoint)
        at = f" {where}" if where else ""
        what = {
            "Timeout": f"timed out: no answer, or no further byte, from{at or ' the server'}",
            "Connect": f"cannot connect{' to' if at else ''}{at}",
        }.get(kind[1], f"the connection{' to' if at else ''}{at} broke")
        return _hide(f"{what}{': ' + causes[-1] if causes else ''}")
    return _hide(first.strip().splitlines()[0] if first.strip() else "unknown error")


def _hide(text: str) -> str:
    return _SECRET.sub("", text)
