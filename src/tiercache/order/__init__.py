"""The reading order as a function: keyed permutations, groups, windows and ranks; pure, no torch, no I/O."""

from tiercache.order.epoch import EpochOrder
from tiercache.order.keys import derive_key
from tiercache.order.options import BlockTable, Layout, OrderOptions
from tiercache.order.ranks import RankPlan
from tiercache.order.window import Window

__all__ = ["BlockTable", "EpochOrder", "Layout", "OrderOptions", "RankPlan", "Window", "derive_key"]
