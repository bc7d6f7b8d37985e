"""torch's path over a tiercache data set: order, ranks' shares, length and state are the native path's."""

from __future__ import annotations

import itertools
import json
import pickle
import warnings

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from tests.distributed.jobs import OwnRecords, ids_together, only_ids
from tests.load.conftest import SCHEMA, make_columns
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import tiercache as tc

N = 101  # a prime: no batch size and no number of ranks divides it
SMALL = {"shuffle_window_bytes": "2KiB", "shuffle_group_bytes": "9KiB"}
WORKERS = pytest.mark.parametrize("workers", [0, 2])
SHUFFLE = pytest.mark.parametrize("shuffle", [False, True])


class Pairs(OwnRecords):
    """A data set that says itself how many records there are."""

    def __len__(self):
        return super().__len__() // 2

    def __getitem__(self, index):
        return {"id": np.array([2 * index, 2 * index + 1])}


WAYS = {
    "collate_fn": lambda path, **more: tc.DataLoader(tc.Dataset(path), collate_fn=ids_together, **more),
    "subclass": lambda path, **more: tc.DataLoader(OwnRecords(path), **more),
    "subclass with a transform": lambda path, **more: tc.DataLoader(OwnRecords(path, transform=only_ids), **more),
    "batch_size=None": lambda path, batch_size, **more: tc.DataLoader(tc.Dataset(path), batch_size=None, **more),
}
BATCHED = [name for name in WAYS if name != "batch_size=None"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("indexed") / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="2KiB", block_size="512B") as writer:
        writer.write_batch(make_columns(N))
    return path


def options(rank=0, world_size=1, seed=5, **more):
    return tc.LoaderOptions(rank=rank, world_size=world_size, seed=seed, **SMALL, **more)


def native(path, batch_size=8, **more):
    return tc.DataLoader(tc.Dataset(path, columns=["id"]), batch_size=batch_size, **more)


def ids_of(loader):
    return [np.atleast_1d(batch["id"]).tolist() for batch in loader]


def size_of(name, batch_size):
    return 1 if name == "batch_size=None" else batch_size


@SHUFFLE
@WORKERS
@pytest.mark.parametrize("name", WAYS)
def test_ranks_are_served_what_the_native_path_serves_them(path, name, workers, shuffle):
    n_ranks = 3
    served = []
    for rank in range(n_ranks):
        given = {"shuffle": shuffle, "options": options(rank, n_ranks)}
        ours = WAYS[name](path, batch_size=8, num_workers=workers, **given)
        expected = native(path, size_of(name, 8), **given)
        assert len(ours) == len(expected)
        epochs = [ids_of(ours) for _ in range(2)]
        assert epochs == [ids_of(expected) for _ in range(2)]
        assert ours.state_dict() == expected.state_dict()
        served += itertools.chain(*epochs[0])
    assert sorted(set(served)) == list(range(N))
    assert len(served) - N < n_ranks  # each record once, but for a padded one of a rank


@pytest.mark.parametrize("name", BATCHED)
def test_dropping_the_last_batch_is_dropping_the_last_global_batch(path, name):
    served = []
    for rank in range(2):
        given = {"shuffle": True, "drop_last": True, "options": options(rank, 2)}
        loader = WAYS[name](path, batch_size=8, **given)
        found = ids_of(loader)
        assert found == ids_of(native(path, **given))
        assert len(loader) == len(found) == N // 16
        served += itertools.chain(*found)
    assert len(served) == len(set(served)) == N // 16 * 16


@WORKERS
@pytest.mark.parametrize("name", WAYS)
def test_ranks_are_found_in_the_environment_and_split_ranks_turns_them_off(path, name, workers, monkeypatch):
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    split = WAYS[name](path, batch_size=8, num_workers=workers)
    assert list(itertools.chain(*ids_of(split))) == list(itertools.chain(*ids_of(native(path, size_of(name, 8)))))
    assert "rank 1 of 2" in repr(split)
    every = tc.LoaderOptions(split_ranks=False)
    for loader in (WAYS[name](path, batch_size=8, num_workers=workers, options=every), native(path, options=every)):
        assert sorted(itertools.chain(*ids_of(loader))) == list(range(N))


