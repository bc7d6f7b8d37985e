"""Verifies shards and data sets: every byte against the checksums, and every value against the type of its column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from tiercache._native.checksum import crc32c, crc32c_pages
from tiercache.errors import CorruptShard, NotFound, StoreError, UnsupportedFormat
from tiercache.model import ShardIdentity, ShardInfo
from tiercache.shard import codec
from tiercache.shard.blocks import Blocks, LoadedChunks
from tiercache.shard.codec import Bytes, address_of, align, aligned_empty
from tiercache.shard.footer import HEAD_BYTES, PAGE_BYTES, Footer, n_pages, parse_head
from tiercache.shard.schema import Kind
from tiercache.shard.source import ByteSource, check_identity, read_footer
from tiercache.shard.values import gather_values
from tiercache.shard.versions import ShardTable, Version, find_version, read_shards
from tiercache.store.contract import Store
from tiercache.store.remote import call_threads

_PIECE_BYTES = 8 << 20

# Returns a function, for use by one thread, that says why an image cannot be decoded; None if it can.
ImageChecker: TypeAlias = Callable[[], Callable[[bytes], str | None]]


@dataclass(frozen=True, slots=True)
class Finding:
    """Damage in a "head", "footer", "tail", "file" or "chunk" of a shard, or in an "image", "segment" or "version"."""

    url: str
    part: str
    message: str
    block: int | None = None
    column: str | None = None


def finding_of(error: CorruptShard, part: str = "") -> Finding:
    """Return an error as a finding. part: Damaged part, for an error that does not name it."""
    return Finding(error.url, error.part or part, error.reason, error.block, error.column)


def verify_shard(
    store: Store,
    key: str,
    info: ShardInfo | None = None,
    identity: ShardIdentity | None = None,
    images: ImageChecker | None = None,
) -> Iterator[Finding]:
    """Yield all damage of a shard: checksums of all bytes, values of all columns, and the identity, if given.

    images: Check of each image; None: images are not decoded.
    Reads each byte once, in large requests, and holds about a block in memory. Raises NotFound, StoreError and
    UnsupportedFormat.
    """
    source = ByteSource(store, key, identity)
    try:
        yield from _Verification(source, info, identity, images).findings()
    finally:
        source.close()


class _Verification:
    def __init__(
        self,
        source: ByteSource,
        info: ShardInfo | None,
        identity: ShardIdentity | None,
        images: ImageChecker | None,
    ) -> None:
        self._byte_source = source
        self._check_image = None if images is None else images()
        self._info = info
        self._identity = identity
        self._crc = self._position = self._file_bytes = 0
        self._ahead: Bytes = np.zeros(0, np.uint8)

    def findings(self) -> Iterator[Finding]:
        """Yield all damage in file order, but the footer first, because the other checks need it.

        The checksum of the whole file is a finding only if no other finding says where the damage is.
        """
        has_found = False
        for finding in self._places():
            has_found = True
            yield finding
        if self._file_bytes:
            yield from self._rest(knows_place=has_found)

    def _places(self) -> Iterator[Finding]:
        try:
            footer, tail = read_footer(self._byte_source, None)
            check_identity(footer, self._info, self._identity, self._byte_source.url)
        except CorruptShard as error:
            yield finding_of(error, "footer")
            return
        self._file_bytes = tail.file_bytes
        info = self._info
        if info is not None and (info.footer_offset, info.footer_bytes) != (tail.footer_offset, tail.footer_bytes):
            message = (
                f"its data set's row states 'footer_offset' {info.footer_offset} and 'footer_bytes' "
                f"{info.footer_bytes}, its tail {tail.footer_offset} and {tail.footer_bytes}"
            )
            yield Finding(self._byte_source.url, "segment", message)
        try:
            head = parse_head(self._read_to(HEAD_BYTES).tobytes(), self._byte_source.url)
            if head != footer.shard_id:
                yield Finding(self._byte_source.url, "head", "head and footer name different shards")
        except CorruptShard as error:
            yield finding_of(error, "head")
        n_columns = len(footer.schema)
        for chunk in np.argsort(footer.chunks["offset"].ravel(), kind="stable").tolist():
            yield from self._next_chunk(footer, *divmod(chunk, n_columns))

    def _read_to(self, end: int) -> Bytes:
        """Return the bytes since the previous call; they count for the file's checksum."""
        n_bytes = end - self._position
        if n_bytes > len(self._ahead):
            start = self._position + len(self._ahead)
            stop = max(end, min(start + _PIECE_BYTES, self._file_bytes))
            self._ahead = np.concatenate([self._ahead, np.frombuffer(self._byte_source.range(start, stop), np.uint8)])
        memory, self._ahead = self._ahead[:n_bytes], self._ahead[n_bytes:]
        self._crc = crc32c(memory.data, self._crc)
        self._position = end
        return memory

    def _next_chunk(self, footer: Footer, block: int, number: int) -> Iterator[Finding]:
        """Check the chunk of a block and a column, and the bytes before it and up to its aligned end."""
        row, start = footer.chunks[block, number], self._position
        offset, stored_bytes = int(row["offset"]), int(row["stored"])
        memory = self._read_to(align(offset + stored_bytes))
        first, end = offset - start, offset - start + stored_bytes
        try:
            array = self._chunk(footer, block, number, memory[first:end])
            if self._check_image is not None and footer.schema.columns[number].kind is Kind.IMAGE:
                yield from self._images(footer, block, number, array, self._check_image)
        except CorruptShard as error:
            name = footer.schema.columns[number].name
            yield replace(finding_of(error, "chunk"), block=block, column=name)
        yield from self._gap(footer, block, memory[:first])
        yield from self._gap(footer, block, memory[end:])

    def _gap(self, footer: Footer, block: int, between: Bytes) -> Iterator[Finding]:
        """Check that the bytes between chunks are zero. A later release with its own sections may use them."""
        if not footer.n_later_sections and between.any():
            yield Finding(self._byte_source.url, "chunk", "the bytes between chunks are not zeros", block)

    def _images(
        self, footer: Footer, block: int, number: int, array: pa.Array, check: Callable[[bytes], str | None]
    ) -> Iterator[Finding]:
        stored = array.storage if isinstance(array.type, pa.BaseExtensionType) else array
        for row, image in enumerate(stored):
            reason = check(image.as_py()) if image.is_valid else None
            if reason is not None:
                name = footer.schema.columns[number].name
                yield Finding(self._byte_source.url, "image", f"record {row} of the block: {reason}", block, name)

    def _chunk(self, footer: Footer, block: int, number: int, stored: Bytes) -> pa.Array:
        row = footer.chunks[block, number]
        sums = np.zeros(int(n_pages(row["raw"], row["codec"])), np.uint32)
        paged = row["codec"] == codec.RAW
        crc = crc32c_pages(address_of(stored), len(stored), PAGE_BYTES, sums) if paged else crc32c(stored.data)
        first_page = int(row["first_page"])
        if crc != row["crc"] or (sums != footer.pages[first_page : first_page + len(sums)]).any():
            raise CorruptShard("CRC-32C does not match", url=self._byte_source.url)
        raw = aligned_empty(int(row["raw"]))
        if row["codec"] == codec.RAW:
            raw[:] = stored
        else:
            try:
                codec.decompress_into(stored.data, raw.data)
            except codec.CodecError as error:
                raise CorruptShard(str(error), url=self._byte_source.url) from error
        loaded = LoadedChunks(np.array([address_of(raw)], np.uint64), [raw])
        blocks = Blocks(footer, self._byte_source.url, (block,), (number,), loaded)
        return check_values(blocks, number)

    def _rest(self, *, knows_place: bool) -> Iterator[Finding]:
        """Read footer and tail for the checksum of the file, and compare size and checksum with the data set's."""
        end = self._file_bytes
        while self._position < end:
            self._read_to(min(self._position + _PIECE_BYTES, end))
        for n_bytes, crc in {(one.n_bytes, one.crc32c) for one in (self._info, self._identity) if one is not None}:
            if n_bytes != end:
                yield Finding(self._byte_source.url, "file", f"has {end} bytes, its data set states {n_bytes}")
            if crc != self._crc and not knows_place:
                message = f"CRC-32C of the file is {self._crc:08x}, its data set states {crc:08x}"
                yield Finding(self._byte_source.url, "file", message)


