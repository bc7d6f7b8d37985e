"""What it costs to keep copies, to move them, and to let go of them too early: dollars, by columns, from price tables.

Decimal GB, months of 30 days, as docs/reference/tiers.md has them. Prices differ by region and time, the formulas do
not; they are those of the providers' price pages (AWS: "Amazon S3 pricing", "Storage & requests" and its footnotes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tiercache.tier.pieces import PART_BYTES

if TYPE_CHECKING:
    from tiercache.prices import Prices
    from tiercache.tier.model import Snapshot

GB = 1e9
DAY_S = 86400.0
MONTH_DAYS = 30.0

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
    """What keeping them for a month costs: billed GB x store_gb_month."""
    return billed_bytes(prices, sizes) / GB * prices.store_gb_month


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

    leaves: they leave the provider's region. streams: through this machine, in parts, each of which is a GET and a PUT
    (AWS: every part of a multipart upload is a request); else the store copies each object by one request.
    """
    requests = sizes.n_objects + (sizes.n_bytes // PART_BYTES if streams else 0)
    per_gb = src.retrieve_gb + (src.egress_gb if leaves else 0.0)
    return requests * (src.get_1000 + dst.put_1000) / 1000 + sizes.n_bytes / GB * per_gb


def reclass_dollars(src: Prices, dst: Prices, sizes: Sizes) -> Dollars:
    """What changing their class in place costs: a transition an object, and retrieval: it is a copy within the store.

    AWS: a COPY is priced as a PUT into the class that it writes, and reads from the one it reads.
    """
    return sizes.n_objects * dst.transition_1000 / 1000 + sizes.n_bytes / GB * src.retrieve_gb


def break_even_days(once: Dollars, saving_month: Dollars) -> Dollars:
    """Days until what was paid once is earned back; inf: never."""
    days = np.full(len(once), np.inf)
    np.divide(once * MONTH_DAYS, saving_month, out=days, where=saving_month > 0)
    return days


def region_of(prices: Prices) -> str:
    """Provider and region of a name of the price table ("aws:us-east-1"); "" of any other name."""
    return prices.name.rpartition(":")[0]
