"""Finds a shard's footer in as few requests as can be, and sees that it is the right shard's."""

from __future__ import annotations

from tiercache.errors import CorruptShard
from tiercache.model import ByteRange, ShardIdentity, ShardInfo
from tiercache.shard.layout import TAIL_BYTES, Footer, Tail
from tiercache.shard.source import Source
from tiercache.store.contract import Store

# Without a manifest the footer's length is not known: this much of the end holds nearly every footer, for one request.
TAIL_GUESS_BYTES = 64 << 10


def read_footer(source: Source, info: ShardInfo | None) -> tuple[Footer, Tail]:
    """A shard's footer and tail: one ranged read when info is given, two at most otherwise.

    What came from a store and fails its checksum is fetched once more: it may have been damaged on the way. What came
    from a local copy is not: whoever has the copy drops it and opens the shard anew.

    Raises:
        CorruptShard, UnsupportedFormat: it is not a shard that this release reads.
    """
    try:
        return _read_footer(source, info)
    except CorruptShard:
        copy = source.copy
        if copy is not None and copy.lease.present([ByteRange(max(copy.n_bytes - TAIL_BYTES, 0), copy.n_bytes)]):
            raise
    return _read_footer(source, info)


def _read_footer(source: Source, info: ShardInfo | None) -> tuple[Footer, Tail]:
    if info is None:
        data, n_bytes = source.tail(TAIL_GUESS_BYTES)
    else:
        _check_row(source, info)
        data, n_bytes = source.range(info.footer_offset, info.n_bytes), info.n_bytes
    tail = Tail.parse(data[-TAIL_BYTES:], n_bytes, source.url)
    if info is not None and tail.footer_offset != info.footer_offset:
        message = "its tail and its data set disagree on where the footer is"
        raise CorruptShard(message, url=source.url, part="tail")
    have = n_bytes - len(data)
    if tail.footer_offset < have:
        data = source.range(tail.footer_offset, have) + data
        have = tail.footer_offset
    start = tail.footer_offset - have
    return Footer.parse(memoryview(data)[start : start + tail.footer_bytes], tail, source.url), tail


def read_footer_alone(store: Store, key: str, info: ShardInfo) -> Footer:
    """The footer of a shard that is not to be read yet, by one ranged request past any local copy.

    Raises:
        NotFound, StoreError: the store.
        CorruptShard, UnsupportedFormat: it is not the shard that info says.
    """
    source = Source(store, key, None)
    try:
        footer, _ = read_footer(source, info)
    finally:
        source.close()
    check_identity(footer, info, None, source.url)
    return footer


def _check_row(source: Source, info: ShardInfo) -> None:
    copy = source.copy
    if copy is not None and copy.n_bytes != info.n_bytes:
        message = f"has {copy.n_bytes} bytes, its data set says {info.n_bytes}"
        raise CorruptShard(message, url=source.url, part="file")
    end = info.footer_offset + info.footer_bytes + TAIL_BYTES
    if info.footer_offset < 0 or info.footer_bytes < 0 or end != info.n_bytes:
        raise CorruptShard("its data set's row for it contradicts itself", url=source.url, part="segment")


def check_identity(footer: Footer, info: ShardInfo | None, identity: ShardIdentity | None, url: str) -> None:
    """See that a footer is the one of the shard that the data set means.

    Raises:
        CorruptShard: it is another shard, or has another number of records.
    """
    shard_id = footer.shard_id.hex()
    for named in (info, identity):
        if named is not None and named.shard_id != shard_id:
            message = f"is shard {shard_id}, not {named.shard_id} as its data set says"
            raise CorruptShard(message, url=url, part="footer")
    if info is not None and info.n_records != footer.n_records:
        message = f"has {footer.n_records} records, its data set says {info.n_records}"
        raise CorruptShard(message, url=url, part="footer")
