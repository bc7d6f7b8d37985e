"""A state of a loader with worker processes is one for a loader with another number of them, or with none."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.load.conftest import SCHEMA, make_columns
from torch.utils.data import IterableDataset, Sampler

import tiercache as tc

N = 26
CHANGED = pytest.mark.parametrize(("saved", "loaded"), [(2, 0), (0, 2), (2, 1)])


class EverySeventh(Sampler):
    """A sampler of the user's, without a state."""

    def __iter__(self):
        return iter([7 * i % N for i in range(N)])

    def __len__(self):
        return N


class Numbers(IterableDataset):
    """An iterable data set without a state."""

    def __iter__(self):
        return iter(range(N))


class Counting(torch.utils.data.Dataset):
    """A map-style data set with a state of its own."""

    def __init__(self):
        self.n_read = 0

    def __len__(self):
        return N

    def __getitem__(self, index):
        self.n_read += 1
        return index

    def state_dict(self):
        return {"n_read": self.n_read}

    def load_state_dict(self, state):
        self.n_read = state["n_read"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("workers") / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="4KiB", block_size="1KiB") as writer:
        writer.write_batch(make_columns(N))
    return path


KINDS = {
    "in order": {"batch_size": 4},
    "shuffled": {"batch_size": 4, "shuffle": True},
    "a sampler": {"batch_size": 4, "sampler": EverySeventh()},
    "batches": {"batch_sampler": [[1, 2], [3], [4, 5, 6], [7], [8, 9]]},
}


def values_of(batches):
    return [(batch["id"] if isinstance(batch, dict) else batch).tolist() for batch in batches]


def check_goes_on(make, saved, loaded, n):
    """A loader that loads the state of another one after n batches serves what the other one serves from there on."""
    loader = make(num_workers=saved)
    iterator = iter(loader)
    for _ in itertools.islice(iterator, n):
        pass
    again = make(num_workers=loaded)
    again.load_state_dict(loader.state_dict())
    assert values_of(again) == values_of(iterator)


@CHANGED
@pytest.mark.parametrize("kind", KINDS)
def test_any_map_style_data_set_resumes_with_another_number_of_workers(kind, saved, loaded):
    for n in (0, 3):
        check_goes_on(lambda **more: tc.DataLoader(range(N), **KINDS[kind], **more), saved, loaded, n)


@CHANGED
def test_a_state_that_was_saved_between_snapshots_goes_on_at_the_next_batch(saved, loaded):
    def make(**more):
        return tc.DataLoader(range(N), 4, shuffle=True, snapshot_every_n_steps=3, **more)

    for n in (2, 4):
        check_goes_on(make, saved, loaded, n)


@CHANGED
@pytest.mark.parametrize("more", [{}, {"snapshot_every_n_steps": 4}], ids=["each batch", "some"])
def test_after_the_end_of_an_epoch_the_next_one_is_whole(saved, loaded, more):
    loader = tc.DataLoader(range(N), 4, num_workers=saved, **more)
    whole = values_of(loader)
    again = tc.DataLoader(range(N), 4, num_workers=loaded, **more)
    again.load_state_dict(loader.state_dict())
    assert [values_of(again), values_of(again)] == [whole, whole]


@CHANGED
@pytest.mark.parametrize("kind", KINDS)
def test_the_native_path_resumes_with_another_number_of_workers(packed, kind, saved, loaded):
    dataset = tc.Dataset(packed)
    check_goes_on(lambda **more: tc.DataLoader(dataset, **KINDS[kind], **more), saved, loaded, 3)
    dataset.close()


@pytest.mark.parametrize("to_native", [True, False])
@pytest.mark.parametrize("sampler", [range(N - 1, -1, -1), EverySeventh()], ids=["known", "unknown"])
def test_a_sampler_resumes_from_workers_on_the_native_path_and_back(packed, sampler, to_native):
    dataset = tc.Dataset(packed)

    def make(*, is_native):
        more = {} if is_native else {"collate_fn": collate_own}
        return tc.DataLoader(dataset, 4, sampler=sampler, num_workers=2, **more)

    loader = make(is_native=not to_native)
    iterator = iter(loader)
    next(iterator), next(iterator)
    again = make(is_native=to_native)
    again.load_state_dict(loader.state_dict())
    assert values_of(again) == values_of(iterator)
    dataset.close()


def collate_own(records):
    return tc.collate(records)


def test_the_native_path_refuses_a_state_between_snapshots(packed):
    dataset = tc.Dataset(packed)
    more = {"collate_fn": collate_own, "snapshot_every_n_steps": 3}
    loader = tc.DataLoader(dataset, 4, sampler=range(N), num_workers=1, **more)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(ValueError, match="snapshot_every_n_steps"):
        tc.DataLoader(dataset, 4, sampler=range(N)).load_state_dict(loader.state_dict())
    dataset.close()


@CHANGED
@pytest.mark.parametrize("data", [Numbers(), Counting()], ids=["iterable", "with a state"])
def test_where_each_worker_has_its_own_position_another_number_of_them_is_refused(data, saved, loaded):
    loader = tc.DataLoader(data, 4, num_workers=saved)
    iterator = iter(loader)
    next(iterator)
    again = tc.DataLoader(data, 4, num_workers=loaded)
    with pytest.raises(ValueError, match=f"num_workers={saved}.*num_workers={loaded}"):
        again.load_state_dict(loader.state_dict())
    same = tc.DataLoader(data, 4, num_workers=saved)
    same.load_state_dict(loader.state_dict())
    assert values_of(same) == values_of(iterator)


@CHANGED
def test_after_the_end_of_an_epoch_an_iterable_data_set_takes_any_number_of_workers(saved, loaded):
    loader = tc.DataLoader(Numbers(), 4, num_workers=saved)
    values_of(loader)
    again = tc.DataLoader(Numbers(), 4, num_workers=loaded)
    again.load_state_dict(loader.state_dict())
    assert values_of(again) == values_of(tc.DataLoader(Numbers(), 4, num_workers=loaded))
