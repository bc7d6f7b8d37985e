"""Samplers that have no state: a run goes on in the order in which it was interrupted, or says why it cannot."""

from __future__ import annotations

import itertools
import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from tests.load.conftest import SCHEMA, make_columns
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader import sampler as torchdata_samplers

import tiercache as tc

N, SIZE = 150, 16


class Drawing(Sampler):
    """A user's sampler: draw(n) gives its indices, when they are asked for or when iter() is."""

    def __init__(self, draw, eager=False):
        self.draw, self.eager = draw, eager

    def __len__(self):
        return N

    def __iter__(self):
        return iter(self.draw(N)) if self.eager else self._lazily()

    def _lazily(self):
        yield from self.draw(N)


class Holding(Sampler):
    """A user's sampler that draws from a generator of its own."""

    def __init__(self, generator):
        self.generator = generator

    def __len__(self):
        return N

    def __iter__(self):
        g = self.generator
        if isinstance(g, torch.Generator):
            yield from torch.randperm(N, generator=g)
        elif isinstance(g, random.Random):
            yield from g.sample(range(N), N)
        else:
            yield from g.permutation(N)


class InChunks(Sampler):
    """A user's sampler that draws as it goes."""

    def __len__(self):
        return N

    def __iter__(self):
        for start in range(0, N, 20):
            yield from (start + torch.randperm(min(20, N - start))).tolist()


def by_torch(n):
    return torch.randperm(n).tolist()


def by_python(n):
    numbers = list(range(n))
    random.shuffle(numbers)
    return numbers


# Each makes a new one, as a new process does. A generator that a sampler holds stands elsewhere in another epoch.
SAMPLERS = {
    "torch's numbers": lambda: Drawing(by_torch),
    "torch's numbers in iter()": lambda: Drawing(by_torch, eager=True),
    "NumPy's numbers": lambda: Drawing(np.random.permutation),
    "NumPy's numbers in iter()": lambda: Drawing(np.random.permutation, eager=True),
    "Python's numbers": lambda: Drawing(by_python),
    "a generator of torch's": lambda: Holding(torch.Generator().manual_seed(3)),
    "a generator of NumPy's": lambda: Holding(np.random.default_rng(3)),
    "an older generator of NumPy's": lambda: Holding(np.random.RandomState(3)),
    "another bit generator": lambda: Holding(np.random.Generator(np.random.MT19937(3))),
    "a generator of Python's": lambda: Holding(random.Random(3)),
    "RandomSampler": lambda: RandomSampler(range(N)),
    "RandomSampler with a generator": lambda: RandomSampler(range(N), generator=torch.Generator().manual_seed(3)),
    "RandomSampler with replacement": lambda: RandomSampler(range(N), replacement=True, num_samples=200),
    "WeightedRandomSampler": lambda: WeightedRandomSampler(np.arange(1, N + 1) / N, 120),
    "SubsetRandomSampler": lambda: SubsetRandomSampler(range(10, 90)),
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="8KiB", block_size="1KiB") as writer:
        writer.write_batch(make_columns(N))
    opened = tc.Dataset(path)
    list(opened)
    return opened


@pytest.fixture(autouse=True)
def other_numbers():
    """Python's and NumPy's numbers as they were, for the tests of others."""
    states = random.getstate(), np.random.get_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def numbers_of(batches):
    return [(batch["id"] if isinstance(batch, dict) else batch[0]).tolist() for batch in batches]


WAYS = {
    "native, sampler": lambda make: {"batch_size": SIZE, "sampler": make()},
    "native, batch sampler": lambda make: {"batch_sampler": BatchSampler(make(), SIZE, False)},
    "native, torchdata's batch sampler": lambda make: {
        "batch_sampler": torchdata_samplers.BatchSampler(make(), SIZE, True),
    },
    "torch's path, sampler": lambda make: {"batch_size": SIZE, "sampler": make(), "collate_fn": tc.collate},
    "torch's path, batch sampler": lambda make: {
        "batch_sampler": BatchSampler(make(), SIZE, False),
        "collate_fn": tc.collate,
    },
}


