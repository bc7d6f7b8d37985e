"""What it costs to keep copies, to move them, and to let go of them too early: dollars, by columns, from price tables.

GB of 2^30 bytes, months of 30 days, as docs/reference/tiers.md has them. Prices differ by region and time, the formulas
do not; they are those of the providers' price pages (AWS: "Amazon S3 pricing", "Storage & requests" and its footnotes;
the example in "Amazon S3 FAQs", Billing, divides byte-hours by 1,073,741,824).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tiercache.prices import GB, Prices, RestorePrice
from tiercache.tier.pieces import PART_BYTES

if TYPE_CHECKING:
    from tiercache.tier.model import Snapshot

DAY_S = 86400.0
MONTH_DAYS = 30.0
PROMOTION_DAYS = 3
"""How long a restored copy stays that is to be copied home: time for the copy to be made, and made again."""

Dollars = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """Of some copies: int64[n] each. smallest_bytes: of its smallest object."""

    n_objects: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    smallest_bytes: NDArray[np.int64]

    @classmethod
    def of(cls, snapshot: Snapshot, copies: NDArray[np.int64]) -> Sizes:
        """Those of copies, by their numbers."""
        return cls(
            snapshot.n_objects[copies].astype(np.int64), snapshot.n_bytes[copies], snapshot.smallest_bytes[copies]
        )


def billed_bytes(prices: Prices, sizes: Sizes) -> NDArray[np.int64]:
    """Bytes that are paid for: each object counts min_bytes at least, and overhead_bytes stand beside each.

    Exact for copies of one object. Of several only the sum and the smallest are known: then it is what they cost at
    least, the larger of (all at min_bytes) and (the smallest raised to it, the others as they are).
    """
    raised = sizes.n_bytes + np.maximum(prices.min_bytes - sizes.smallest_bytes, 0)
    return np.maximum(raised, sizes.n_objects * prices.min_bytes) + sizes.n_objects * prices.overhead_bytes


def month_dollars(prices: Prices, sizes: Sizes) -> Dollars:
    """What keeping them for a month costs: billed GB x store_gb_month, and the bytes that are billed as standard.

    AWS ("Amazon S3 pricing", footnote on S3 Glacier Flexible Retrieval and Deep Archive): for each archived object 32
    KB are charged at the rate of its class, and 8 KB, its name and other metadata, at the rate of S3 Standard.
    """
    standard = sizes.n_objects * prices.standard_overhead_bytes / GB * prices.temporary_gb_month
    return billed_bytes(prices, sizes) / GB * prices.store_gb_month + standard


def early_days(prices: Prices, age_s: NDArray[np.float64]) -> Dollars:
    """Days of the class's minimum that copies of this age have not lain yet."""
    return np.maximum(prices.min_days - np.maximum(age_s, 0.0) / DAY_S, 0.0)


def early_dollars(prices: Prices, sizes: Sizes, age_s: NDArray[np.float64]) -> Dollars:
    """The early-deletion fee: storage for what is left of min_days, pro rata.

    AWS: "objects that are deleted, overwritten or transitioned before the minimum are charged a pro-rated fee equal to
    the storage charge for the remaining days".
    """
    return month_dollars(prices, sizes) * early_days(prices, age_s) / MONTH_DAYS


def copy_dollars(src: Prices, dst: Prices, sizes: Sizes, *, leaves: bool, streams: bool) -> Dollars:
    """What reading them from src and writing them to dst costs: requests, retrieval, egress.

    leaves: they leave the provider's region. streams: through this machine, in parts, each of which is a GET and a PUT,
    and begun and completed by a request each where there are several; else the store copies each object by one request.

    AWS ("Amazon S3 User Guide", "Multipart upload and pricing"): of an upload into S3 Glacier Flexible Retrieval or
    Deep Archive, CreateMultipartUpload and UploadPart are billed at the rates of S3 Standard, and only
    CompleteMultipartUpload at that of the class. Of copies of several objects the number of parts is the most that
    there can be.
    """
    per_gb = src.retrieve_gb + (src.egress_gb if leaves else 0.0)
    return _requests_dollars(src, dst, sizes, streams=streams) + sizes.n_bytes / GB * per_gb


def _requests_dollars(src: Prices, dst: Prices, sizes: Sizes, *, streams: bool) -> Dollars:
    if not streams:
        return sizes.n_objects * (src.get_1000 + dst.put_1000) / 1000
    n_more = np.maximum(sizes.n_bytes - 1, 0) // PART_BYTES  # parts beyond the first of each object
    n_large = np.minimum(sizes.n_objects, n_more)  # objects of several parts
    n_begun = np.where(n_large > 0, n_more + 2 * n_large, 0)  # begins, and parts, of these
    reads = (sizes.n_objects + n_more) * src.get_1000
    return np.asarray((reads + sizes.n_objects * dst.put_1000 + n_begun * dst.part_1000) / 1000, np.float64)


def restore_dollars(archive: Prices, speed: RestorePrice, n_bytes: NDArray[np.int64], days: float) -> Dollars:
    """What having each object back for some days costs: its retrieval, and a temporary copy in the standard class.

    AWS ("Restoring an archived object"): the retrieval makes a temporary copy in S3 Standard and leaves the archived
    object; both are paid for.
    """
    per_gb = speed.gb + archive.temporary_gb_month * days / MONTH_DAYS
    return n_bytes / GB * per_gb + speed.per_1000 / 1000


def reclass_dollars(src: Prices, dst: Prices, sizes: Sizes) -> Dollars:
    """What changing their class in place costs: a transition an object, and retrieval: it is a copy within the store.

    AWS: a COPY is priced as a PUT into the class that it writes, and reads from the one it reads.
    """
    return sizes.n_objects * dst.transition_1000 / 1000 + sizes.n_bytes / GB * src.retrieve_gb


def restored_home_dollars(
    archive: Prices, speed: RestorePrice, home: Prices, n_bytes: NDArray[np.int64], *, urls: tuple[str, str]
) -> Dollars:
    """What copying each archived object home costs: its restore for PROMOTION_DAYS, and the copy or change of class.

    urls: of the archive and of home. Where they are equal, only the class is changed.
    """
    sizes = Sizes(np.ones_like(n_bytes), n_bytes, n_bytes)
    dollars = restore_dollars(archive, speed, n_bytes, PROMOTION_DAYS)
    if urls[0].rstrip("/") == urls[1].rstrip("/"):
        return dollars + reclass_dollars(archive, home, sizes)
    leaves, streams = leaves_and_streams(*urls, archive, home)
    return dollars + copy_dollars(archive, home, sizes, leaves=leaves, streams=streams)


def leaves_and_streams(src_url: str, dst_url: str, src: Prices | None, dst: Prices | None) -> tuple[bool, bool]:
    """Of a copy between two tiers: whether it leaves the provider's region, and whether it passes through this machine.

    Where prices name no region, a copy leaves it unless both tiers are in one bucket. A local disk is outside every
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
    """Days until what was paid once is earned back; inf: never; 0 where nothing is paid and nothing lost."""
    days = np.full(len(once), np.inf)
    np.divide(once * MONTH_DAYS, saving_month, out=days, where=saving_month > 0)
    days[(once <= 0) & (saving_month == 0)] = 0.0
    return days


def region_of(prices: Prices) -> str:
    """Provider and region of a name of the price table ("aws:us-east-1"); "" of any other name."""
    return prices.name.rpartition(":")[0]
