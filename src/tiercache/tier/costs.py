"""Cost formulas in US dollars, by columns: storage, moves, restores and early-deletion fees, from price tables.

A GB is 2^30 bytes and a month is 30 days, as docs/reference/tiers.md states. The formulas are those of the providers'
price pages (AWS: "Amazon S3 pricing", "Storage & requests" and its footnotes; the example in "Amazon S3 FAQs", Billing,
divides byte-hours by 1,073,741,824); only the prices differ by region and time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tiercache.prices import GB, Prices, RestorePrice
from tiercache.tier.model import PART_BYTES

if TYPE_CHECKING:
    from tiercache.tier.model import Snapshot

DAY_S = 86400.0
MONTH_DAYS = 30.0
RESTORE_DAYS = 3
"""Lifetime in days of a restored copy that is copied home: long enough to repeat a failed copy."""

Dollars = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """Sizes of some copies; int64[n] each."""

    n_objects: NDArray[np.int64]  # number of objects
    n_bytes: NDArray[np.int64]  # total size
    smallest_bytes: NDArray[np.int64]  # size of the smallest object

    @classmethod
    def of(cls, snapshot: Snapshot, copies: NDArray[np.int64]) -> Sizes:
        """Return the sizes of the copies with these numbers."""
        return cls(
            snapshot.n_objects[copies].astype(np.int64), snapshot.n_bytes[copies], snapshot.smallest_bytes[copies]
        )


def billed_bytes(prices: Prices, sizes: Sizes) -> NDArray[np.int64]:
    """Return the billed bytes: each object counts at least min_bytes, plus overhead_bytes per object; int64[n].

    The result is exact for copies of one object. For several objects only the sum and the smallest size are known; the
    result is then a lower bound: the larger of (all objects at min_bytes) and (the smallest raised to min_bytes, the
    others unchanged).
    """
    raised = sizes.n_bytes + np.maximum(prices.min_bytes - sizes.smallest_bytes, 0)
    return np.maximum(raised, sizes.n_objects * prices.min_bytes) + sizes.n_objects * prices.overhead_bytes


def month_dollars(prices: Prices, sizes: Sizes) -> Dollars:
    """Return the storage cost per month: billed GB x store_gb_month, plus the overhead billed as standard storage.

    AWS ("Amazon S3 pricing", footnote on S3 Glacier Flexible Retrieval and Deep Archive): for each archived object 32
    KB are charged at the rate of its class, and 8 KB, its name and other metadata, at the rate of S3 Standard.
    """
    standard = sizes.n_objects * prices.standard_overhead_bytes / GB * prices.temporary_gb_month
    return billed_bytes(prices, sizes) / GB * prices.store_gb_month + standard


def early_days(prices: Prices, age_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the days that remain of the storage class's minimum duration for copies of this age."""
    return np.maximum(prices.min_days - np.maximum(age_s, 0.0) / DAY_S, 0.0)


def early_dollars(prices: Prices, sizes: Sizes, age_s: NDArray[np.float64]) -> Dollars:
    """Return the early-deletion fee: the storage cost of the remaining part of min_days.

    AWS: "objects that are deleted, overwritten or transitioned before the minimum are charged a pro-rated fee equal to
    the storage charge for the remaining days".
    """
    return month_dollars(prices, sizes) * early_days(prices, age_s) / MONTH_DAYS


def copy_dollars(src: Prices, dst: Prices, sizes: Sizes, *, leaves: bool, streams: bool) -> Dollars:
    """Return the cost to read copies from src and to write them to dst: requests, retrieval and egress.

    AWS ("Amazon S3 User Guide", "Multipart upload and pricing"): of an upload into S3 Glacier Flexible Retrieval or
    Deep Archive, CreateMultipartUpload and UploadPart are billed at the rates of S3 Standard, and only
    CompleteMultipartUpload at the rate of the class. For copies of several objects the number of parts is an upper
    bound.

    leaves: Whether the bytes leave the provider's region. streams: Whether they pass through this machine; then each
    part costs a GET and a PUT, and otherwise the store copies each object by one request.
    """
    per_gb = src.retrieve_gb + (src.egress_gb if leaves else 0.0)
    return _requests_dollars(src, dst, sizes, streams=streams) + sizes.n_bytes / GB * per_gb


