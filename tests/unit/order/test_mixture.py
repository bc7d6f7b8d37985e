"""Mixtures: exact shares of each part wherever one looks, no record of a part twice in its own epoch, exact lengths."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Literal
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.mixture_oracle import Mixed, check_sequences, mixed_sequence, mixtures
from tests.support.order_oracle import read

from tiercache.order import mixture
from tiercache.order.mixture import (
    MixtureChange,
    MixtureOrder,
    MixtureSpec,
    StoredMixture,
    StreamAllocation,
    interleave,
)
from tiercache.order.window import BlockSizes, DatasetSizes, OrderOptions

RAW_BYTES = 10  # of a record, in the parts made here


@dataclass(frozen=True)
class Parts:
    """Parts as lists of shards as lists of the records of their blocks."""

    parts: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def shards(self) -> list[tuple[int, ...]]:
        return [shard for part in self.parts for shard in part]

    @property
    def dataset_sizes(self) -> DatasetSizes:
        records = np.array([sum(shard) for shard in self.shards], np.int64)
        return DatasetSizes(records, records * RAW_BYTES // 2, self._tables)

    def _tables(self, shards: list[int]) -> list[BlockSizes]:
        blocks = [np.array(self.shards[shard], np.int64) for shard in shards]
        return [BlockSizes(records, records * RAW_BYTES) for records in blocks]

    @property
    def sizes(self) -> list[int]:
        return [sum(map(sum, part)) for part in self.parts]

    def spec(self, weights: list, stop: Literal["first", "all"] = "first") -> MixtureSpec:
        first = np.cumsum([0, *(len(part) for part in self.parts[:-1])])
        return MixtureSpec(tuple(first.tolist()), tuple(weights), stop)

    def numbers(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(part, first record in the part) by shard and block."""
        found, shard = {}, 0
        for number, part in enumerate(self.parts):
            record = 0
            for blocks in part:
                for block, records in enumerate(blocks):
                    found[shard, block] = number, record
                    record += records
                shard += 1
        return found

    def stream(self, order: MixtureOrder, stream: int, position: int = 0) -> list[tuple[int, int]]:
        """(part, record in it) from a position of a stream to its end, by iteration."""
        numbers, found = self.numbers(), []
        while position < order.stream_records(stream):
            section = order.section_at(stream, position)
            assert section.start <= position < section.stop
            places = [
                numbers[int(shard), int(block)]
                for window in section.windows
                for shard, block in zip(window.shards, window.blocks, strict=True)
            ]
            for block, row in zip(*section.rows(position - section.start, section.stop - section.start), strict=True):
                part, first = places[block]
                found.append((part, first + int(row)))
            position = section.stop
        return found

    def epoch(self, spec: MixtureSpec, options: OrderOptions, epoch: int) -> list[tuple[int, int]]:
        """The global sequence of an epoch."""
        order = MixtureOrder(self.dataset_sizes, spec, options, epoch)
        streams = [self.stream(order, stream) for stream in range(order.n_streams)]
        return [streams[p % order.n_streams][p // order.n_streams] for p in range(order.n_records)]


def even(*sizes: int, shard: int = 40, block: int = 8) -> Parts:
    """Parts of so many records in shards and blocks of equal size but for the last."""

    def runs(n: int, size: int) -> list[int]:
        return [min(size, n - at) for at in range(0, n, size)]

    return Parts(tuple(tuple(tuple(runs(n, block)) for n in runs(size, shard)) for size in sizes))


def options(
    streams: int = 1, seed: int = 3, placement: Literal["sticky", "global"] = "sticky", shuffle: bool = True
) -> OrderOptions:
    return OrderOptions(seed, shuffle, 400, 300, streams, placement)


SHARDS = st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=5).map(tuple)
PARTS = st.lists(SHARDS.filter(lambda part: any(map(sum, part))), min_size=1, max_size=4).map(
    lambda parts: Parts(tuple(parts))
)
WEIGHTS = st.lists(st.integers(1, 12), min_size=4, max_size=4)
STOPS = st.sampled_from(["first", "all"])
OPTIONS = st.builds(
    OrderOptions,
    st.integers(0, 2**70),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 300)),
    st.one_of(st.none(), st.integers(1, 300)),
    st.integers(1, 5),
    st.sampled_from(["sticky", "global"]),
)


