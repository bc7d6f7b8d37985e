"""Views, concatenations and mixtures on the native path: order, ranks and resumption."""

from __future__ import annotations

import itertools
import json
import warnings
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.flow.load.test_streams import Ranks, Run
from tests.support.records import SCHEMA, ids_of, join_loading, make_columns

import tiercache as tc

SOME = settings.default.max_examples if settings.default.max_examples > 100 else 25


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two packed data sets, of records 0 to 149 and 1000 to 1059."""
    folder = tmp_path_factory.mktemp("sources")
    for name, n, first in (("a", 150, 0), ("b", 60, 1000)):
        with tc.Writer(folder / name, schema=SCHEMA, shard_size="4KiB", block_size="512B") as writer:
            writer.write_batch(make_columns(n, first))
    return tc.Dataset(folder / "a"), tc.Dataset(folder / "b")


@pytest.fixture(autouse=True)
def closed(parts):
    yield
    join_loading()
    for part in parts:
        part.close()


def a_view(name, a, b):
    """A source by its name, and the ids that it serves without shuffle."""
    first, second = list(range(150)), list(range(1000, 1060))
    return {
        "take": lambda: (a.take(40), first[:40]),
        "skip": lambda: (a.skip(33), first[33:]),
        "shard": lambda: (a.shard(num_shards=3, index=1), None),
        "mask": lambda: (a.select(np.arange(150) % 7 == 2), first[2::7]),
        "listed": lambda: (a.select([5, 149, 3, 77, 0]), [5, 149, 3, 77, 0]),
        "repeated": lambda: (a.select([5, 3, 3, 5, 5, 9]), [5, 3, 3, 5, 5, 9]),
        "joined": lambda: (a + b, first + second),
        "joined views": lambda: (tc.concat([b.take(9), a.select([7, 2]), b]), [*second[:9], 7, 2, *second]),
        "view of joined": lambda: ((a + b).select([200, 3, 155]), [1050, 3, 1005]),
    }[name]()


NAMES = ["take", "skip", "shard", "mask", "listed", "repeated", "joined", "joined views", "view of joined"]


ORDER = {"seed": 3, "shuffle_window_bytes": "1KiB", "shuffle_group_bytes": "9KiB"}


def make_loader(dataset, rank=0, world_size=1, batch_size=7, *, shuffle=False, **how):
    options = tc.LoaderOptions(rank=rank, world_size=world_size, threads=1, **ORDER, **how)
    return tc.DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, options=options)


@pytest.mark.parametrize("name", NAMES)
def test_a_view_without_shuffle_is_served_in_its_order(parts, name):
    dataset, expected = a_view(name, *parts)
    expected = expected or [int(record["id"]) for record in dataset]
    assert list(itertools.chain(*ids_of(make_loader(dataset)))) == expected
    ranks = [ids_of(make_loader(dataset, rank, 2, 2)) for rank in range(2)]
    together = [i for batches in zip(*ranks, strict=True) for i in itertools.chain(*batches)]
    assert together[: len(expected)] == expected


def test_a_state_of_another_selection_or_mixture_is_an_error(parts):
    a, b = parts
    state = make_loader(a.take(40), shuffle=True).state_dict()
    assert len(json.dumps(state)) < 500
    with pytest.raises(tc.ObjectChanged, match="another selection"):
        make_loader(a.take(41), shuffle=True).load_state_dict(state)
    with pytest.raises(tc.ObjectChanged, match="another data set"):
        make_loader(a + b, shuffle=True).load_state_dict(state)
    mixed = make_loader(tc.mix([a, b], weights=[2, 1]), shuffle=True).state_dict()
    with pytest.raises(ValueError, match="mixture"):
        make_loader(a + b, shuffle=True).load_state_dict(mixed)
    with pytest.raises(ValueError, match="stop='all_exhausted' of the mixture differs from the state's 'first"):
        make_loader(tc.mix([a, b], [2, 1], "all_exhausted"), shuffle=True).load_state_dict(mixed)
    with pytest.raises(tc.ObjectChanged, match="another data set"):
        make_loader(tc.mix([a, b, b], [2, 1, 1]), shuffle=True).load_state_dict(mixed)
    joined = make_loader(tc.mix([a + b, b], [2, 1]), shuffle=True).state_dict()
    with pytest.raises(ValueError, match="the mixture has 3 data sets, and that of the state 2"):
        make_loader(tc.mix([a, b, b], [2, 1, 1]), shuffle=True).load_state_dict(joined)


def test_a_mixture_resumes_with_other_weights_from_its_position_on_and_refuses_other_served_ones(parts):
    a, b = parts

    def serve(weights, ranks, state=None, n_batches=None, **how):
        run = Run(tc.mix([a, b], weights), Ranks(*ranks), ORDER, state, shuffle=True, drop_last=False, **how)
        return [i for batches in run.serve(n_batches) for ids in batches for i in ids], run.state

    before, state = serve([2, 1], (2, 5), n_batches=6)
    with pytest.raises(ValueError, match=r"differ before record 60 of the epoch.*weights=\[\(0, ...\), \(60, ...\)\]"):
        make_loader(tc.mix([a, b], [1, 2]), shuffle=True).load_state_dict(state)
    even = [(0, [2, 1]), (60, [1, 1])]
    middle, state = serve(even, (3, 2), state, n_batches=3)
    assert 5 < sum(i >= 1000 for i in middle) < 13
    more, state = serve(even, (3, 2), state, n_batches=1)  # the same weights again
    rest, state = serve([*even, (84, [3, 1])], (1, 6), state, n_batches=1)
    served = [*before, *middle, *more, *rest]
    assert len(set(served)) == len(served) == 60 + 18 + 6 + 6


def test_an_unshuffled_mixture_resumes_with_other_weights_but_not_by_the_numbers_of_a_sampler(parts):
    loader = make_loader(tc.mix(parts, [2, 1]), batch_size=30)
    served = [next(iter(loader))["id"].tolist()]
    state = loader.state_dict()
    again = make_loader(tc.mix(parts, [(0, [2, 1]), (30, [1, 1])]), batch_size=30)
    again.load_state_dict(state)
    for epoch in (1, 0):
        again.set_epoch(epoch)  # to the start of the epoch in which the weights changed
    with pytest.raises(RuntimeError, match="whose weights were changed at a resume"):
        next(iter(again.sampler))
    again.load_state_dict(state)
    served += ids_of(again)
    ids = list(itertools.chain(*served))
    assert [i for i in ids if i < 1000] == list(range(len(ids) - 60))
    assert [i for i in ids if i >= 1000] == list(range(1000, 1060))
    assert list(itertools.chain(*ids_of(again))) == again.dataset[:]["id"].tolist()  # the next epoch


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("streams", [1, 4])
def test_a_mixture_has_exact_shares_in_any_range_and_serves_all_of_its_parts(parts, stop, streams):
    a, b = parts
    mixed = tc.mix([a, b], weights=[0.6, 0.4], stop=stop)
    loader = make_loader(mixed, shuffle=True, shuffle_streams=streams)
    epochs = [list(itertools.chain(*ids_of(loader))) for _ in range(5)]
    assert [len(epoch) for epoch in epochs] == [len(mixed)] * 5
    for epoch in epochs:
        of_a = np.cumsum([0, *(i < 1000 for i in epoch)])
        spread = of_a - 0.6 * np.arange(len(epoch) + 1)
        assert spread.max() - spread.min() < 5 + 2 * streams**0.5
        assert abs(of_a[-1] - 0.6 * len(epoch)) < 1
    counted = Counter(itertools.chain(*epochs))
    for part in (range(150), range(1000, 1060)):
        times = [counted[i] for i in part]
        assert max(times) - min(times) <= 1  # a part goes on where it stopped, in epochs of its own
    if stop == "first_exhausted":
        assert max(Counter(epochs[0]).values()) == 1  # later a part may begin anew within an epoch: its own next one
    else:
        assert all(set(epoch) >= set(range(150)) for epoch in epochs)


@settings(max_examples=SOME)
@given(
    data=st.data(),
    name=st.sampled_from([*NAMES, "mixed", "mixed whole"]),
    streams=st.sampled_from([1, 2, 3, 4]),
    shuffle=st.booleans(),
    placement=st.sampled_from(["sticky", "global"]),
    drop_last=st.booleans(),
)
def test_the_ranks_of_any_world_size_serve_one_sequence(parts, data, name, streams, shuffle, placement, drop_last):
    warnings.simplefilter("ignore", RuntimeWarning)  # of streams that do not divide the global batch
    a, b = parts
    if name.startswith("mixed"):
        dataset = tc.mix([a, b], weights=[1, 2], stop="first_exhausted" if name == "mixed" else "all_exhausted")
    else:
        dataset, _ = a_view(name, a, b)
    how = ORDER | {"shuffle_streams": streams, "placement": placement}
    epoch = data.draw(st.integers(0, 3))
    alone = Run(dataset, Ranks(1, 5), how, shuffle=shuffle, drop_last=False)
    alone.loaders[0].set_epoch(epoch)
    whole = [i for (batch,) in alone.serve() for i in batch]
    n, offset, state = len(whole), 0, None
    assert n == len(dataset)
    for is_last in (False, True):
        ranks = Ranks(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9)))
        run, step = Run(dataset, ranks, how, state, shuffle=shuffle, drop_last=drop_last), ranks.global_batch
        for loader in run.loaders if state is None else ():
            loader.set_epoch(epoch)
        n_batches = None if is_last else data.draw(st.integers(0, (n - offset) // step))
        served = run.serve(n_batches)
        for number, batch in enumerate(served):
            start = offset + number * step
            expected, found = Counter(whole[start : start + step]), Counter(itertools.chain(*batch))
            assert not expected - found
            assert (found - expected).total() == max(ranks.world_size - (n - start), 0)
        offset, state = offset + (0 if is_last else n_batches * step), run.state
    assert len(served) == (n - offset) // step + (not drop_last and (n - offset) % step > 0)


def test_objects_are_read_from_parts_with_other_column_numbers(tmp_path):
    pairs = [{"a": i, "b": [i] * (i % 3)} for i in range(60)]
    with tc.Writer(tmp_path / "a", block_size="64B") as writer:
        writer.write_batch(pa.table({"id": pa.array(range(60)), "pair": pairs}))
    with tc.Writer(tmp_path / "b", block_size="64B") as writer:
        writer.write_batch(pa.table({"more": ["x"] * 60, "pair": pairs, "id": pa.array(range(60))}))
    columns = ["id", "pair"]
    both = tc.concat([tc.Dataset(tmp_path / name, columns=columns) for name in ("a", "b")])
    seen = [
        (i, p)
        for batch in make_loader(both, shuffle=True, shuffle_streams=2)
        for i, p in zip(batch["id"].tolist(), batch["pair"], strict=True)
    ]
    assert sorted(seen, key=lambda s: s[0]) == [(i, pairs[i]) for i in range(60) for _ in range(2)]
