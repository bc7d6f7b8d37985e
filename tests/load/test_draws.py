"""What iter() and next() draw from torch's random numbers: as much as torch's own loader, at the same calls."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.load.conftest import ids_of
from torch.utils.data import DataLoader as TorchLoader

import tiercache as tc
from tiercache.load.draws import MAX_PASSED, Draws

N = 50


class Numbers(torch.utils.data.Dataset):
    """As many records as ours."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return index


def states_of(make_loader, generator, n_epochs=2):
    """The states of torch and of the generator after iter(), after the first next(), and at the end, epoch by epoch."""
    found = []

    def look():
        found.append(torch.get_rng_state().tolist())
        found.append(None if generator is None else generator.get_state().tolist())

    loader = make_loader()
    torch.manual_seed(11)
    for _ in range(n_epochs):
        iterator = iter(loader)
        look()
        next(iterator)
        look()
        for _ in iterator:
            pass
        look()
    return found


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("seed", [None, 3])
def test_an_epoch_draws_what_torchs_loader_draws(make_dataset, shuffle, given, seed):
    dataset = tc.Dataset(make_dataset(N))

    def make(kind, *what, **options):
        generator = torch.Generator().manual_seed(5) if given else None
        return states_of(lambda: kind(*what, batch_size=16, shuffle=shuffle, generator=generator, **options), generator)

    assert make(tc.DataLoader, dataset, options=tc.LoaderOptions(seed=seed)) == make(TorchLoader, Numbers())


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_with_workers_the_sampler_is_asked_in_iter(make_dataset, persistent, given):
    dataset = tc.Dataset(make_dataset(N))

    def make(kind, what):
        generator = torch.Generator().manual_seed(5) if given else None
        kwargs = {"num_workers": 1, "persistent_workers": persistent, "multiprocessing_context": "fork"}
        torch.manual_seed(11)
        loader = kind(what, batch_size=10, shuffle=True, generator=generator, **kwargs)
        torch.manual_seed(12)
        found = []
        for _ in range(2):
            iterator = iter(loader)
            found.append(torch.get_rng_state().tolist())
            found.append(None if generator is None else generator.get_state().tolist())
            for _ in iterator:
                pass
            found.append(torch.get_rng_state().tolist())
            found.append(None if generator is None else generator.get_state().tolist())
        return found

    assert make(tc.DataLoader, dataset) == make(TorchLoader, Numbers())


@pytest.mark.parametrize("given", [False, True])
def test_a_state_that_is_asked_for_draws_nothing_and_names_the_seed_that_comes(make_dataset, given):
    dataset = tc.Dataset(make_dataset(N))
    generator = torch.Generator().manual_seed(5) if given else None
    torch.manual_seed(3)
    loader = tc.DataLoader(dataset, batch_size=10, shuffle=True, generator=generator)
    before = torch.get_rng_state(), None if generator is None else generator.get_state()
    asked = loader.state_dict()["seed"]
    after = torch.get_rng_state(), None if generator is None else generator.get_state()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a is not None)
    other = tc.DataLoader(dataset, batch_size=10, shuffle=True, generator=generator)
    torch.set_rng_state(before[0])
    iter(other).close()
    assert other.state_dict()["seed"] == asked


def test_the_seed_is_what_a_random_sampler_would_draw(make_dataset):
    loader = tc.DataLoader(tc.Dataset(make_dataset(N)), batch_size=10, shuffle=True)
    torch.manual_seed(8)
    torch.empty((), dtype=torch.int64).random_()  # the base seed of iter()
    expected = int(torch.empty((), dtype=torch.int64).random_())
    torch.manual_seed(8)
    assert sorted(itertools.chain(*ids_of(loader))) == list(range(N))
    assert loader.state_dict()["seed"] == expected


@pytest.mark.parametrize("n", [1, 2, 623, 625, 70_000])
def test_passing_a_permutation_leaves_the_generator_where_the_permutation_does(n):
    ours, theirs = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    draws = Draws(ours, True, n)
    for _ in range(2):
        draws.sample()  # once, however often
    torch.randperm(n, generator=theirs)
    assert torch.equal(ours.get_state(), theirs.get_state())
    draws.exhaust()
    torch.randperm(n, generator=theirs)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_beyond_any_number_that_torch_would_permute_the_generator_stays():
    generator = torch.Generator().manual_seed(4)
    before = generator.get_state()
    Draws(generator, True, MAX_PASSED + 1).sample()
    assert torch.equal(generator.get_state(), before)
