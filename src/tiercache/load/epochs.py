"""The order of a state's epoch, and a rank's share of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from tiercache.load.damage import CorruptionMap
from tiercache.load.plan import ARRAY_PIECES, RUN_PIECES
from tiercache.load.share import OrderShare
from tiercache.order import EpochOrder, Layout, OrderOptions, RankPlan
from tiercache.order.explicit import ExplicitOrder
from tiercache.order.mixture import MixtureOrder

if TYPE_CHECKING:
    from tiercache.load.ranks import Rank
    from tiercache.load.source import Source
    from tiercache.load.state import RunState
    from tiercache.order import Order


def plan_epoch(
    read: Source | CorruptionMap, rank: Rank, batch_size: int, fills_first: bool, state: RunState
) -> OrderShare:
    """Return the rank's share of the state's epoch. Costs O(shards); reads no data.

    read: the source, or its corrupt records if they are replaced; fills_first: see `RankPlan`.

    Raises:
        ValueError: The state's offset is outside the epoch, or this release does not know its order.
    """
    order, damage = make_order(read, state), read if isinstance(read, CorruptionMap) else None
    source = read.source if isinstance(read, CorruptionMap) else read
    sizes = (
        RUN_PIECES if damage is None and source.selects_all else ARRAY_PIECES
    )  # otherwise the rows are needed as arrays
    ranks = RankPlan(
        offset=state.offset,
        world_size=rank.world_size,
        rank=rank.rank,
        batch_size=batch_size,
        drop_last=state.drop_last,
        n_records=order.n_records,
        n_streams=order.n_streams,
        fills_first=fills_first,
    )
    return OrderShare(order, ranks, state.seed, state.key_epoch, damage, sizes)


def make_order(read: Source | CorruptionMap, state: RunState) -> Order:
    """Return the order of the state's epoch."""
    source = read.source if isinstance(read, CorruptionMap) else read
    layout = Layout(source.shard_records, source.shard_bytes, read.block_tables)
    options = order_options(state)
    if source.mixture is not None:
        return MixtureOrder(layout, source.mixture, options, state.key_epoch)
    listed = source.record_order
    if listed is not None and not state.shuffle:
        # Its windows have the interface of Window; they store their rows, so no permutation is computed.
        return cast("Order", ExplicitOrder(layout, listed, state.window_bytes))
    return EpochOrder(layout, options, state.key_epoch)


def order_options(state: RunState) -> OrderOptions:
    """Return the state's options of the order. Raises ValueError for values that this release does not know."""
    return OrderOptions(
        seed=state.seed,
        shuffle=state.shuffle,
        group_bytes=state.group_bytes,
        window_bytes=state.window_bytes,
        streams=state.streams,
        placement=state.placement,
    )


def epoch_records(source: Source) -> int:
    """Return the number of records of an epoch, all ranks together."""
    mixture = source.mixture
    if mixture is not None:
        return int(mixture.epoch_records(mixture.part_records(source.shard_records)))
    return int(source.shard_records.sum())


def mixture_values(source: Source) -> dict[str, Any] | None:
    """Return the source's mixture as plain values for a state; None if the parts are not mixed."""
    mixture = source.mixture
    if mixture is None:
        return None
    # The state omits which shards belong to which part: that follows from the parts, and changes with their versions.
    return {"weights": list(mixture.weights), "stop": mixture.stop}
