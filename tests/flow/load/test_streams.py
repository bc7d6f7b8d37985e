"""Streams and ranks: one global sequence whoever serves it, by content; each block read by one rank; equal batches."""

from __future__ import annotations

import contextlib
import itertools
import json
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.records import check_batch, ids_of, make_columns

import tiercache as tc

# Of each some 60 ms; `pytest --hypothesis-profile fuzz` draws 5,000.
SOME = settings.default.max_examples if settings.default.max_examples > 100 else 25
# (records, records of a shard, of a block): one record, fewer than ranks, one shard, many tiny ones, many blocks.
LAYOUTS = [(0, 8, 8), (1, 8, 8), (5, 1, 1), (40, 64, 4), (97, 3, 2), (300, 41, 3)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed data set of only ids for each of LAYOUTS."""
    folder = tmp_path_factory.mktemp("streams")
    for n, per_shard, per_block in LAYOUTS:
        path = folder / f"{n}-{per_shard}-{per_block}"
        with tc.Writer(path, schema={"id": "int64"}, block_size=8 * per_block, shard_size="1GiB") as writer:
            writer.write_batch({"id": np.arange(min(n, per_shard))})
        for first in range(per_shard, n, per_shard):
            with tc.Writer(path, mode="append", block_size=8 * per_block, shard_size="1GiB") as writer:
                writer.write_batch({"id": np.arange(first, min(first + per_shard, n))})
    return {layout: tc.Dataset(folder / "-".join(map(str, layout))) for layout in LAYOUTS}


@pytest.fixture(autouse=True)
def closed(packed):
    yield
    for dataset in packed.values():
        dataset.close()


@dataclass(frozen=True)
class Ranks:
    """Who serves: so many ranks with so large batches."""

    world_size: int
    batch_size: int

    @property
    def global_batch(self) -> int:
        return self.world_size * self.batch_size


def ids_of_batch(batch):
    return check_batch(batch) if len(batch) > 1 else batch["id"].tolist()


class Run:
    """All ranks of a run in one process, and what they serve."""

    def __init__(self, dataset, ranks, how, state=None, *, shuffle, drop_last):
        self.loaders = [
            tc.DataLoader(
                dataset,
                batch_size=ranks.batch_size,
                shuffle=shuffle,
                drop_last=drop_last,
                options=tc.LoaderOptions(rank=rank, world_size=ranks.world_size, threads=1, **how),
            )
            for rank in range(ranks.world_size)
        ]
        for loader in self.loaders if state is not None else ():
            loader.load_state_dict(json.loads(json.dumps(state)))

    def serve(self, n_batches=None):
        """Ids of each global batch by rank, up to n_batches of them."""
        with contextlib.ExitStack() as closing:
            iterators = [iter(loader) for loader in self.loaders]
            for iterator in iterators:
                closing.callback(iterator.close)
            batches = [list(map(ids_of_batch, itertools.islice(iterator, n_batches))) for iterator in iterators]
            self.states = [loader.state_dict() for loader in self.loaders]
        assert len({len(of_rank) for of_rank in batches}) == 1  # equally many on every rank
        return list(zip(*batches, strict=True))

    @property
    def state(self):
        assert all(state == self.states[0] for state in self.states)
        return self.states[0]

    @property
    def padded(self):
        return sum(loader.stats()["padded"] for loader in self.loaders)


hows = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 3),
        "shuffle_streams": st.sampled_from([1, 2, 3, 4, 6, 50]),
        "placement": st.sampled_from(["sticky", "global"]),
        "shuffle_group_bytes": st.sampled_from(["1KiB", "all"]),
        "shuffle_window_bytes": st.sampled_from([8, 100, "all"]),
    }
)
some_ranks = st.builds(Ranks, st.integers(1, 5), st.integers(1, 9))


@settings(max_examples=SOME)
@given(data=st.data(), layout=st.sampled_from(LAYOUTS), how=hows, shuffle=st.booleans(), drop_last=st.booleans())
def test_any_number_of_ranks_serves_one_sequence_and_others_resume_it(packed, data, layout, how, shuffle, drop_last):
    warnings.simplefilter("ignore", RuntimeWarning)  # of streams that do not divide the global batch
    dataset, n, epoch = packed[layout], layout[0], data.draw(st.integers(0, 2))
    shuffle &= n > 0  # torch's loader refuses to shuffle nothing
    alone = Run(dataset, Ranks(1, 7), how, shuffle=shuffle, drop_last=False)
    alone.loaders[0].set_epoch(epoch)
    whole = [i for (batch,) in alone.serve() for i in batch]
    assert sorted(whole) == list(range(n))
    at = {record: position for position, record in enumerate(whole)}

    offset, state = 0, None
    for is_last in [*data.draw(st.lists(st.just(False), max_size=2)), True]:
        ranks = data.draw(some_ranks)
        run = Run(dataset, ranks, how, state, shuffle=shuffle, drop_last=drop_last)
        for loader in run.loaders if state is None else ():
            loader.set_epoch(epoch)
        n_batches = None if is_last else data.draw(st.integers(0, (n - offset) // ranks.global_batch))
        for number, batch in enumerate(run.serve(n_batches)):
            start = offset + number * ranks.global_batch
            stop = min(start + ranks.global_batch, n)
            positions = [[at[i] for i in of_rank] for of_rank in batch]
            if stop - start == ranks.global_batch:
                if not shuffle or how["shuffle_streams"] == 1:
                    assert list(itertools.chain(*positions)) == list(range(start, stop))
                assert all(p == sorted(p) and len(p) == ranks.batch_size for p in positions)
            counted = Counter(itertools.chain(*positions))
            served = {p for p in counted if p >= start}
            assert served == set(range(start, stop))
            n_more = sum(counted.values()) - len(served)
            assert n_more == (max(ranks.world_size - (stop - start), 0))
        if not is_last:
            offset, state = offset + n_batches * ranks.global_batch, run.state
    left = n - offset
    n_global = left // ranks.global_batch + (not drop_last and left % ranks.global_batch > 0)
    tail = left % ranks.global_batch
    assert run.padded == (0 if drop_last or not tail else max(ranks.world_size - tail, 0))
    assert (run.state["epoch"], run.state["offset"]) == (epoch + 1, 0)
    assert n_global == (run.loaders[0].stats()["batches"])


def test_streams_that_do_not_divide_a_global_batch_are_warned_of_once(make_dataset):
    options = tc.LoaderOptions(rank=1, world_size=2, shuffle_streams=5, seed=0)
    loader = tc.DataLoader(tc.Dataset(make_dataset(60)), batch_size=4, shuffle=True, options=options)
    with pytest.warns(RuntimeWarning, match=r"5 streams do not divide a global batch of 8.*multiple of 5") as told:
        epochs = [ids_of(loader), ids_of(loader)]
    assert len(told) == 1
    assert [sum(map(len, epoch)) for epoch in epochs] == [30, 30]


def test_streams_follow_the_ranks_of_the_start_and_stay(make_dataset):
    dataset = tc.Dataset(make_dataset(60))

    def make(rank, world_size, **options):
        options = tc.LoaderOptions(rank=rank, world_size=world_size, seed=0, **options)
        return tc.DataLoader(dataset, batch_size=4, shuffle=True, options=options)

    state = make(1, 3).state_dict()
    assert state["streams"] == 3
    alone = make(0, 1)
    alone.load_state_dict(state)
    ids_of(alone)
    assert alone.state_dict()["streams"] == 3
    with pytest.raises(ValueError, match="shuffle_streams=2 differs from the state's 3"):
        make(0, 1, shuffle_streams=2).load_state_dict(state)
    with pytest.raises(ValueError, match="placement='global' differs"):
        make(0, 1, placement="global").load_state_dict(state)
    assert tc.DataLoader(dataset, options=tc.LoaderOptions(rank=0, world_size=3)).state_dict()["streams"] == 1


def test_an_append_in_between_changes_nothing_for_a_run_that_goes_on(make_dataset):
    path = make_dataset(300)
    how = {"seed": 3, "shuffle_streams": 2, "shuffle_window_bytes": "2KiB"}
    order = {"shuffle": True, "drop_last": False}
    whole = [i for (batch,) in Run(tc.Dataset(path), Ranks(1, 8), how, **order).serve() for i in batch]
    run = Run(tc.Dataset(path), Ranks(2, 8), how, **order)
    begun = [i for batch in run.serve(5) for i in itertools.chain(*batch)]
    with tc.Writer(path, mode="append") as writer:
        writer.write_batch(make_columns(64, 300))
    resumed = Run(tc.Dataset(path), Ranks(4, 4), how, run.state, **order)
    rest = [i for batch in resumed.serve() for i in itertools.chain(*batch)]
    assert sorted(begun) == sorted(whole[:80])
    assert sorted(rest) == sorted(whole[80:])
