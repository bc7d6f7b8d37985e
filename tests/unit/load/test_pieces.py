"""Pieces of a rank: its batches one after the other, whatever the streams, windows, ranks and sizes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.mixture_oracle import Mixed, mixed_sequence, mixtures
from tests.support.order_oracle import (
    Ranks,
    Record,
    Shards,
    batches,
    options,
    records_of,
    sequence,
    shards,
    uniform,
)

from tiercache.load import pieces
from tiercache.load.pieces import RUN_PIECES, RUN_ROWS, Piece, PieceSizes, cut_pieces
from tiercache.order.epoch_order import EpochOrder
from tiercache.order.rank_plan import RankPlan
from tiercache.order.window import BlockSizes, DatasetSizes, OrderOptions, Window

# Each takes some 8 ms; `make fuzz` draws 5,000 of every kind.
IS_FUZZ = settings.default.max_examples > 100
MANY, SOME = (settings.default.max_examples if IS_FUZZ else n for n in (200, 25))


@dataclass(frozen=True)
class Case:
    """An epoch, its ranks, and the sizes of pieces."""

    data: Shards
    how: OrderOptions
    epoch: int
    ranks: Ranks
    sizes: PieceSizes

    @cached_property
    def order(self) -> EpochOrder:
        return EpochOrder(self.data.dataset_sizes, self.how, self.epoch)

    def plans(self, offset: int) -> list[RankPlan]:
        ranks, n_streams = self.ranks, self.how.streams if self.how.shuffle else 1
        shared = (ranks.batch_size, ranks.drop_last, self.data.n_records, n_streams)
        return [RankPlan(offset, ranks.world_size, rank, *shared) for rank in range(ranks.world_size)]


@st.composite
def ranks(draw: st.DrawFn) -> Ranks:
    return Ranks(draw(st.integers(1, 7)), draw(st.integers(1, 12)), draw(st.booleans()))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    first, most = draw(st.sampled_from([1, 3, 20, 1 << 13])), draw(st.sampled_from([1, 7, 100, 1 << 20]))
    sizes = PieceSizes(first, most, most * draw(st.sampled_from([1, 4, 50])))
    return Case(draw(shards(max_shards=6)), draw(options()), draw(st.integers(0, 3)), draw(ranks()), sizes)


def served(case: Case, plan: RankPlan) -> tuple[list[list[Record]], list[Piece]]:
    """The rank's batches, cut from its pieces one after the other; and the pieces."""
    every = list(cut_pieces(case.order, plan, case.sizes))
    rows = [record for piece in every for record in records_of(piece.windows, *piece.rows())]
    size = case.ranks.batch_size
    found = [rows[i : i + size] for i in range(0, len(rows), size)]
    return found, every


@settings(max_examples=MANY)
@given(cases(), st.data())
def test_any_number_of_ranks_resumes_the_global_sequence_anywhere(case: Case, data: st.DataObject) -> None:
    whole = sequence(case.data, case.how, case.epoch)
    assert sorted(whole) == case.data.all_records()
    n_streams = case.how.streams if case.how.shuffle else 1
    offset = 0
    for other in (case.ranks, data.draw(ranks())):  # a run that stops, and another that goes on with what is left
        case = replace(case, ranks=other)
        plans = case.plans(offset)
        n_taken = data.draw(st.integers(0, plans[0].n_batches))
        expected = batches(other, n_streams, offset, len(whole))
        for plan, own in zip(plans, expected, strict=True):
            found, _ = served(case, plan)
            assert len(found) == plan.n_batches == plans[0].n_batches  # of all ranks
            padding = [[whole[p] for p in plan.positions(plan.n_full).tolist()]] if plan.n_padding else []
            assert found == [[whole[p] for p in batch] for batch in own if batch] + padding
            assert sum(map(len, padding)) == plan.n_padding
        offset = plans[0].offset_after(n_taken)