def test_weights_that_change_are_a_schedule_of_the_smallest_integers() -> None:
    spec = MixtureSpec((0, 1, 2), ((0, (0.7, 0.2, 0.1)), (10, (0, 5, 5)), (20, (0, 1, 1)), (np.int64(30), [1, 0, 0])))
    assert spec.weights == spec.schedule == ((0, (7, 2, 1)), (10, (0, 1, 1)), (30, (1, 0, 0)))
    assert MixtureSpec((0, 1, 2), spec.weights) == spec
    assert MixtureSpec((0, 1), (70, 30)).schedule == ((0, (7, 3)),)


def test_a_schedule_without_a_change_is_a_constant_mixture() -> None:
    constant = MixtureSpec((0, 1), (7, 3))
    assert MixtureSpec((0, 1), ((0, (0.7, 0.3)),)) == constant
    assert MixtureSpec((0, 1), ((0, (0.7, 0.3)), (50, (70, 30)))) == constant
    assert repr(MixtureSpec((0, 1), ((0, (0.7, 0.3)),))) == repr(constant)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (((1, (1, 1)),), ValueError, "from position 0 on, got position 1"),
        (((0, (1, 1)), (5, (1, 2)), (5, (2, 1))), ValueError, "must rise, got 5 after 5"),
        (((0, (1, 1)), (2.5, (1, 2))), ValueError, "integer of 0 or more, got 2.5"),
        (((0, (1, 1)), (True, (1, 2))), ValueError, "integer of 0 or more, got True"),
        (((0, (1, 1)), (-1, (1, 2))), ValueError, "integer of 0 or more, got -1"),
        (((0, (1, 1)), (5, (1,))), ValueError, "2 parts need one weight each, got 1 weights from position 5 on"),
        (((0, (1, 1)), (5, (0, 0))), ValueError, "all weights are 0 from position 5 on"),
        (((0, (1, 0)), (5, (2, 0))), ValueError, "part 1 has weight 0 throughout"),
        (((0, (1, 1)), (5, (1, -1))), ValueError, "a weight must be a number above 0, got -1"),
        (((0, (1, 1)), (5, (1, "1"))), TypeError, "a weight must be a number above 0, got '1'"),
        (((0, (1, 1)), 5), ValueError, r"a list of \(position, weights\), got the entry 5"),
    ],
)
def test_an_invalid_schedule_is_refused(weights: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MixtureSpec((0, 1), weights)


def test_a_weight_is_the_decimal_fraction_that_was_written() -> None:
    assert MixtureSpec((0, 1, 2), (0.7, 0.2, 0.1)).weights == (7, 2, 1)
    assert MixtureSpec((0, 1, 2), (70, 20, 10)).weights == (7, 2, 1)
    assert MixtureSpec((0, 1), (Fraction(1, 3), Fraction(2, 3))).weights == (1, 2)
    assert MixtureSpec((0, 1), (np.float32(0.1), np.int64(1))).weights == (1, 10)


def test_an_invalid_mixture_is_refused() -> None:
    for weight in (0, -1, 0.0, -0.5, math.inf, math.nan, Fraction(-1, 3)):
        with pytest.raises(ValueError, match="a weight must be a number above 0"):
            MixtureSpec((0, 1), (weight, 1))
    for other in (True, "1", None, 1j):
        with pytest.raises(TypeError, match="a weight must be a number above 0"):
            MixtureSpec((0, 1), (other, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'first' or 'all'"):
        MixtureSpec((0,), (1,), "last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 parts need one weight each, got 1"):
        MixtureSpec((0, 1), (1,))
    with pytest.raises(ValueError, match="rise from 0"):
        MixtureSpec((1, 2), (1, 1))
    data = Parts((((3, 3),), ((0,), ())))
    with pytest.raises(ValueError, match="part 1 of the mixture has no records"):
        MixtureOrder(data.dataset_sizes, data.spec([1, 1]), options(), 0)
    with pytest.raises(IndexError, match="record 8 of a mixture of 8 records"):
        StoredMixture(even(4, 4).spec([1, 1]), (4, 4)).locate(np.array([0, 8]))


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=6), st.data())
def test_an_epoch_has_the_right_length_for_any_sizes(sizes: list[int], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 10**6), min_size=len(sizes), max_size=len(sizes)))
    first = MixtureSpec(tuple(range(len(sizes))), tuple(weights), "first")
    total = sum(weights)
    n = first.epoch_records(sizes)
    assert all(got <= size for got, size in zip(first.epoch_shares(sizes), sizes, strict=True))
    assert any((n + 1) * weight > size * total for weight, size in zip(weights, sizes, strict=True))
    every = MixtureSpec(first.first_shards, first.weights, "all")
    n = every.epoch_records(sizes)
    assert all(got >= size for got, size in zip(every.epoch_shares(sizes), sizes, strict=True))
    assert any((n - 1) * weight < size * total for weight, size in zip(weights, sizes, strict=True))


