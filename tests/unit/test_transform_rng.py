"""Random numbers of transforms: a function of the key, and of nothing else."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiercache as tc
from tiercache.transform_rng import seed_global_generators, use_fresh_key, use_key, worker_seed

KEYS = st.tuples(st.integers(-(2**70), 2**70), st.integers(0, 2**40), st.integers(0, 2**60))


def test_outside_of_a_transform_there_are_no_random_numbers():
    with pytest.raises(RuntimeError, match="outside of a transform"):
        tc.rng()
    with use_key(1, 2, 3):
        tc.rng()
    with pytest.raises(RuntimeError, match="outside of a transform"):
        tc.rng()


def test_another_thread_has_no_part_in_a_key():
    errors = []

    def ask():
        try:
            tc.rng()
        except RuntimeError as error:
            errors.append(error)

    with use_key(1, 2, 3):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_the_numbers_of_a_key_never_change():
    """Resumed runs of earlier releases rely on them."""
    with use_key(7, 1, 42):
        own = tc.rng()
        drawn = own.seed, int(own.numpy.integers(1000)), int(torch.randint(1000, (), generator=own.torch))
        assert drawn == (15911730760933761759, 194, 849)
    with use_key(7, 1, 42, "batch"):
        assert tc.rng().seed == 10516860543827599609


@given(KEYS, KEYS)
def test_equal_keys_give_equal_numbers_and_other_keys_others(one, two):
    def numbers(key, kind="record"):
        with use_key(*key, kind):
            own = tc.rng()
            return own.seed, own.numpy.random(), torch.rand((), generator=own.torch).item()

    assert numbers(one) == numbers(one)
    assert numbers(one) != numbers(one, "batch")
    assert (numbers(one) == numbers(two)) == (one == two)


def test_a_key_has_one_object_whose_generators_go_on():
    with use_key(1, 2, 3):
        assert tc.rng() is tc.rng()
        assert tc.rng().numpy.random() != tc.rng().numpy.random()
        assert 0 <= tc.rng().seed < 2**64


def test_a_fresh_key_draws_from_torchs_generator_only_if_it_is_asked():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with use_fresh_key():
        pass
    assert torch.equal(torch.get_rng_state(), before)
    seeds = []
    for _ in range(2):
        torch.manual_seed(1)
        with use_fresh_key():
            seeds.append(tc.rng().seed)
        with use_fresh_key():
            seeds.append(tc.rng().seed)
    assert seeds[:2] == seeds[2:]
    assert seeds[0] != seeds[1]


def test_a_fresh_key_inside_of_another_key_is_that_key():
    with use_key(1, 2, 3):
        outer = tc.rng()
        with use_fresh_key():
            assert tc.rng() is outer


@pytest.fixture
def global_generators():
    """The global generators are as before after the test."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def drawn_globally():
    return torch.randint(1000, ()).item(), np.random.randint(1000), random.randrange(1000)


@pytest.mark.usefixtures("global_generators")
def test_the_global_numbers_of_a_batch_never_change():
    """Resumed runs of earlier releases rely on them."""
    seed_global_generators(7, 1, 42)
    assert drawn_globally() == (445, 205, 971)


@pytest.mark.usefixtures("global_generators")
def test_the_global_numbers_of_a_batch_follow_from_seed_epoch_and_position_alone():
    found = []
    for key in ((7, 1, 42), (8, 1, 42), (7, 2, 42), (7, 1, 43), (7, 1, 42)):
        seed_global_generators(*key)
        found.append(drawn_globally())
    assert found[0] == found[4]
    assert len(set(found)) == 4


@pytest.mark.usefixtures("global_generators")
def test_the_global_seed_differs_from_that_of_the_batch_and_workers_have_seeds_of_their_own():
    with use_key(7, 1, 42, "batch"):
        own = tc.rng().seed
    seed_global_generators(7, 1, 42)
    assert torch.initial_seed() != own
    seeds = {worker_seed(7, number) for number in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