@settings(max_examples=SOME)
@given(cases(), st.data())
def test_windows_that_come_from_a_store_are_served_in_parts_with_the_same_rows(case: Case, data: st.DataObject) -> None:
    case = replace(case, how=replace(case.how, shuffle=False))
    plan = data.draw(st.sampled_from(case.plans(data.draw(st.integers(0, case.data.n_records)))))
    _, whole = served(case, plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "FIRST_PART_BYTES", data.draw(st.sampled_from([1, 100, 1000])))
        parts = list(cut_pieces(case.order, plan, case.sizes, lambda _: False))
    rows = [[record for one in found for record in records_of(one.windows, *one.rows())] for found in (whole, parts)]
    assert rows[0] == rows[1]
    assert len(parts) >= len(whole)
    for one in parts:
        assert all(needed[block] for needed in one.needed for block in one.rows()[0].tolist())
        assert one.windows[0].raw_bytes == int(one.windows[0].block_bytes.sum())


@settings(max_examples=SOME)
@given(cases(), st.data())
def test_pieces_end_where_windows_do_and_name_what_they_need(case: Case, data: st.DataObject) -> None:
    plan = data.draw(st.sampled_from(case.plans(data.draw(st.integers(0, case.data.n_records)))))
    _, every = served(case, plan)
    for piece in every:
        block, row = piece.rows()
        assert len(block) == len(row) == piece.n_rows > 0
        assert piece.rows()[0] is block
        longest = case.sizes.most if piece.run is None else case.sizes.run
        assert piece.n_rows <= max(case.sizes.first, longest)
        streams = [window.stream for window in piece.windows]
        assert streams == sorted(set(streams))  # one window of each stream at a time
        own_blocks = touched(piece)
        assert sum(int(blocks.sum()) for blocks in own_blocks) == len(set(block.tolist()))
        for window, needed, own in zip(piece.windows, piece.needed, own_blocks, strict=True):
            assert len(needed) == len(own) == len(window.blocks)
            assert (needed | ~own).all()
            with_it = [i for i, other in enumerate(every) if any(w is window for w in other.windows)]
            if not plan.n_padding:
                assert with_it == list(range(with_it[0], with_it[-1] + 1))  # until it is served, without a gap
                assert touched(every[with_it[0]])[_place(every[with_it[0]], window)].any()  # and not before
    assert sum(piece.n_rows for piece in every) == plan.n_served


@settings(max_examples=SOME)
@given(cases(), st.data())
def test_a_run_has_the_rows_of_its_piece(case: Case, data: st.DataObject) -> None:
    plan = data.draw(st.sampled_from(case.plans(data.draw(st.integers(0, case.data.n_records)))))
    _, every = served(case, plan)
    for piece in every:
        if piece.run is not None:
            block, row = piece.rows()
            lo = data.draw(st.integers(0, piece.n_rows))
            hi = data.draw(st.integers(lo, piece.n_rows))
            found = piece.run.find(lo, hi)
            assert [part.tolist() for part in found] == [block[lo:hi].tolist(), row[lo:hi].tolist()]
    if len(plan.streams) == 1 and not plan.n_padding and plan.range_between(0, plan.n_served) is not None:
        assert all(piece.run is not None for piece in every)


def touched(piece: Piece) -> list[np.ndarray]:
    """bool[n_blocks] for each window: the blocks that the piece's own rows lie in."""
    found = np.zeros(sum(len(window.blocks) for window in piece.windows), np.bool_)
    found[piece.rows()[0]] = True
    return np.split(found, np.cumsum([len(window.blocks) for window in piece.windows])[:-1])


def _place(piece: Piece, window: object) -> int:
    return next(i for i, other in enumerate(piece.windows) if other is window)


@given(cases(), st.data())
def test_a_rank_with_few_rows_of_a_window_needs_only_their_blocks(case: Case, data: st.DataObject) -> None:
    plan = data.draw(st.sampled_from(case.plans(data.draw(st.integers(0, case.data.n_records)))))
    _, every = served(case, plan)
    all_touched: dict[int, np.ndarray] = {}
    for piece in every:
        for window, own in zip(piece.windows, touched(piece), strict=True):
            all_touched[id(window)] = all_touched.get(id(window), np.zeros(len(own), bool)) | own
    for piece in every[: len(every) - plan.n_padding]:
        for window, needed in zip(piece.windows, piece.needed, strict=True):
            if window.stop - window.start <= len(window.blocks):
                assert needed.tolist() == all_touched[id(window)].tolist()