def _requests_dollars(src: Prices, dst: Prices, sizes: Sizes, *, streams: bool) -> Dollars:
    if not streams:
        return sizes.n_objects * (src.get_1000 + dst.put_1000) / 1000
    n_more = np.maximum(sizes.n_bytes - 1, 0) // PART_BYTES  # parts beyond the first of each object
    n_large = np.minimum(sizes.n_objects, n_more)  # objects of several parts
    n_begun = np.where(n_large > 0, n_more + 2 * n_large, 0)  # requests that begin uploads or upload parts
    reads = (sizes.n_objects + n_more) * src.get_1000
    return np.asarray((reads + sizes.n_objects * dst.put_1000 + n_begun * dst.part_1000) / 1000, np.float64)


def restore_dollars(archive: Prices, speed: RestorePrice, n_bytes: NDArray[np.int64], days: float) -> Dollars:
    """Return the cost to restore each object for some days: the retrieval, and a temporary copy in the standard class.

    AWS ("Restoring an archived object"): the retrieval makes a temporary copy in S3 Standard and leaves the archived
    object; both are billed.
    """
    per_gb = speed.gb + archive.temporary_gb_month * days / MONTH_DAYS
    return n_bytes / GB * per_gb + speed.per_1000 / 1000


def reclass_dollars(src: Prices, dst: Prices, sizes: Sizes) -> Dollars:
    """Return the cost to change the storage class in place: one transition per object, and the retrieval.

    AWS bills a COPY as a PUT into the class that it writes, plus the retrieval from the class that it reads.
    """
    return sizes.n_objects * dst.transition_1000 / 1000 + sizes.n_bytes / GB * src.retrieve_gb


def restored_home_dollars(
    archive: Prices, speed: RestorePrice, home: Prices, n_bytes: NDArray[np.int64], *, urls: tuple[str, str]
) -> Dollars:
    """Return the cost to copy each archived object home.

    The cost includes a restore for RESTORE_DAYS, and the copy or the change of class.

    urls: URLs of the archive tier and of the home tier. If they are equal, only the storage class changes.
    """
    sizes = Sizes(np.ones_like(n_bytes), n_bytes, n_bytes)
    dollars = restore_dollars(archive, speed, n_bytes, RESTORE_DAYS)
    if urls[0].rstrip("/") == urls[1].rstrip("/"):
        return dollars + reclass_dollars(archive, home, sizes)
    leaves, streams = leaves_and_streams(*urls, archive, home)
    return dollars + copy_dollars(archive, home, sizes, leaves=leaves, streams=streams)


def leaves_and_streams(src_url: str, dst_url: str, src: Prices | None, dst: Prices | None) -> tuple[bool, bool]:
    """Return whether copies between two tiers leave the provider's region, and whether they pass through this machine.

    If the prices name no region, a copy leaves it unless both tiers are in one bucket. A local disk is outside every
    region. Only S3 copies objects itself.
    """
    if src is None or dst is None:
        leaves = True
    elif region := region_of(src):
        leaves = region != region_of(dst)
    else:
        leaves = _bucket(src_url) != _bucket(dst_url)
    return leaves, leaves or not (_is_s3(src_url) and _is_s3(dst_url))


def _is_s3(url: str) -> bool:
    return url.lower().startswith("s3://")


def _bucket(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def break_even_days(once: Dollars, saving_month: Dollars) -> Dollars:
    """Return the days until the one-time cost is earned back; inf: never; 0 where nothing is paid and nothing lost."""
    days = np.full(len(once), np.inf)
    np.divide(once * MONTH_DAYS, saving_month, out=days, where=saving_month > 0)
    days[(once <= 0) & (saving_month == 0)] = 0.0
    return days


def region_of(prices: Prices) -> str:
    """Return provider and region of a name in the price table ("aws:us-east-1"); "" for any other name."""
    return prices.name.rpartition(":")[0]
