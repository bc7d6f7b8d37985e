"""Samplers and batch samplers: known ones are served by the native path, a user's own by torch's path."""

from __future__ import annotations

import itertools
import pickle
import threading

import numpy as np
import pytest
import torch
from tests.support.records import SCHEMA, check_batch, ids_of, make_columns
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data import DataLoader as TorchLoader
from torchdata.stateful_dataloader import sampler as torchdata_samplers

import tiercache as tc


class Counting(Sampler):
    """A user's sampler: it counts how far it was asked, in which thread."""

    def __init__(self, numbers):
        self.numbers = list(numbers)
        self.asked = 0
        self.threads = set()

    def __iter__(self):
        for number in self.numbers:
            self.asked += 1
            self.threads.add(threading.current_thread())
            yield number

    def __len__(self):
        return len(self.numbers)


class Stateful(Sampler):
    """A user's sampler with a state of its own, and an iterator that has none."""

    def __init__(self, n):
        self.n = n
        self.at = 0

    def __iter__(self):
        while self.at < self.n:
            self.at += 1
            yield (self.at * 7) % self.n
        self.at = 0

    def __len__(self):
        return self.n

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Varied(Sampler):
    """A batch sampler whose batches are of 1, 2, 3, ... records."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        start, size = 0, 1
        while start < self.n:
            yield [(i * 13) % self.n for i in range(start, min(start + size, self.n))]
            start, size = start + size, size + 1

    def __len__(self):
        return sum(1 for _ in self)


def is_native(loader):
    return loader.native_rank is not None


N = 150
USERS = ("user", "stateful")  # the others are known
SAMPLERS = {
    "sequential": lambda d: SequentialSampler(d),
    "random": lambda d: RandomSampler(d),
    "random-own-generator": lambda d: RandomSampler(d, generator=torch.Generator().manual_seed(3)),
    "replacement": lambda d: RandomSampler(d, replacement=True, num_samples=200),
    "more-than-all": lambda d: RandomSampler(d, num_samples=310),
    "less-than-all": lambda d: RandomSampler(d, num_samples=37, generator=torch.Generator().manual_seed(3)),
    "subset": lambda d: SubsetRandomSampler(range(10, 90)),
    "weighted": lambda d: WeightedRandomSampler(np.arange(1, len(d) + 1) / 100, 120),
    "distributed": lambda d: DistributedSampler(d, num_replicas=3, rank=1, seed=4),
    "torchdata": lambda d: torchdata_samplers.RandomSampler(d, generator=torch.Generator().manual_seed(3)),
    "torchdata-distributed": lambda d: torchdata_samplers.StatefulDistributedSampler(d, num_replicas=2, rank=0),
    "list": lambda d: [5, 3, 3, -1, 149, 0] * 9,
    "range": lambda d: range(0, 150, 3),
    "array": lambda d: np.arange(149, -1, -1),
    "tensor": lambda d: torch.arange(60),
    "user": lambda d: Counting([7, 1, 1, *range(100)]),
    "stateful": lambda d: Stateful(N),
}
BATCH_SAMPLERS = {
    "torch": lambda d: BatchSampler(RandomSampler(d), 16, False),
    "torch-drop": lambda d: BatchSampler(SequentialSampler(d), 16, True),
    "torchdata": lambda d: torchdata_samplers.BatchSampler(torchdata_samplers.RandomSampler(d), 16, False),
    "lists": lambda d: [[1, 2, 3], [4], list(range(140)), [149, 0, 149]],
    "varied": lambda d: Varied(N),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("sampled") / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="8KiB", block_size="1KiB") as writer:
        writer.write_batch(make_columns(N))
    opened = tc.Dataset(path)
    list(opened)  # its files are open before the first test begins, and not a leak of it
    return opened


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_decides_the_records_of_every_epoch(dataset, name, drop_last):
    torch.manual_seed(11)
    sampler = SAMPLERS[name](dataset)
    if name not in USERS:
        torch.empty((), dtype=torch.int64).random_()  # the seed of tc.rng(), which the loader draws first
    batches = BatchSampler(sampler, 16, drop_last)
    expected = [[np.mod(batch, N).tolist() for batch in batches] for _ in range(2)]
    torch.manual_seed(11)
    loader = tc.DataLoader(dataset, 16, sampler=SAMPLERS[name](dataset), drop_last=drop_last)
    assert is_native(loader) is (name not in USERS)
    if name in ("user", "stateful"):  # torchdata's iterators draw a number of their own, and these draw none
        expected = expected[:1] * 2
    # torch's sampler draws a second permutation from a given generator, and does not use it
    n_same = 1 if name == "random-own-generator" else 2
    assert [ids_of(loader), ids_of(loader)][:n_same] == expected[:n_same]
    assert len(loader) == len(expected[0])


@pytest.mark.parametrize("name", BATCH_SAMPLERS)
def test_a_batch_sampler_serves_the_same_as_under_torch(dataset, name):
    found = []
    for loader_class in (TorchLoader, tc.DataLoader):
        torch.manual_seed(11)
        collate_fn = tc.collate if loader_class is TorchLoader else None
        loader = loader_class(dataset, batch_sampler=BATCH_SAMPLERS[name](dataset), collate_fn=collate_fn)
        found.append((ids_of(loader), len(loader), loader.batch_size, loader.drop_last))
    assert name == "torch" or found[0] == found[1]  # torch's loader draws a number before its random sampler does
    assert sorted(itertools.chain(*found[0][0])) == sorted(itertools.chain(*found[1][0]))


@pytest.mark.parametrize(("compression", "window"), [("none", "1KiB"), ("zstd", "4KiB"), ("none", "all")])
def test_windows_may_be_smaller_than_a_batch(make_dataset, compression, window):
    dataset = tc.Dataset(make_dataset(500, compression=compression))
    options = tc.LoaderOptions(shuffle_window_bytes=window)
    numbers = np.random.default_rng(1).integers(0, 500, 150).tolist()
    loader = tc.DataLoader(dataset, 70, sampler=numbers, options=options)
    assert is_native(loader)
    for _ in range(2):
        assert list(itertools.chain(*ids_of(loader))) == numbers


def test_without_workers_a_users_sampler_is_asked_when_its_batch_is_asked_for(dataset):
    sampler = Counting(range(N))
    loader = tc.DataLoader(dataset, 5, sampler=sampler)
    iterator = iter(loader)
    assert sampler.asked == 0
    for taken in range(1, 4):
        assert check_batch(next(iterator)) == list(range(5 * taken - 5, 5 * taken))
        assert sampler.asked == 5 * taken


@pytest.mark.parametrize(
    "name", ["random-own-generator", "torchdata", "list", "stateful", "distributed", "torchdata-distributed"]
)
def test_a_state_of_every_step_resumes(dataset, name):
    def make():
        torch.manual_seed(5)
        return tc.DataLoader(dataset, 16, sampler=SAMPLERS[name](dataset))

    loader = make()
    states, whole = [loader.state_dict()], []
    for batch in loader:
        whole.append(check_batch(batch))
        states.append(loader.state_dict())
    states.append(loader.state_dict())
    following = ids_of(loader)
    for step, state in enumerate(states):
        if name == "stateful" and step == len(whole):
            continue  # this sampler has ended with the short last batch, and its state is that of a new pass
        resumed = make()
        resumed.load_state_dict(state)
        assert ids_of(resumed) == (whole[step:] if step <= len(whole) else following)
        if step <= len(whole) and name != "torchdata-distributed":
            assert ids_of(resumed) == following


def test_a_state_of_another_kind_of_loader_is_refused(dataset):
    loader = tc.DataLoader(dataset, 16, sampler=range(20))
    ordered = tc.DataLoader(dataset, 16)
    with pytest.raises(ValueError, match="Load it into a loader with the arguments of the first one"):
        loader.load_state_dict(ordered.state_dict())
    with pytest.raises(ValueError, match=r"not a state of tiercache\.DataLoader"):
        ordered.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="not a state of a loader with a sampler"):
        loader.load_state_dict({"epoch": 1})


def failing(numbers, error):
    def gen():
        yield from numbers
        raise error

    class Failing(Sampler):
        def __iter__(self):
            return gen()

    return Failing()


def test_an_error_of_a_users_sampler_is_raised_in_its_place(dataset):
    error = RuntimeError("the sampler broke")
    iterator = iter(tc.DataLoader(dataset, 4, sampler=failing(range(10), error)))
    assert [check_batch(next(iterator)) for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(RuntimeError, match="the sampler broke") as raised:
        next(iterator)
    assert raised.value is error


def test_other_than_record_numbers_is_an_error_at_the_first_batch_of_a_known_sampler_or_in_its_place(dataset):
    for numbers, kind, message in (
        ([1, 2, 150], IndexError, "record 150 of a data set of 150"),
        ([1, -151], IndexError, "record -151 of a data set of 150"),
        ([0.5, 1], TypeError, "integer record numbers.*float64"),
        ([True], TypeError, "integer record numbers.*bool"),
        ([[1, 2], [3, 4]], TypeError, "integer record numbers"),
    ):
        iterator = iter(tc.DataLoader(dataset, 1, sampler=numbers))
        with pytest.raises(kind, match=message):
            next(iterator)
    for wrong, kind, message in (
        (150, IndexError, "record 150 of a data set of 150"),
        (-151, IndexError, "record -151 of a data set of 150"),
        (0.5, TypeError, "record numbers must be integers, got float64"),
        (True, TypeError, "record numbers must be integers, got bool"),
    ):
        iterator = iter(tc.DataLoader(dataset, batch_sampler=[[1, 2], [wrong]]))
        assert check_batch(next(iterator)) == [1, 2]
        with pytest.raises(kind, match=message):
            next(iterator)


def test_a_sampler_without_a_length_has_the_loader_raise_as_torch_does(dataset):
    loaders = [c(dataset, 4, sampler=failing([], None)) for c in (TorchLoader, tc.DataLoader)]
    messages = []
    for loader in loaders:
        with pytest.raises(TypeError) as raised:
            len(loader)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_a_state_that_the_user_loaded_into_torchdatas_distributed_sampler_is_honoured(dataset):
    sampler = torchdata_samplers.StatefulDistributedSampler(dataset, num_replicas=2, rank=0)
    whole = list(sampler)
    sampler.load_state_dict({"yielded": 20})
    loader = tc.DataLoader(dataset, 16, sampler=sampler)
    assert is_native(loader)
    assert list(itertools.chain(*ids_of(loader))) == whole[20:]
    assert list(itertools.chain(*ids_of(loader))) == whole


def test_set_epoch_reaches_the_sampler_wherever_it_is(dataset):
    def sampler():
        return DistributedSampler(dataset, num_replicas=2, rank=0, seed=1)

    expected = []
    for epoch in range(2):
        mine = sampler()
        mine.set_epoch(epoch)
        expected.append(list(mine))
    for loader in (
        tc.DataLoader(dataset, 8, sampler=sampler()),
        tc.DataLoader(dataset, batch_sampler=BatchSampler(sampler(), 8, False)),
    ):
        for epoch in (1, 0):
            loader.set_epoch(epoch)
            assert list(itertools.chain(*ids_of(loader))) == expected[epoch]
        loader.sampler.set_epoch(1) if hasattr(loader.sampler, "set_epoch") else loader.batch_sampler.sampler.set_epoch(
            1
        )
        assert list(itertools.chain(*ids_of(loader))) == expected[1]


def test_options_of_the_order_are_refused_with_a_sampler(dataset):
    for bad in (
        {"rank": 0, "world_size": 2},
        {"shuffle_streams": 2},
        {"placement": "global"},
        {"shuffle_group_bytes": "1MiB"},
    ):
        name = next(iter(bad))
        told = f"{name}=.* applies only to a loader without a sampler; .* remove {name}="
        with pytest.raises(ValueError, match=told):
            tc.DataLoader(dataset, 4, sampler=range(9), options=tc.LoaderOptions(**bad))


@pytest.mark.filterwarnings("ignore:You are using .torch.load.:FutureWarning")  # of torch 2.4 and 2.5, by tensors
def test_a_pickled_loader_with_a_sampler_continues_at_its_position(dataset):
    loader = tc.DataLoader(dataset, 16, sampler=torchdata_samplers.RandomSampler(range(N)))
    iterator = iter(loader)
    next(iterator)
    copy = pickle.loads(pickle.dumps(loader))
    assert ids_of(copy) == [check_batch(batch) for batch in iterator]


def test_samplers_of_views_and_joined_data_sets_count_their_own_records(dataset):
    numbers = [5, 3, 3, 149, 20, 7]
    listed = dataset.select(numbers)
    assert ids_of(tc.DataLoader(listed, 4, sampler=[5, 0, 1, 2, -1, 3])) == [[7, 5, 3, 3], [7, 149]]
    part = dataset.skip(40).take(60)
    joined = part + listed
    for data in (part, joined, joined.shard(num_shards=2, index=1)):
        numbers = np.random.default_rng(1).integers(-len(data), len(data), 70).tolist()
        expected = ids_of(TorchLoader(data, 8, sampler=numbers, collate_fn=tc.collate))
        assert ids_of(tc.DataLoader(data, 8, sampler=numbers)) == expected


def test_set_epoch_works_until_the_first_batch_and_is_part_of_the_state(dataset):
    """Lightning makes the iterator, then tells the epoch; a state of a second epoch goes on in that one."""
    whole = {}
    for epoch in (0, 1):
        loader = tc.DataLoader(dataset, 16, sampler=DistributedSampler(dataset, num_replicas=2, rank=0))
        iterator = iter(loader)
        loader.sampler.set_epoch(epoch)
        whole[epoch] = [check_batch(next(iterator)), check_batch(next(iterator))]
        state = loader.state_dict()
        whole[epoch] += [check_batch(batch) for batch in iterator]
    assert whole[0] != whole[1]
    resumed = tc.DataLoader(dataset, 16, sampler=DistributedSampler(dataset, num_replicas=2, rank=0))
    resumed.load_state_dict(state)
    assert ids_of(resumed) == whole[1][2:]


@pytest.mark.parametrize(("n", "replicas"), [(149, 4), (3, 5)])
def test_indices_of_a_distributed_sampler_are_its_own(dataset, n, replicas):
    part = dataset.take(n)
    for rank, shuffle, drop_last in itertools.product(range(replicas), (False, True), (False, True)):
        sampler = DistributedSampler(part, replicas, rank, shuffle=shuffle, seed=3, drop_last=drop_last)
        sampler.set_epoch(2)
        assert list(itertools.chain(*ids_of(tc.DataLoader(part, 4, sampler=sampler)))) == list(sampler)