def mixed_pieces(data: Mixed, epoch: int, plan: RankPlan, sizes: PieceSizes) -> list[Piece]:
    return list(cut_pieces(data.order(epoch), plan, sizes))


@settings(max_examples=SOME)
@given(mixtures(), st.integers(0, 3), ranks(), st.sampled_from([PieceSizes(3, 7, 20), PieceSizes()]), st.data())
def test_ranks_serve_the_sequence_of_a_mixture(
    data: Mixed, epoch: int, how: Ranks, sizes: PieceSizes, draw: st.DataObject
) -> None:
    whole = mixed_sequence(data, epoch)
    offset = draw.draw(st.integers(0, len(whole)))
    expected = batches(how, data.n_streams, offset, len(whole))
    for rank, own in enumerate(expected):
        plan = RankPlan(offset, how.world_size, rank, how.batch_size, how.drop_last, len(whole), data.n_streams)
        every = mixed_pieces(data, epoch, plan, sizes)
        rows = [record for piece in every for record in records_of(piece.windows, *piece.rows())]
        assert rows[: plan.n_served - plan.n_padding] == [whole[p] for batch in own for p in batch]
        assert len(rows) == plan.n_served
        asked: dict[Window, np.ndarray] = {}
        for piece in every[: len(every) - plan.n_padding]:
            assert len(set(piece.windows)) == len(piece.windows)  # each once, also where streams share it
            for window, needed, own in zip(piece.windows, piece.needed, touched(piece), strict=True):
                assert not (own & ~needed).any()
                assert not (needed & ~asked.setdefault(window, needed)).any()  # never more than was asked for at first


def touches(data: Shards, how: OrderOptions, ranks: Ranks) -> list[set[tuple[int, int]]]:
    """The blocks that each rank reads."""
    case = Case(data, how, 0, ranks, PieceSizes(64, 256, 512))
    found = []
    for plan in case.plans(0):
        _, every = served(case, plan)
        found.append(
            {
                (int(window.shards[i]), int(window.blocks[i]))
                for piece in every
                for window, needed in zip(piece.windows, piece.needed, strict=True)
                for i in np.flatnonzero(needed)
            }
        )
    return found


@given(shards(), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**64))
def test_ranks_with_streams_of_their_own_read_each_block_once_save_where_a_cut_falls(
    data: Shards, world_size: int, streams_each: int, seed: int
) -> None:
    how = OrderOptions(seed, True, 400, 150, world_size * streams_each)
    ranks = Ranks(world_size, 2 * streams_each, drop_last=True)
    read = touches(data, how, ranks)
    assert sum(map(len, read)) - len(set().union(*read)) <= world_size - 1


def test_blocks_before_the_position_are_not_needed_of_an_unshuffled_window() -> None:
    data = uniform(2, 10, 100, 10)
    order = EpochOrder(data.dataset_sizes, OrderOptions(1, False, None, None), 0)
    first = next(cut_pieces(order, RankPlan(750, 1, 0, 50, False, 2000), PieceSizes(10)))
    assert [needed.tolist() for needed in first.needed] == [[False] * 7 + [True] * 13]


def test_pieces_grow_from_a_small_first_one() -> None:
    footer = BlockSizes(np.full(10, 10**6), np.full(10, 1 << 20))
    dataset_sizes = DatasetSizes(np.full(100, 10**7), np.full(100, 10 << 20), lambda shards: [footer] * len(shards))
    order = EpochOrder(dataset_sizes, OrderOptions(1, True, None, None, streams=4), 0)
    plan = RankPlan(0, 2, 1, 256, True, order.n_records, order.n_streams)
    found = list(itertools.islice(cut_pieces(order, plan), 6))
    assert [piece.n_rows for piece in found] == [1 << 15, 1 << 17, *[1 << 18] * 4]
    assert [window.stream for window in found[-1].windows] == [2, 3]
    alone = RankPlan(0, 4, 0, 256, True, order.n_records, order.n_streams)  # a stream of its own: a run, and longer
    assert [piece.n_rows for piece in itertools.islice(cut_pieces(order, alone, RUN_PIECES), 4)][-1] == RUN_ROWS