@pytest.mark.parametrize("name", BATCHED)
def test_a_sampler_determines_what_a_rank_is_served(path, name, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    loader = WAYS[name](path, batch_size=8, sampler=range(7))
    assert ids_of(loader) == [list(range(7))]
    with pytest.raises(ValueError, match="options="):
        WAYS[name](path, batch_size=8, sampler=range(7), options=options())


@pytest.mark.parametrize(
    ("name", "workers", "n_taken"),
    [*itertools.product(BATCHED, [0], [0, 1, 4, 6]), ("collate_fn", 2, 4), ("subclass", 2, 0)],
)
def test_three_ranks_resume_a_state_of_two_on_either_path(path, name, workers, n_taken):
    def serve(make, state, n_ranks, batch_size, n_batches):
        """Global batches of each rank, sorted, and the state after them."""
        loaders = [make(path, batch_size=batch_size, shuffle=True, options=options(r, n_ranks)) for r in range(n_ranks)]
        for loader in loaders:
            loader.load_state_dict(state)
        iterators = [iter(loader) for loader in loaders]
        n_batches = len(list(iter_of(state, n_ranks, batch_size))) if n_batches is None else n_batches
        found = [[next(i)["id"].tolist() for i in iterators] for _ in range(n_batches)]
        states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
        assert states == [states[0]] * n_ranks
        return found, states[0]

    def iter_of(state, n_ranks, batch_size):
        return range(state["offset"], N, n_ranks * batch_size)

    def torchs(path, **more):
        return WAYS[name](path, num_workers=workers, **more)

    begun, state = serve(torchs, {}, 2, 8, n_taken)
    mirrored, native_state = serve(native, {}, 2, 8, n_taken)
    assert (mirrored, native_state) == (begun, state)
    rest, end = serve(torchs, state, 3, 4, None)
    assert serve(native, state, 3, 4, None) == (rest, end)
    served = list(itertools.chain(*itertools.chain(*begun, *rest)))
    assert set(served) == set(range(N))
    assert len(served) - N < 3


@WORKERS
@SHUFFLE
@pytest.mark.parametrize("name", WAYS)
def test_a_state_of_every_step_resumes_without_a_seed(path, name, workers, shuffle):
    torch.manual_seed(2)
    loader = WAYS[name](path, batch_size=30, num_workers=workers, shuffle=shuffle)
    states, served = [loader.state_dict()], []
    for batch in loader:
        served.append(np.atleast_1d(batch["id"]).tolist())
        states.append(loader.state_dict())
    states.append(loader.state_dict())
    steps = range(len(states)) if name != "batch_size=None" else (0, 1, 50, N, N + 1)
    following = ids_of(loader)
    for step in steps if not workers else (1, len(states) - 1):
        torch.manual_seed(step)
        resumed = WAYS[name](path, batch_size=30, num_workers=workers, shuffle=shuffle)
        torch.manual_seed(2)  # as when the state was saved: what names the next epoch's seed where nobody reseeds
        resumed.load_state_dict(json.loads(json.dumps(states[step])))
        if step == len(states) - 1:
            assert ids_of(resumed) == following
        else:
            assert ids_of(resumed) == served[step:]


@SHUFFLE
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_random_numbers_and_seeds_are_those_of_torchs_loader_and_of_the_native_path(path, shuffle, given, workers):
    def run(make):
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(4) if given else None
        loader = make(batch_size=16, shuffle=shuffle, generator=generator, num_workers=workers)
        found = []
        for _ in range(3):
            ids = ids_of(loader)
            found.append(
                (torch.get_rng_state().tolist(), None if generator is None else generator.get_state().tolist())
            )
            orders.setdefault(make, []).append(ids)
        return found

    def ours(**more):
        return tc.DataLoader(tc.Dataset(path), collate_fn=ids_together, **more)

    def theirs(**more):
        return TorchLoader(tc.Dataset(path), collate_fn=ids_together, **more)

    def natively(batch_size, **more):
        return native(path, batch_size, **more)

    orders = {}
    assert run(ours) == run(theirs) == run(natively)
    assert orders[ours] == orders[natively]
    assert len({str(order) for order in orders[ours]}) == (3 if shuffle else 1)


def test_reseeding_before_an_epoch_determines_its_order(path):
    loader = WAYS["collate_fn"](path, batch_size=16, shuffle=True)
    orders = []
    for seed in (5, 6, 5):
        torch.manual_seed(seed)
        orders.append(ids_of(loader))
    assert orders[0] == orders[2] != orders[1]


@WORKERS
def test_workers_that_stay_are_served_epoch_after_epoch(path, workers):
    more = {"num_workers": workers, "persistent_workers": bool(workers)}
    loader = WAYS["subclass"](path, batch_size=16, shuffle=True, options=options(), **more)
    expected = native(path, 16, shuffle=True, options=options())
    for stop in (None, 2, None):
        found = [batch["id"].tolist() for batch in itertools.islice(loader, stop)]
        assert found == [batch["id"].tolist() for batch in itertools.islice(expected, stop)]
        assert loader.state_dict() == expected.state_dict()


def test_an_epoch_that_set_epoch_names_comes_next(path):
    loader, expected = (
        make(path, batch_size=16, shuffle=True, options=options()) for make in (WAYS["subclass"], native)
    )
    for epoch in (3, 1):
        for one in (loader, expected):
            one.set_epoch(epoch)
        assert ids_of(loader) == ids_of(expected)


def test_a_loader_is_pickled_with_its_place(path):
    loader = WAYS["subclass"](path, batch_size=16, shuffle=True, options=options())
    loader.load_state_dict({**loader.state_dict(), "offset": 32})
    copy = pickle.loads(pickle.dumps(loader))
    assert ids_of(copy) == ids_of(loader)
    assert len(ids_of(copy)) == len(loader)


@SHUFFLE
@pytest.mark.parametrize(
    "make",
    [
        lambda d: d.select([90, 3, 3, 50, 17, 60, 61, 4, 100, 0]),
        lambda d: d.filter(pc.field("id") > 33),
        lambda d: d.take(40) + d.skip(70),
        lambda d: d.select(np.random.default_rng(1).permutation(N)) + d.take(9),
        lambda d: tc.mix([d.take(20), d.skip(20)], weights=[1, 2]),
        lambda d: tc.mix([d.select([5, 2, 9, 7]), d.skip(20)], weights=[1, 2], stop="all"),
    ],
    ids=["listed", "filtered", "joined", "joined and listed", "mixed", "mixed and listed"],
)
def test_views_and_mixtures_are_served_as_on_the_native_path(path, make, shuffle):
    chosen = make(tc.Dataset(path, columns=["id"]))
    for rank in range(2):
        given = {"batch_size": 4, "shuffle": shuffle, "options": options(rank, 2)}
        loader, expected = tc.DataLoader(chosen, collate_fn=ids_together, **given), tc.DataLoader(chosen, **given)
        assert len(loader) == len(expected)
        for _ in range(3):
            assert ids_of(loader) == ids_of(expected)
        assert loader.dataset is chosen


@SHUFFLE
@WORKERS
def test_a_subclass_that_says_its_length_is_split_by_it(path, shuffle, workers):
    found = []
    for rank in range(2):
        given = {"shuffle": shuffle, "num_workers": workers, "options": options(rank, 2)}
        loader = tc.DataLoader(Pairs(path), batch_size=4, **given)
        batches = [batch["id"][:, 0].tolist() for batch in loader]
        assert len(loader) == len(batches) == 7  # 50 pairs, 8 a step
        found += itertools.chain(*batches)
    assert sorted(found) == list(range(0, N - 1, 2))
    assert (found == sorted(found)) is False


def test_the_version_of_a_state_is_read(tmp_path):
    url = tmp_path / "data"
    with tc.Writer(url, schema=SCHEMA) as writer:
        writer.write_batch(make_columns(20))
    state = WAYS["subclass"](url, batch_size=4).state_dict()
    with tc.Writer(url, schema=SCHEMA, mode="append") as writer:
        writer.write_batch(make_columns(5, first=20))
    loader = WAYS["subclass"](url, batch_size=4)
    assert len(loader) == 7
    loader.load_state_dict(state)
    assert len(loader) == 5
    assert sorted(itertools.chain(*ids_of(loader))) == list(range(20))


@WORKERS
@SHUFFLE
def test_a_state_of_an_earlier_release_continues_in_its_order(path, workers, shuffle):
    """Earlier releases served torch's path by torchdata's loader, with its sampler and its state."""

    def theirs():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchdata calls a function that torch 2.13 deprecated
            return StatefulDataLoader(
                tc.Dataset(path), batch_size=16, shuffle=shuffle, num_workers=workers, collate_fn=ids_together
            )

    before = theirs()
    iterator = iter(before)
    for _ in range(3):
        next(iterator)
    state = before.state_dict()
    rest = [batch["id"].tolist() for batch in iterator]
    loader = WAYS["collate_fn"](path, batch_size=16, shuffle=shuffle, num_workers=workers)
    loader.load_state_dict(state)
    iterator = iter(loader)
    found = [next(iterator)["id"].tolist()]
    again = WAYS["collate_fn"](path, batch_size=16, shuffle=shuffle, num_workers=workers)
    again.load_state_dict(loader.state_dict())
    assert found + ids_of(again) == rest
    assert found + [batch["id"].tolist() for batch in iterator] == rest
    assert sorted(itertools.chain(*ids_of(loader))) == list(range(N))
    assert loader.state_dict()["epoch"] == 1
    ended = WAYS["collate_fn"](path, batch_size=16, shuffle=shuffle, num_workers=workers)
    list(before_end := theirs())
    ended.load_state_dict(before_end.state_dict())
    assert sorted(itertools.chain(*ids_of(ended))) == list(range(N))


def test_ranks_that_resume_a_state_of_an_earlier_release_are_warned(path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = StatefulDataLoader(tc.Dataset(path), batch_size=16, collate_fn=ids_together)
    next(iter(before))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    loader = WAYS["collate_fn"](path, batch_size=16)
    loader.load_state_dict(before.state_dict())
    with pytest.warns(RuntimeWarning, match="every rank"):
        assert list(itertools.chain(*ids_of(loader))) == list(range(16, N))
    assert len(list(itertools.chain(*ids_of(loader)))) == N // 2


class WithState(OwnRecords):
    n_read = 0

    def __getitem__(self, index):
        self.n_read += 1
        return super().__getitem__(index)

    def state_dict(self):
        return {"n_read": self.n_read}

    def load_state_dict(self, state):
        self.n_read = state["n_read"]


def test_a_data_set_with_a_state_of_its_own_keeps_it_and_is_not_split(path, monkeypatch):
    loader = tc.DataLoader(WithState(path), batch_size=10)
    next(iter(loader))
    again = tc.DataLoader(WithState(path), batch_size=10)
    again.load_state_dict(loader.state_dict())
    assert sorted(itertools.chain(*ids_of(again))) == list(range(10, N))
    assert again.dataset.n_read == N
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="split_ranks=False"):
        iter(tc.DataLoader(WithState(path), batch_size=10))
    every = tc.DataLoader(WithState(path), batch_size=10, options=tc.LoaderOptions(split_ranks=False))
    assert len(list(itertools.chain(*ids_of(every)))) == N


@pytest.mark.parametrize("more", [{"threads": 2}, {"memory_bytes": "1MiB"}, {"on_corrupt": "previous"}], ids=str)
def test_options_without_an_effect_are_refused(path, more):
    (name,) = more
    with pytest.raises(ValueError, match=rf"{name}=.*collate_fn"):
        WAYS["collate_fn"](path, batch_size=4, options=tc.LoaderOptions(**more))


def test_samplers_are_instances_of_torchs_classes(path):
    loader = WAYS["collate_fn"](path, batch_size=4, shuffle=True)
    assert isinstance(loader.sampler, RandomSampler)
    assert sorted(itertools.chain(*loader.batch_sampler)) == list(range(N))  # all records: others split them by rank
