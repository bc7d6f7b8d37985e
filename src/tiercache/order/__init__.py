"""The reading order as a function: keyed permutations, streams, groups, windows and ranks; pure, no torch, no I/O."""

from tiercache.order.contract import Order, Stretch
from tiercache.order.epoch import EpochOrder
from tiercache.order.keys import derive_key
from tiercache.order.mixture import MixtureOrder, MixtureSpec, StoredMixture
from tiercache.order.options import MAX_STREAMS, BlockTable, Layout, OrderOptions
from tiercache.order.ranks import RankPlan
from tiercache.order.window import RowRun, Window

__all__ = [
    "MAX_STREAMS",
    "BlockTable",
    "EpochOrder",
    "Layout",
    "MixtureOrder",
    "MixtureSpec",
    "Order",
    "OrderOptions",
    "RankPlan",
    "RowRun",
    "StoredMixture",
    "Stretch",
    "Window",
    "derive_key",
]
