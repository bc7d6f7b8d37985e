"""Reading order of an epoch, as pure functions: keyed permutations, streams, shard groups, windows, mixtures and ranks.

An order maps a position of the epoch to a record; a `RankPlan` maps a batch of a rank to positions. No module here
knows torch or does I/O, except through `DatasetSizes.blocks`, the caller's function that reads footers.
"""

from tiercache.order.epoch_order import EpochOrder, derive_key
from tiercache.order.explicit import AnyWindow
from tiercache.order.mixture import MixtureOrder, MixtureSpec, StoredMixture
from tiercache.order.rank_plan import RankPlan
from tiercache.order.window import MAX_STREAMS, BlockSizes, DatasetSizes, Order, OrderOptions, RowRun, Section, Window

__all__ = [
    "MAX_STREAMS",
    "AnyWindow",
    "BlockSizes",
    "DatasetSizes",
    "EpochOrder",
    "MixtureOrder",
    "MixtureSpec",
    "Order",
    "OrderOptions",
    "RankPlan",
    "RowRun",
    "Section",
    "StoredMixture",
    "Window",
    "derive_key",
]
