"""What iter() and next() draw from torch's random numbers: as much as torch's own loader, at the same calls."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.load.conftest import ids_of
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import RandomSampler

import tiercache as tc
from tiercache.load.torch_rng import MAX_PASSED, TorchDraws

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
def test_an_epoch_draws_the_random_numbers_that_torchs_loader_draws(make_dataset, shuffle, given, seed):
    dataset = tc.Dataset(make_dataset(N))

    def make(kind, *what, **options):
        generator = torch.Generator().manual_seed(5) if given else None
        return states_of(lambda: kind(*what, batch_size=16, shuffle=shuffle, generator=generator, **options), generator)

    assert make(tc.DataLoader, dataset, options=tc.LoaderOptions(seed=seed)) == make(TorchLoader, Numbers())


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_with_workers_the_sampler_draws_in_iter(make_dataset, persistent, given):
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
def test_state_dict_draws_nothing_and_has_the_next_seed(make_dataset, given):
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
    iterator = iter(loader)
    assert loader.state_dict()["seed"] == expected
    assert sorted(itertools.chain(*ids_of(iterator))) == list(range(N))


@pytest.mark.parametrize("n", [1, 2, 623, 625, 70_000])
def test_passing_a_permutation_leaves_the_generator_where_the_permutation_does(n):
    ours, theirs = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    draws = TorchDraws(ours, True, n)
    for _ in range(2):
        draws.sample()  # once, however often
    torch.randperm(n, generator=theirs)
    assert torch.equal(ours.get_state(), theirs.get_state())
    draws.exhaust()
    torch.randperm(n, generator=theirs)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_beyond_any_number_that_torch_would_permute_the_generator_moves_by_one_number():
    ours, theirs = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    TorchDraws(ours, True, MAX_PASSED + 1).sample()
    torch.empty((), dtype=torch.int64).random_(generator=theirs)
    assert torch.equal(ours.get_state(), theirs.get_state())


def make_loader(path, generator=None, **options):
    more = {"options": tc.LoaderOptions(**options)} if options else {}
    return tc.DataLoader(tc.Dataset(path), batch_size=16, shuffle=True, generator=generator, **more)


def flat(loader):
    return list(itertools.chain(*ids_of(loader)))


@pytest.mark.parametrize("given", [False, True])
def test_reseeding_before_an_epoch_determines_its_order(make_dataset, given):
    generator = torch.Generator() if given else None
    loader = make_loader(make_dataset(N), generator)

    def epoch(seed):
        torch.manual_seed(seed) if generator is None else generator.manual_seed(seed)
        return flat(loader)

    orders = [epoch(seed) for seed in (5, 6, 5)]
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(N))


@pytest.mark.parametrize("given", [False, True])
def test_each_epoch_is_in_an_order_of_its_own_where_nobody_reseeds(make_dataset, given):
    generator = torch.Generator().manual_seed(5) if given else None
    torch.manual_seed(5)
    loader = make_loader(make_dataset(N), generator)
    assert len({tuple(flat(loader)) for _ in range(3)}) == 3


def test_the_seed_of_every_epoch_is_what_a_random_sampler_would_draw_in_it(make_dataset):
    def seeds(epochs):
        torch.manual_seed(8)
        found = []
        for epoch in epochs:
            torch.empty((), dtype=torch.int64).random_()  # the base seed of iter()
            found.append(int(torch.empty((), dtype=torch.int64).random_()))
            torch.rand(epoch)  # what a model draws
        return found

    loader = make_loader(make_dataset(N))
    torch.manual_seed(8)
    drawn = []
    for epoch in range(3):
        iterator = iter(loader)
        drawn.append(loader.state_dict()["seed"])
        assert sorted(flat(iterator)) == list(range(N))
        torch.rand(epoch)
    assert drawn == seeds(range(3))


def test_a_seed_of_the_options_holds_whatever_is_reseeded(make_dataset):
    loader = make_loader(path := make_dataset(N), seed=3)
    orders = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        orders.append(flat(loader))
    again = make_loader(path, seed=3)
    assert [flat(again), flat(again)] == orders


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("n_taken", [1, 3, 4, None], ids="after {}".format)
def test_a_run_that_reseeds_before_each_epoch_goes_on_from_any_state_as_it_would_have(make_dataset, given, n_taken):
    path, generator = make_dataset(N), torch.Generator() if given else None

    def reseed(epoch):
        torch.manual_seed(100 + epoch) if generator is None else generator.manual_seed(100 + epoch)

    loader, state, rest = make_loader(path, generator), None, []
    for epoch in range(3):
        reseed(epoch)
        for number, batch in enumerate(iterator := iter(loader), start=1):
            if (epoch, number) == (1, n_taken):
                state = loader.state_dict()
            elif state is not None:
                rest.append(batch["id"].tolist())
        iterator.close()
        if (epoch, n_taken) == (1, None):
            state = loader.state_dict()
    torch.manual_seed(77)  # of another process
    generator = torch.Generator() if given else None
    resumed = make_loader(path, generator)
    resumed.load_state_dict(state)
    found = [] if n_taken is None else ids_of(resumed)
    reseed(2)
    assert found + ids_of(resumed) == rest


def of_ours(path, generator, **more):
    dataset = tc.Dataset(path)
    return tc.DataLoader(dataset, 16, sampler=RandomSampler(dataset, generator=generator), **more)


def of_others(_, generator, **more):
    return tc.DataLoader(Numbers(), 16, sampler=RandomSampler(Numbers(), generator=generator), **more)


def of_others_shuffled(_, generator, **more):
    return tc.DataLoader(Numbers(), 16, shuffle=True, generator=generator, **more)


@pytest.mark.parametrize("n_workers", [0, 1])
@pytest.mark.parametrize(
    ("make", "given"),
    [(of_ours, False), (of_ours, True), (of_others, False), (of_others_shuffled, False), (of_others_shuffled, True)],
)
def test_a_run_that_reseeds_before_each_epoch_goes_on_from_an_epochs_end_whatever_says_the_order(
    make_dataset, make, given, n_workers
):
    path = make_dataset(N)

    def served(loader, generator, epochs):
        found = []
        for epoch in epochs:
            (torch if generator is None else generator).manual_seed(100 + epoch)
            found.append([(batch["id"] if make is of_ours else batch).tolist() for batch in loader])
        return found

    generator = torch.Generator() if given else None
    loader = make(path, generator, num_workers=n_workers)
    served(loader, generator, [0])
    state = loader.state_dict()
    expected = served(loader, generator, [1, 2])
    torch.manual_seed(77)  # of another process
    generator = torch.Generator() if given else None
    resumed = make(path, generator, num_workers=n_workers)
    resumed.load_state_dict(state)
    assert served(resumed, generator, [1, 2]) == expected


@pytest.mark.parametrize("make", [of_ours, of_others, of_others_shuffled])
def test_random_numbers_that_are_restored_at_an_epochs_end_go_on_whatever_says_the_order(make_dataset, make):
    def served(loader):
        return [(batch["id"] if make is of_ours else batch).tolist() for batch in loader]

    loader = make(path := make_dataset(N), None)
    served(loader)
    state, random_state = loader.state_dict(), torch.get_rng_state()
    expected = served(loader), torch.rand(3).tolist(), served(loader)
    torch.manual_seed(77)
    resumed = make(path, None)
    resumed.load_state_dict(state)
    torch.set_rng_state(random_state)
    assert (served(resumed), torch.rand(3).tolist(), served(resumed)) == expected


def test_a_state_from_between_two_epochs_names_the_order_of_the_next_whatever_the_other_process_draws(make_dataset):
    loader = make_loader(path := make_dataset(N))
    flat(loader)
    state = loader.state_dict()
    expected = flat(loader)
    resumed = make_loader(path)
    resumed.load_state_dict(state)
    torch.rand(7)
    assert resumed.state_dict() == state
    assert flat(resumed) == expected


def test_going_on_within_an_epoch_draws_nothing_so_that_restored_random_numbers_go_on_too(make_dataset):
    loader = make_loader(path := make_dataset(N))
    iterator = iter(loader)
    next(iterator)
    state, random_state = loader.state_dict(), torch.get_rng_state()
    expected = ids_of(iterator), torch.rand(3).tolist(), ids_of(loader), torch.rand(3).tolist()
    torch.manual_seed(1)
    resumed = make_loader(path)
    resumed.load_state_dict(state)
    torch.set_rng_state(random_state)
    assert (ids_of(resumed), torch.rand(3).tolist(), ids_of(resumed), torch.rand(3).tolist()) == expected


def test_a_state_of_an_earlier_release_goes_on_in_the_orders_that_it_had(make_dataset):
    loader = make_loader(path := make_dataset(N), seed=4)
    next(iterator := iter(loader))
    state = loader.state_dict()
    expected = ids_of(iterator), ids_of(loader)
    del state["is_seed_drawn"]
    resumed = make_loader(path)
    resumed.load_state_dict(state)
    assert (ids_of(resumed), ids_of(resumed)) == expected


def test_a_run_of_drawn_seeds_goes_on_on_ranks_that_are_seeded_otherwise(make_dataset):
    loader = make_loader(path := make_dataset(N))
    next(iterator := iter(loader))
    state = loader.state_dict()
    rest = flat(iterator)
    found = [[], []]
    for rank in range(2):
        resumed = make_loader(path, rank=rank, world_size=2)
        resumed.load_state_dict(state)
        for _ in range(3):
            torch.manual_seed(rank)
            found[rank].append(flat(resumed))
    epochs = [sorted(a + b) for a, b in zip(*found, strict=True)]
    assert epochs == [sorted(rest), list(range(N)), list(range(N))]
    assert found[0][1] != found[0][2]


def test_a_mixture_keeps_its_seed_for_its_parts_go_on_in_the_next_epoch(make_dataset):
    small, large = tc.Dataset(make_dataset(10, "small")), tc.Dataset(make_dataset(40, "large"))
    loader = tc.DataLoader(tc.mix([small, large], weights=[1, 1]), batch_size=5, shuffle=True)
    seeds, served = [], []
    for epoch in range(4):
        torch.manual_seed(epoch)
        for batch in loader:
            seeds.append(loader.state_dict()["seed"])
            served += [number for number in batch["id"].tolist() if number >= 10]
    assert len(set(seeds)) == 1
    assert sorted(served) == list(range(10, 40))  # no record of the larger part comes again before all have come