@pytest.mark.parametrize(
    ("sizes", "schedule", "stop", "expected"),
    [
        ((100, 50), ((0, (1, 0)), (60, (0, 1))), "first", (60, 50)),  # part 0 alone, then part 1 alone
        ((30, 500), ((0, (1, 1)), (100, (1, 9))), "first", (30, 30)),  # it ends before the change
        ((30, 500), ((0, (1, 1)), (100, (1, 9))), "all", (100, 500)),  # 50 and 50, then 50 and 450
        ((100, 60), ((0, (1, 0)), (40, (1, 1))), "first", (100, 60)),
        ((100, 60), ((0, (1, 0)), (40, (1, 1))), "all", (100, 60)),
        (
            (400, 400),
            ((0, (9, 1)), (10, (1, 1)), (20, (1, 9))),
            "first",
            (58, 399),
        ),  # 6 + 393.3 of part 1, at the position before its end
    ],
)
def test_an_epoch_with_changing_weights_ends_as_one_with_constant_weights(
    sizes: tuple[int, ...], schedule: tuple, stop: Literal["first", "all"], expected: tuple[int, ...]
) -> None:
    spec = even(*sizes).spec(schedule, stop)
    assert spec.epoch_shares(sizes) == expected
    assert spec.epoch_records(sizes) == sum(expected)


def test_an_epoch_that_can_never_serve_all_of_a_part_is_an_error() -> None:
    spec = even(100, 50).spec(((0, (1, 1)), (60, (0, 1))), "all")
    with pytest.raises(ValueError, match="part 0 has weight 0 from position 60 on, where 70 of its records"):
        spec.epoch_records((100, 50))


SCHEDULES = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(0, 12), min_size=4, max_size=4)), min_size=1, max_size=4
)


def schedule_of(steps: list[tuple[int, list[int]]], n_parts: int) -> tuple:
    """A schedule for so many parts. Each has a weight at last, so that any epoch can end."""
    found, start = [], 0
    for n, weights in steps:
        if any(weights[:n_parts]):
            found.append((start, tuple(weights[:n_parts])))
            start += n
    return (*found, (start, tuple(weight or 1 for weight in steps[-1][1][:n_parts])))


