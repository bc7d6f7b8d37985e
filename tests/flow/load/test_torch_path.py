"""torch's path over a tiercache data set: order, ranks and length are the native path's, the state torchdata's."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from tests.support.loader_jobs import OwnRecords, only_ids
from tests.support.records import SCHEMA, make_columns

import tiercache as tc

N = 101  # a prime: no batch size and no number of ranks divides it
SMALL = {"shuffle_window_bytes": "2KiB", "shuffle_group_bytes": "9KiB"}
SHUFFLE = pytest.mark.parametrize("shuffle", [False, True])


class Pairs(OwnRecords):
    """A data set that says itself how many records there are."""

    def __len__(self):
        return super().__len__() // 2

    def __getitem__(self, index):
        return {"id": np.array([2 * index, 2 * index + 1])}


WAYS = {
    "subclass": lambda path, **more: tc.DataLoader(OwnRecords(path), **more),
    "subclass with a transform": lambda path, **more: tc.DataLoader(OwnRecords(path, transform=only_ids), **more),
    "batch_size=None": lambda path, batch_size, **more: tc.DataLoader(tc.Dataset(path), batch_size=None, **more),
}
# Worker processes take seconds to begin, and read in one way: the subclass shows it.
WAYS_AND_WORKERS = pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in WAYS), ("subclass", 2)])


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
@WAYS_AND_WORKERS
def test_ranks_are_served_what_the_native_path_serves_them(path, name, workers, shuffle):
    n_ranks = 3 if not workers else 2
    served = []
    for rank in range(n_ranks):
        given = {"shuffle": shuffle, "options": options(rank, n_ranks)}
        ours = WAYS[name](path, batch_size=8, num_workers=workers, **given)
        expected = native(path, size_of(name, 8), **given)
        assert len(ours) == len(expected)
        epochs = [ids_of(ours) for _ in range(2)]
        assert epochs == [ids_of(expected) for _ in range(2)]
        served += itertools.chain(*epochs[0])
    assert sorted(set(served)) == list(range(N))
    assert len(served) - N < n_ranks  # each record once, but for a padded one of a rank


def test_dropping_the_last_batch_is_dropping_the_last_global_batch(path):
    served = []
    for rank in range(2):
        given = {"shuffle": True, "drop_last": True, "options": options(rank, 2)}
        loader = WAYS["subclass"](path, batch_size=8, **given)
        found = ids_of(loader)
        assert found == ids_of(native(path, **given))
        assert len(loader) == len(found) == N // 16
        served += itertools.chain(*found)
    assert len(served) == len(set(served)) == N // 16 * 16


@pytest.mark.parametrize("name", WAYS)
def test_ranks_are_found_in_the_environment_and_split_ranks_turns_them_off(path, name, monkeypatch):
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    split = WAYS[name](path, batch_size=8)
    assert list(itertools.chain(*ids_of(split))) == list(itertools.chain(*ids_of(native(path, size_of(name, 8)))))
    assert "rank 1 of 2" in repr(split)
    every = tc.LoaderOptions(split_ranks=False)
    for loader in (WAYS[name](path, batch_size=8, options=every), native(path, options=every)):
        assert sorted(itertools.chain(*ids_of(loader))) == list(range(N))
    if name == "subclass":
        assert ids_of(WAYS[name](path, batch_size=8, sampler=range(7))) == [list(range(7))]
        with pytest.raises(ValueError, match="rank=0 applies only to a loader without a sampler"):
            WAYS[name](path, batch_size=8, sampler=range(7), options=options())


@SHUFFLE
@WAYS_AND_WORKERS
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
        resumed.load_state_dict(json.loads(json.dumps(states[step])))
        if step == len(states) - 1:
            assert ids_of(resumed) == following
        else:
            assert ids_of(resumed) == served[step:]


def test_a_state_continues_only_on_as_many_ranks(path):
    def make(n_ranks):
        return WAYS["subclass"](path, batch_size=8, shuffle=True, options=options(1, n_ranks))

    loader = make(2)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    again = make(2)
    again.load_state_dict(state)
    assert ids_of(again) == ids_of(batches)
    other = make(3)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="saved with 2 ranks on torch's path, and here are 3"):
        iter(other)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_left_is_followed_by_the_next_and_set_epoch_names_another(path, workers):
    more = {"num_workers": workers, "persistent_workers": bool(workers)}
    loader = WAYS["subclass"](path, batch_size=16, shuffle=True, options=options(), **more)
    expected = native(path, 16, shuffle=True, options=options())
    for stop in (None, 2, None):
        found = [batch["id"].tolist() for batch in itertools.islice(loader, stop)]
        assert found == [batch["id"].tolist() for batch in itertools.islice(expected, stop)]
    for one in (loader, expected):
        one.set_epoch(1)
    assert ids_of(loader) == ids_of(expected)


def test_a_subclass_with_a_length_of_its_own_is_served_in_torchs_order(path):
    loader = tc.DataLoader(Pairs(path), batch_size=4, shuffle=True)
    found = list(itertools.chain(*(batch["id"][:, 0].tolist() for batch in loader)))
    assert sorted(found) == list(range(0, N - 1, 2))
    assert found != sorted(found)
    with pytest.raises(ValueError, match=r"options= applies only to .*overrides how records are read"):
        tc.DataLoader(Pairs(path), batch_size=4, options=options(0, 2))


def test_a_shuffled_mixture_needs_the_native_path(path):
    dataset = tc.Dataset(path)
    mixed = tc.mix([dataset.take(20), dataset.skip(20)], weights=[1, 2])
    assert len(list(tc.DataLoader(mixed, batch_size=None))) == len(mixed)
    with pytest.raises(ValueError, match="a mixture is shuffled only on the native path; here batch_size=None"):
        tc.DataLoader(mixed, batch_size=None, shuffle=True)


class WithState(OwnRecords):
    n_read = 0

    def __getitem__(self, index):
        self.n_read += 1
        return super().__getitem__(index)

    def state_dict(self):
        return {"n_read": self.n_read}

    def load_state_dict(self, state):
        self.n_read = state["n_read"]


def test_a_data_set_with_a_state_of_its_own_keeps_it(path):
    loader = tc.DataLoader(WithState(path), batch_size=10)
    next(iter(loader))
    again = tc.DataLoader(WithState(path), batch_size=10)
    again.load_state_dict(loader.state_dict())
    assert sorted(itertools.chain(*ids_of(again))) == list(range(10, N))
    assert again.dataset.n_read == N


def test_options_without_an_effect_are_refused(path):
    for name, value in {"threads": 2, "memory_bytes": "1MiB", "on_corrupt": "previous"}.items():
        with pytest.raises(ValueError, match=rf"{name}=.*overrides how records are read"):
            WAYS["subclass"](path, batch_size=4, options=tc.LoaderOptions(**{name: value}))
