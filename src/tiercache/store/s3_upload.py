"""An S3 upload in parts from any thread, each with its CRC-32C, which the server holds against what it gets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition
from typing import Any, Protocol

from tiercache._native.checksum import combine, crc32c
from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ObjectInfo
from tiercache.store.contract import Buffer, Upload
from tiercache.store.parts import in_order
from tiercache.store.sums import sum_text, sum_value


class Target(Protocol):
    """The requests that an upload makes: S3's, with our errors, repeated where that helps."""

    def call(self, operation: str, key: str, **request: Any) -> Any:
        """One request about an object."""

    def at(self, key: str) -> str:
        """The object's URL, for people."""

    def head(self, key: str) -> ObjectInfo:
        """What it is."""


@dataclass(frozen=True, slots=True)
class _Part:
    etag: str
    crc32c: int
    n_bytes: int
    is_confirmed: bool


class S3Upload(Upload):
    """The first part is kept until a second one comes: an object of one part is one request.

    The lock guards the table, and who begins; parts are sent outside it. After complete(), `crc32c` is the sum of the
    whole, and `is_confirmed` says whether the server has named a sum of each part that is ours: then it has what it was
    given, which need not be read back.
    """

    def __init__(self, target: Target, key: str, writing: dict[str, Any], *, if_match: str | None = None) -> None:
        """writing: arguments of the request that makes the object: class, encryption.

        if_match: the ETag of what it takes the place of; None: of anything.
        """
        self._target, self._key, self._writing, self._if_match = target, key, writing, if_match
        self._changed = Condition()
        self._held: tuple[int, bytes | bytearray] | None = None
        self._upload_id: str | None = None
        self._is_beginning = False
        self._is_open = True
        self._n_sending = 0
        self._parts: dict[int, _Part] = {}
        self.crc32c = 0
        self.is_confirmed = False

    def put_part(self, number: int, data: Buffer) -> None:
        """Send the part, or keep a copy of the only one."""
        with self._changed:
            if number < 0 or not self._is_open:
                raise ValueError(
                    f"{self._key}: part {number}: parts count from 0 and come before complete() or abort()"
                )
            if self._held is None and self._upload_id is None and not self._is_beginning:
                self._held = number, bytes(data)
                return
            self._n_sending += 1
        try:
            upload_id = self._begun()
            self._send(upload_id, number, data)
        finally:
            with self._changed:
                self._n_sending -= 1
                self._changed.notify_all()

    def _begun(self) -> str:
        """The upload's id; the first who asks begins it and sends the part that was held, others wait for the id."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_beginning)
            if self._upload_id is not None:
                return self._upload_id
            self._is_beginning = True
        upload_id = None
        try:
            asked = {**self._writing, "ChecksumAlgorithm": "CRC32C", "ChecksumType": "FULL_OBJECT"}
            upload_id = str(self._target.call("create_multipart_upload", self._key, **asked)["UploadId"])
        finally:
            with self._changed:
                self._upload_id, self._is_beginning = upload_id, False
                held, self._held = (self._held, None) if upload_id is not None else (None, self._held)
                self._changed.notify_all()
        if held is not None:
            self._send(upload_id, *held)
        return upload_id

    def _send(self, upload_id: str, number: int, data: Buffer) -> None:
        crc = crc32c(data)
        body = data if isinstance(data, bytes | bytearray) else bytes(data)
        said = self._target.call(
            "upload_part", self._key, UploadId=upload_id, PartNumber=number + 1, Body=body, ChecksumCRC32C=sum_text(crc)
        )
        is_confirmed = _confirms(said, crc, body)
        with self._changed:
            self._parts[number] = _Part(str(said["ETag"]), crc, len(body), is_confirmed)

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Publish: by one request if there is one part."""
        if not self._stop():
            raise ValueError(f"{self._key}: the upload was completed or aborted before")
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": self._if_match} if self._if_match else {}
        try:
            return self._published(condition)
        except ObjectChanged:
            self._drop()
            if not if_absent:
                raise
            return None
        except NotFound as error:
            if "IfMatch" not in condition:
                raise
            self._drop()
            message = "what it was to replace is gone"
            raise ObjectChanged(message, url=self._target.at(self._key), expected=self._if_match) from error

    def _published(self, condition: dict[str, str]) -> ObjectInfo:
        return self._put(condition) if self._upload_id is None else self._join(self._upload_id, condition)

    def _put(self, condition: dict[str, str]) -> ObjectInfo:
        number, data = self._held or (0, b"")
        if number:
            raise ValueError(f"{self._key}: part 0 is missing; parts are numbered 0, 1, 2, ... without gaps")
        self.crc32c = crc32c(data)
        asked = {**self._writing, **condition, "Body": data, "ChecksumCRC32C": sum_text(self.crc32c)}
        said = self._target.call("put_object", self._key, **asked)
        self.is_confirmed = _confirms(said, self.crc32c, data)
        return ObjectInfo(self._key, len(data), etag=said.get("ETag"), version=said.get("VersionId"))

    def _join(self, upload_id: str, condition: dict[str, str]) -> ObjectInfo:
        try:
            parts = in_order(self._parts, self._key)
        except ValueError:
            self._drop()
            raise
        total, self.is_confirmed = 0, all(part.is_confirmed for part in parts)
        for part in parts:
            self.crc32c = combine(self.crc32c, part.crc32c, part.n_bytes)
            total += part.n_bytes
        named = [
            {"PartNumber": number, "ETag": part.etag, "ChecksumCRC32C": sum_text(part.crc32c)}
            for number, part in enumerate(parts, start=1)
        ]
        asked = {"ChecksumCRC32C": sum_text(self.crc32c), "ChecksumType": "FULL_OBJECT", "MpuObjectSize": total}
        try:
            said = self._target.call(
                "complete_multipart_upload",
                self._key,
                UploadId=upload_id,
                MultipartUpload={"Parts": named},
                **asked,
                **condition,
            )
        except NotFound:
            # Asked again because the answer was lost, S3 knows the upload no more: the object is there, or it is not.
            info = self._target.head(self._key)
            if "IfNoneMatch" in condition or info.n_bytes != total or info.crc32c != self.crc32c:
                raise
            return info
        return ObjectInfo(self._key, total, etag=said.get("ETag"), version=said.get("VersionId"))

    def abort(self) -> None:
        """Drop what was sent."""
        if self._stop():
            self._drop()

    def _stop(self) -> bool:
        with self._changed:
            was_open, self._is_open = self._is_open, False
            self._changed.wait_for(lambda: not self._n_sending)
            return was_open

    def _drop(self) -> None:
        self._held = None
        if self._upload_id is not None:
            with suppress(StoreError):  # the parts then stay until the bucket's own rule removes them
                self._target.call("abort_multipart_upload", self._key, UploadId=self._upload_id)


def _confirms(said: Mapping[str, Any], crc: int, data: bytes | bytearray) -> bool:
    """Whether the server's answer names a sum of the bytes, and it is theirs: CRC-32C, or MD5 as an ETag."""
    if (named := said.get("ChecksumCRC32C")) is not None:
        return sum_value(str(named)) == crc
    return str(said.get("ETag", "")).strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()