@given(PARTS, SCHEDULES, STOPS, OPTIONS, st.integers(0, 2), st.sampled_from([1, 4, 1024]))
def test_an_epoch_with_changing_weights_serves_its_shares_and_is_the_same_from_any_position(
    parts: Parts, steps: list, stop: str, how: OrderOptions, epoch: int, own_stream: int
) -> None:
    spec = parts.spec(schedule_of(steps, len(parts.parts)), stop)
    shares = spec.epoch_shares(parts.sizes)
    excess = [share - size for share, size in zip(shares, parts.sizes, strict=True)]
    assert max(excess) <= 0 if stop == "first" else min(excess) >= 0
    with mock.patch.object(mixture, "OWN_STREAM_RECORDS", own_stream):
        sequence = parts.epoch(spec, how, epoch)
        assert len(sequence) == spec.epoch_records(parts.sizes)
        counts = Counter(part for part, _ in sequence)
        assert tuple(counts[part] for part in range(len(parts.parts))) == shares
        if epoch == 0:  # "first": no record is repeated; "all": every record is served
            assert len(set(sequence)) == (len(sequence) if stop == "first" else sum(parts.sizes))
        order = MixtureOrder(parts.dataset_sizes, spec, how, epoch)
        for stream in range(order.n_streams):
            whole = parts.stream(order, stream)
            for position in range(0, len(whole), max(1, len(whole) // 3)):
                again = MixtureOrder(parts.dataset_sizes, spec, how, epoch)
                assert parts.stream(again, stream, position) == whole[position:]


@given(mixtures(), st.integers(0, 4))
def test_an_epoch_equals_the_brute_force_reference(data: Mixed, epoch: int) -> None:
    assert read(data.order(epoch)) == mixed_sequence(data, epoch)


def changed_schedule(weights: tuple, offset: int, later: list[int], stop: str) -> tuple:
    """Weights up to an offset, and others from there on. With "all" each part has some, so that any epoch can end."""
    others = tuple(weight or int(stop == "all") for weight in later[: len(weights[0][1])])
    if not any(others):
        others = (1,) * len(others)
    before = [entry for entry in weights if entry[0] < offset]
    found = (*before, (offset, others))
    is_used = [any(entry[1][part] for entry in found) for part in range(len(others))]
    return found if all(is_used) else (*found, (offset + 7, tuple(int(not used) for used in is_used)))


CHANGES = st.lists(
    st.tuples(st.integers(0, 2), st.floats(0, 1), st.lists(st.integers(0, 12), min_size=4, max_size=4)),
    min_size=1,
    max_size=3,
)


@given(mixtures(), CHANGES)
def test_weights_that_change_at_a_resume_neither_repeat_nor_skip_a_record_of_any_part(
    data: Mixed, steps: list[tuple[int, float, list[int]]]
) -> None:
    data = replace(data, how=replace(data.how, placement="sticky"))
    schedule, changes, n_epochs = data.spec.schedule, (), 5
    before = [read(data.order(epoch)) for epoch in range(n_epochs)]
    place = 0, 0
    for epoch, share, later in sorted(steps, key=lambda step: step[:2]):
        offset = round(share * len(before[epoch]))
        if (epoch, offset) < place:
            continue
        place = epoch, offset
        changes = (*changes, MixtureChange(epoch, offset, schedule))
        schedule = changed_schedule(schedule, offset, later, data.stop)
        after = [read(data.order(number, schedule, changes)) for number in range(n_epochs)]
        assert after[:epoch] == before[:epoch]
        assert after[epoch][:offset] == before[epoch][:offset]
        before = after
        if epoch == 0 and data.stop == "first":
            assert len(set(after[0])) == len(after[0])
        elif epoch == 0:
            assert len(set(after[0])) == data.joined.n_records
        spec = replace(data.spec, weights=schedule)
        for part in range(len(data.parts)):  # the shares after the change
            exact, counted = Fraction(0), 0
            for position in range(offset, len(after[epoch])):
                weights = [w for start, w in spec.schedule if start <= position][-1]
                exact += Fraction(weights[part], sum(weights))
                counted += data.part_of(after[epoch][position]) == part
                assert abs(exact - counted) < 6 + 4 * data.n_streams
    if data.how.shuffle:
        cuts = [[0, *(change.offset for change in changes if change.epoch == epoch), None] for epoch in range(n_epochs)]
        check_sequences(data, [before[epoch][a:b] for epoch, at in enumerate(cuts) for a, b in pairwise(at)])


def test_two_threads_that_share_draws_each_get_the_range_of_their_draw() -> None:
    """A thread that puts its run in place after another has looked, and before that one takes it."""
    data = even(400, 400)
    part_draws = MixtureOrder(data.dataset_sizes, data.spec([1, 1]), options(), 0)._keep(0).all_draws[0]
    other = part_draws.range_at(300)

    class Contended(list):  # what another thread does at each store
        def __setitem__(self, key: object, value: object) -> None:
            super().__setitem__(slice(None), [other])

    contended = replace(part_draws, _last=Contended())
    run = contended.range_at(0)
    assert run.start <= 0 < run.stop


@given(PARTS, WEIGHTS, STOPS, OPTIONS)
def test_a_window_is_in_all_sections_from_its_first_record_to_its_last(
    parts: Parts, weights: list[int], stop: Literal["first", "all"], how: OrderOptions
) -> None:
    order = MixtureOrder(parts.dataset_sizes, parts.spec(weights[: len(parts.parts)], stop), how, 1)
    for stream in range(order.n_streams):
        position, present, drawn = 0, {}, {}
        while position < order.stream_records(stream):
            section = order.section_at(stream, position)
            assert section.start == position
            block, row = section.rows(0, section.stop - position)
            ends = np.cumsum([0, *(len(window.blocks) for window in section.windows)])
            for number, window in enumerate(section.windows):
                present.setdefault(window, []).append(position)
                mine = (block >= ends[number]) & (block < ends[number + 1])
                inside, at = row[mine], block[mine] - ends[number]
                if len(inside):
                    drawn.setdefault(window, []).append(position)
                if window.row_start is not None:
                    inside = inside - window.row_start[at]
                assert np.all(inside < np.diff(window.first)[at])
            assert len(block) == 0 or block.max() < ends[-1]
            position = section.stop
        starts = sorted({start for found in present.values() for start in found})
        for window, found in present.items():
            touched = drawn[window]
            assert found[0] == touched[0]
            assert set(found) >= {start for start in starts if touched[0] <= start <= touched[-1]}


@pytest.mark.parametrize("placement", ["sticky", "global"])
def test_a_large_part_has_its_own_streams_and_repeats_no_record_in_a_part_epoch(
    placement: Literal["sticky", "global"],
) -> None:
    sizes, streams = (2500, 9001), 2
    data = even(*sizes, shard=300, block=60)
    spec = data.spec([1, 1])
    totals = spec.epoch_shares(sizes)
    assert totals == (2500, 2500)
    sequences: dict[tuple[int, int], list[int]] = {}
    for epoch in range(9):
        order = MixtureOrder(data.dataset_sizes, spec, options(streams, placement=placement), epoch)
        for stream in range(streams):
            for part, record in data.stream(order, stream):
                sequences.setdefault((part, stream), []).append(record)
    for part, size in enumerate(sizes):
        seen: list[list[set[int]]] = []
        for stream in range(streams):
            turned = StreamAllocation(totals, streams).turns(stream)[part]
            length, drawn = -((turned - size) // streams), sequences[part, stream]
            own = [drawn[at : at + length] for at in range(0, len(drawn) - length + 1, length)]
            assert all(len(set(records)) == length for records in own)
            seen.append([set(records) for records in own])
        for one, other in zip(*seen, strict=False):
            assert not one & other
            assert one | other == set(range(size))
        if placement == "sticky":
            assert all(records == seen[0][0] for records in seen[0])


def test_a_part_of_one_record_does_not_end_a_section_at_each_repetition() -> None:
    data = even(1, 2000, shard=2000, block=500)
    order = MixtureOrder(data.dataset_sizes, data.spec([1, 1], "all"), OrderOptions(1, True, None, None, 4), 3)
    assert order.n_records == 4000
    for stream in range(4):
        section = order.section_at(stream, 500)
        assert section.start == 0
        assert section.stop >= 998  # the part's last record ends it


@given(PARTS, SCHEDULES, STOPS)
def test_without_shuffle_every_epoch_is_the_mixture_s_records_by_number(
    parts: Parts, steps: list, stop: Literal["first", "all"]
) -> None:
    spec = parts.spec(schedule_of(steps, len(parts.parts)), stop)
    stored = StoredMixture(spec, parts.sizes)
    part, record = stored.locate(np.arange(len(stored)))
    expected = list(zip(part.tolist(), record.tolist(), strict=True))
    for epoch in (0, 4):
        assert parts.epoch(spec, options(3, shuffle=False), epoch) == expected
    for number, size in enumerate(parts.sizes):
        drawn = [r for k, r in expected if k == number]
        assert drawn == [i % size for i in range(len(drawn))]


def test_records_by_number_are_exact_where_products_need_more_than_63_bits() -> None:
    spec = MixtureSpec((0, 1), (10**12 + 39, 10**12 - 11))
    stored = StoredMixture(spec, (10**12, 10**12))
    shares = interleave(spec.allocation((10**12, 10**12), 1), 0)
    part, record = stored.locate(np.array([len(stored) - 1, 10**12]))
    for position, k, draw in zip((len(stored) - 1, 10**12), part.tolist(), record.tolist(), strict=True):
        assert shares.positions_of(k, np.array([draw])).tolist() == [position]


@given(PARTS, WEIGHTS, STOPS, OPTIONS, st.data())
def test_shards_ahead_include_all_shards_that_are_read(
    parts: Parts, weights: list[int], stop: Literal["first", "all"], how: OrderOptions, data: st.DataObject
) -> None:
    order = MixtureOrder(parts.dataset_sizes, parts.spec(weights[: len(parts.parts)], stop), how, 2)
    stream = data.draw(st.integers(0, order.n_streams - 1))
    n = order.stream_records(stream)
    position = data.draw(st.integers(0, n))
    every = order.shards_ahead(stream, position, None).tolist()
    assert len(set(every)) == len(every)
    some = order.shards_ahead(stream, position, 50).tolist()
    assert set(some) <= set(every)
    if position == n:
        assert every == []
        return
    section = order.section_at(stream, position)
    shards = np.concatenate([window.shards for window in section.windows])
    if not how.shuffle:  # of its windows some blocks may lie behind
        shards = shards[section.rows(position - section.start, section.stop - section.start)[0]]
    assert set(shards.tolist()) <= set(every)


def test_positions_and_streams_outside_are_refused() -> None:
    data = even(10, 10)
    order = MixtureOrder(data.dataset_sizes, data.spec([1, 1]), options(2), 0)
    for stream, position in ((0, 10), (0, -1), (2, 0), (-1, 0)):
        with pytest.raises(ValueError, match=r"outside stream|there is no stream -?\d: the order has 2"):
            order.section_at(stream, position)
    with pytest.raises(ValueError, match="outside stream"):
        order.shards_ahead(0, 11, None)
    with pytest.raises(ValueError, match="outside a section"):
        order.section_at(0, 0).rows(0, 11)
    with pytest.raises(ValueError, match="epoch must be 0 or more"):
        MixtureOrder(data.dataset_sizes, data.spec([1, 1]), options(), -1)


def test_window_sizes_are_divided_by_the_bytes_that_the_parts_contribute() -> None:
    """By 4,000 bytes in blocks of 100: three quarters; a quarter at least, where a part brings a hundredth."""
    data = even(30_000, 10_000, shard=2000, block=10)
    for weights, expected in (([3, 1], (3000, 1000)), ([99, 1], (3900, 1000))):
        order = MixtureOrder(data.dataset_sizes, data.spec(weights, "all"), OrderOptions(1, True, None, 4000), 0)
        section = order.section_at(0, 20_000)
        assert tuple(window.raw_bytes for window in section.windows) == expected


def test_mixtures_equal_the_stored_golden_values() -> None:
    """Runs in progress resume by these values, so a change here breaks users."""
    data = even(20, 40, 5)
    found = data.epoch(data.spec([0.5, 0.3, 0.2]), options(2), 3)
    assert found[:7] == [(2, 0), (0, 5), (0, 9), (1, 36), (1, 35), (0, 1), (0, 4)]
    large = even(6000, 9000, shard=500, block=100)
    order = MixtureOrder(large.dataset_sizes, large.spec([2, 3]), options(2), 1)
    assert large.stream(order, 1, 2000)[:5] == [(1, 1038), (0, 304), (1, 1081), (0, 330), (1, 1003)]
