"""Reads the footer of a shard in as few requests as possible, and checks that it belongs to the expected shard."""

from __future__ import annotations

from tiercache.errors import CorruptShard
from tiercache.model import ByteRange, ShardIdentity, ShardInfo
from tiercache.shard.layout import TAIL_BYTES, Footer, Tail
from tiercache.shard.source import ByteSource
from tiercache.store.contract import Store

# Without a data set's description of the shard, the length of the footer is unknown. This many bytes from the end
# contain nearly every footer, so one request is sufficient.
TAIL_GUESS_BYTES = 64 << 10


def read_footer(source: ByteSource, info: ShardInfo | None) -> tuple[Footer, Tail]:
    """Return footer and tail of a shard, with one ranged read if info is given, and at most two otherwise.

    If data from a store fails its checksum, it is fetched once more, because it may have been damaged in transit. Data
    of a local copy is not read again: the caller drops the copy and opens the shard again.

    Raises:
        CorruptShard, UnsupportedFormat: The object is not a shard that this release reads.
    """
    try:
        return _read_footer(source, info)
    except CorruptShard:
        copy = source.local_copy
        if copy is not None and copy.lease.present([ByteRange(max(copy.n_bytes - TAIL_BYTES, 0), copy.n_bytes)]):
            raise
    return _read_footer(source, info)


def _read_footer(source: ByteSource, info: ShardInfo | None) -> tuple[Footer, Tail]:
    if info is None:
        data, n_bytes = source.tail(TAIL_GUESS_BYTES)
    else:
        _check_row(source, info)
        data, n_bytes = source.range(info.footer_offset, info.n_bytes), info.n_bytes
    tail = Tail.parse(data[-TAIL_BYTES:], n_bytes, source.url)
    if info is not None and tail.footer_offset != info.footer_offset:
        message = "its tail and its data set state different positions of the footer"
        raise CorruptShard(message, url=source.url, part="tail")
    have = n_bytes - len(data)
    if tail.footer_offset < have:
        data = source.range(tail.footer_offset, have) + data
        have = tail.footer_offset
    start = tail.footer_offset - have
    return Footer.parse(memoryview(data)[start : start + tail.footer_bytes], tail, source.url), tail


def fetch_footer(store: Store, key: str, info: ShardInfo) -> Footer:
    """Return the footer of a shard that is read later, with one ranged request that bypasses any local copy.

    Raises:
        NotFound, StoreError: The store failed.
        CorruptShard, UnsupportedFormat: The object is not the shard that info describes.
    """
    source = ByteSource(store, key, None)
    try:
        footer, _ = read_footer(source, info)
    finally:
        source.close()
    check_identity(footer, info, None, source.url)
    return footer


def _check_row(source: ByteSource, info: ShardInfo) -> None:
    copy = source.local_copy
    if copy is not None and copy.n_bytes != info.n_bytes:
        message = f"has {copy.n_bytes} bytes, its data set states {info.n_bytes}"
        raise CorruptShard(message, url=source.url, part="file")
    end = info.footer_offset + info.footer_bytes + TAIL_BYTES
    if info.footer_offset < 0 or info.footer_bytes < 0 or end != info.n_bytes:
        raise CorruptShard("its data set's row states an inconsistent footer or size", url=source.url, part="segment")


def check_identity(footer: Footer, info: ShardInfo | None, identity: ShardIdentity | None, url: str) -> None:
    """Check that a footer belongs to the shard that the data set describes.

    Args:
        footer: Footer that was read.
        info: The data set's description of the shard, or None.
        identity: Identity under which the cache keeps the shard, or None.
        url: URL of the shard, for errors.

    Raises:
        CorruptShard: The footer belongs to another shard, or states another number of records.
    """
    shard_id = footer.shard_id.hex()
    for named in (info, identity):
        if named is not None and named.shard_id != shard_id:
            message = f"is shard {shard_id}, its data set states {named.shard_id}"
            raise CorruptShard(message, url=url, part="footer")
    if info is not None and info.n_records != footer.n_records:
        message = f"has {footer.n_records} records, its data set states {info.n_records}"
        raise CorruptShard(message, url=url, part="footer")