def interrupt(loader, n_taken):
    """One epoch, then another that is interrupted after n_taken batches: its state, by way of JSON, and its rest."""
    seed_all(1)
    for _ in loader:
        torch.rand(3)
    batches = iter(loader)
    for _ in range(n_taken):
        next(batches)
        torch.rand(3), np.random.rand(), random.random()  # what a training draws
    state = json.loads(json.dumps(loader.state_dict()))
    return state, numbers_of(batches)


def resume(loader, state):
    seed_all(2)
    loader.load_state_dict(state)
    before = torch.get_rng_state()
    batches = numbers_of(loader)
    return batches, before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_interrupted_epoch_continues_in_its_order_whatever_generator_the_sampler_uses(ours, name, way):
    for n_taken in (1, 4):
        state, rest = interrupt(tc.DataLoader(ours, **WAYS[way](SAMPLERS[name])), n_taken)
        again, _ = resume(tc.DataLoader(ours, **WAYS[way](SAMPLERS[name])), state)
        assert again == rest


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["torch's numbers", "WeightedRandomSampler", "RandomSampler"])
def test_an_interrupted_epoch_of_a_foreign_data_set_continues_in_its_order(name, workers):
    data = TensorDataset(torch.arange(N))
    loaders = [tc.DataLoader(data, SIZE, sampler=SAMPLERS[name](), num_workers=workers) for _ in range(2)]
    state, rest = interrupt(loaders[0], 3)
    assert resume(loaders[1], state)[0] == rest


def test_single_records_continue_in_their_order(ours):
    loaders = [tc.DataLoader(ours, batch_size=None, sampler=Drawing(by_torch)) for _ in range(2)]
    state, rest = interrupt(loaders[0], 7)
    assert resume(loaders[1], state)[0] == rest


@pytest.mark.parametrize("way", ["native, sampler", "torch's path, sampler"])
def test_a_state_of_a_resumed_epoch_resumes_it_again(ours, way):
    make = partial(Drawing, by_torch)
    state, rest = interrupt(tc.DataLoader(ours, **WAYS[way](make)), 2)
    for number in range(2):
        loader = tc.DataLoader(ours, **WAYS[way](make))
        seed_all(10 + number)
        loader.load_state_dict(state)
        batches = iter(loader)
        assert numbers_of([next(batches)]) == rest[number : number + 1]
        state = loader.state_dict()


@pytest.mark.parametrize("saved_by", WAYS)
def test_the_state_of_one_path_serves_the_other(ours, saved_by):
    kind = "batch sampler" if "batch" in saved_by else "sampler"
    if "torchdata" in saved_by:
        kind = "torchdata's batch sampler"
    for make in (SAMPLERS["RandomSampler"], SAMPLERS["torch's numbers"], lambda: list(range(N - 1, -1, -1))):
        state, rest = interrupt(tc.DataLoader(ours, **WAYS[saved_by](make)), 3)
        for way in WAYS:
            if way.endswith(f", {kind}"):
                assert resume(tc.DataLoader(ours, **WAYS[way](make)), state)[0] == rest


def test_resuming_does_not_change_the_shared_random_numbers(ours):
    make = partial(Drawing, lambda n: [*np.random.permutation(by_torch(n)).tolist()])
    state, rest = interrupt(tc.DataLoader(ours, SIZE, sampler=make(), num_workers=0), 3)
    loader = tc.DataLoader(ours, SIZE, sampler=make(), num_workers=0)
    seed_all(2)
    expected = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert resume(loader, state)[0] == rest
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert np.random.get_state()[1].tolist() == expected[1]