def check_values(blocks: Blocks, number: int) -> pa.Array:
    """Return a column of the first of loaded blocks. Raise CorruptShard if it has values that are not of its type."""
    column = blocks.schema.columns[number]
    n = int(blocks.n_rows[0])
    array = blocks.array(0, number)  # checks the offsets
    if column.kind in (Kind.JSON, Kind.RAGGED):
        row = np.arange(n, dtype=np.uint32)
        # bfloat16 values would need torch; the shapes do not depend on the dtype.
        plain = replace(column, dtype="uint16") if column.dtype == "bfloat16" else column
        addresses = blocks.addresses[blocks.column_streams(number)]
        gather_values(plain, addresses, np.zeros(n, np.uint32), row, url=blocks.url)
    try:
        array.validate(full=True)
    except pa.ArrowException as error:
        raise CorruptShard(str(error), url=blocks.url, column=column.name) from error
    return array


@dataclass(frozen=True, slots=True)
class ShardCheck:
    """Damage of a shard, or the error because of which it could not be verified: of the store, or a later format."""

    info: ShardInfo
    findings: tuple[Finding, ...] = ()
    error: StoreError | UnsupportedFormat | None = None


def verify_dataset(store: Store, at: int | str | None = None, *, jobs: int = 4) -> Iterator[Finding]:
    """Yield all damage of a version (None: the newest), `jobs` shards in parallel. Raises as verify_shard()."""
    try:
        version, shards = open_whole(store, at)
    except CorruptShard as error:
        yield finding_of(error)
        return
    for check in check_shards(store, version, list(shards.infos()), jobs=jobs):
        if check.error is not None:
            raise check.error
        yield from check.findings


def open_whole(store: Store, at: int | str | None) -> tuple[Version, ShardTable]:
    """Return a version, by number or tag (None: the newest), and its shards. A missing segment is CorruptShard."""
    version = find_version(store, at)
    try:
        return version, read_shards(store, version)
    except NotFound as error:
        raise CorruptShard("it is missing", url=error.url, part="segment") from error


def check_shards(
    store: Store, version: Version, infos: Sequence[ShardInfo], *, jobs: int, images: ImageChecker | None = None
) -> Iterator[ShardCheck]:
    """Verify some shards, `jobs` in parallel, and yield each result as it comes; a closed generator starts no more."""
    with call_threads(jobs, "tiercache-verify") as pool:
        try:
            for future in as_completed([pool.submit(_check, store, version, info, images) for info in infos]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _check(store: Store, version: Version, info: ShardInfo, images: ImageChecker | None) -> ShardCheck:
    """Verify a shard. A missing shard is damage; a shard that cannot be read is an error."""
    try:
        identity = info.identity(version.dataset_id)
        return ShardCheck(info, tuple(verify_shard(store, info.name, info, identity, images)))
    except NotFound:
        return ShardCheck(info, (Finding(f"{store.url}/{info.name}", "file", "it is missing"),))
    except (StoreError, UnsupportedFormat) as error:
        return ShardCheck(info, error=error)