REFUSED = {
    "unknown numbers": lambda: Drawing(lambda n: np.random.default_rng().permutation(n)),
    "numbers drawn between a training's own": lambda: InChunks(),
    "other records": None,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("why", REFUSED)
def test_a_sampler_that_gives_another_order_is_refused_with_the_remedy(ours, why, way):
    lists = iter([list(range(N)), list(range(N))[::-1]])
    make = REFUSED[why] or (lambda: next(lists))
    state, _ = interrupt(tc.DataLoader(ours, **WAYS[way](make)), 4)
    loader = tc.DataLoader(ours, **WAYS[way](make))
    with pytest.raises(ValueError, match=r"has no state.*Give the sampler state_dict\(\) and load_state_dict\(\)"):
        resume(loader, state)


class OneByOne(Sampler):
    """A user's sampler that draws each index when it is asked for, from torch's shared numbers or its own."""

    def __init__(self, generator=None):
        self.generator = generator

    def __len__(self):
        return 100

    def __iter__(self):
        for _ in range(100):
            yield int(torch.randint(0, N, (), generator=self.generator))


@pytest.mark.parametrize("kind", ["sampler", "batch sampler"])
def test_a_sampler_asked_ahead_that_draws_from_shared_numbers_is_refused(ours, kind):
    def make():
        if kind == "sampler":
            return tc.DataLoader(ours, 7, sampler=OneByOne(), num_workers=2)
        return tc.DataLoader(ours, batch_sampler=BatchSampler(OneByOne(), 7, False), num_workers=2)

    torch.manual_seed(1)
    saved = []
    loader = make()
    for _ in itertools.islice(loader, 5):
        torch.rand(3)
        saved.append((loader.state_dict(), torch.get_rng_state()))
    for state, random_state in saved:
        again = make()
        again.load_state_dict(state)
        torch.set_rng_state(random_state)
        with pytest.raises(ValueError, match=r"OneByOne.*state_dict\(\).*generator that is an attribute|has no state"):
            next(iter(again))


@pytest.mark.parametrize("n_taken", [1, 4])
def test_a_sampler_that_draws_one_by_one_from_its_own_generator_resumes(ours, n_taken):
    def make():
        return tc.DataLoader(ours, 7, sampler=OneByOne(torch.Generator().manual_seed(4)), num_workers=2)

    state, rest = interrupt(make(), n_taken)
    assert resume(make(), state)[0] == rest


def test_a_sampler_that_drew_a_chunk_ahead_is_refused(ours):
    def make():
        return tc.DataLoader(ours, 10, sampler=InChunks(), num_workers=1)  # chunks of 20, two batches ahead

    torch.manual_seed(1)
    batches = iter(loader := make())
    next(batches)
    state = loader.state_dict()
    with pytest.raises(ValueError, match="asked ahead"):
        resume(make(), state)


@pytest.mark.parametrize("kind", [OneByOne, InChunks])
def test_a_sampler_not_asked_ahead_resumes_with_restored_random_numbers(ours, kind):
    torch.manual_seed(1)
    loader = tc.DataLoader(ours, 7, sampler=kind())
    batches = iter(loader)
    next(batches), next(batches)
    state, random_state = loader.state_dict(), torch.get_rng_state()
    rest = numbers_of(batches)
    again = tc.DataLoader(ours, 7, sampler=kind())
    again.load_state_dict(state)
    torch.set_rng_state(random_state)
    assert numbers_of(again) == rest


@pytest.mark.parametrize("way", WAYS)
def test_after_the_end_of_an_epoch_any_order_is_accepted(ours, way):
    make = REFUSED["unknown numbers"]
    loader = tc.DataLoader(ours, **WAYS[way](make))
    n_batches = len(numbers_of(loader))
    state = json.loads(json.dumps(loader.state_dict()))
    again, _ = resume(tc.DataLoader(ours, **WAYS[way](make)), state)
    assert len(again) == n_batches


def test_a_rank_resumes_from_the_state_of_another_rank(ours, monkeypatch):
    def share(rank):
        return Drawing(lambda n: range(rank, n, 2))

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    state, _ = interrupt(tc.DataLoader(ours, SIZE, sampler=share(0)), 2)
    monkeypatch.setenv("RANK", "1")
    assert resume(tc.DataLoader(ours, SIZE, sampler=share(1)), state)[0][0][0] == 2 * 2 * SIZE + 1


@pytest.mark.filterwarnings("ignore:.*set_vital.*:UserWarning")  # torchdata calls a function that torch deprecated
@pytest.mark.parametrize("way", WAYS)
def test_states_of_torchdatas_loader_and_of_earlier_releases_skip_as_before(ours, way):
    def make():
        return list(range(N))

    arguments = {**WAYS[way](make), "num_workers": 0, "collate_fn": tc.collate}
    theirs = StatefulDataLoader(ours, **arguments)
    batches = iter(theirs)
    next(batches), next(batches)
    state = theirs.state_dict()
    assert resume(tc.DataLoader(ours, **WAYS[way](make)), state)[0] == numbers_of(batches)
