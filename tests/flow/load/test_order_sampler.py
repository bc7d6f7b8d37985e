"""A loader that is rebuilt of our loader's data set and sampler, as frameworks do, serves what our loader would."""

from __future__ import annotations

import itertools
import json
import pickle
from copy import copy

import numpy as np
import pytest
import torch
from tests.support.records import SCHEMA, ids_of, make_columns
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler
from torch.utils.data import DataLoader as TorchLoader
from torchdata.stateful_dataloader import Stateful, StatefulDataLoader

import tiercache as tc

N, SIZE = 150, 16

warnings_of_torchdata = pytest.mark.filterwarnings("ignore:.*set_vital.*:UserWarning")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("ordered") / "data"
    for mode in ("create", "append"):
        with tc.Writer(path, mode=mode, schema=SCHEMA, shard_size="4KiB", block_size="1KiB") as writer:
            writer.write_batch(make_columns(N // 2, 0 if mode == "create" else N // 2))
    opened = tc.Dataset(path)
    list(opened)
    return opened


def make(dataset, *, rank=None, seed=3, **arguments):
    ranks = {} if rank is None else {"rank": rank, "world_size": 3}
    options = tc.LoaderOptions(seed=seed, **ranks) if seed is not None or ranks else None
    return tc.DataLoader(dataset, **{"batch_size": SIZE, "shuffle": True, "options": options, **arguments})


def rebuilt(loader, kind=TorchLoader):
    return kind(
        loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn, generator=loader.generator
    )


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("rank", "shuffle"), [(None, True), (0, False), (2, True)])
def test_a_rebuilt_loader_serves_the_loaders_own_epochs(dataset, rank, shuffle, drop_last):
    arguments = {"rank": rank, "shuffle": shuffle, "drop_last": drop_last}
    expected, loader = make(dataset, **arguments), make(dataset, **arguments)
    for _ in range(2):
        assert ids_of(rebuilt(loader)) == ids_of(expected)
        assert ids_of(loader) == ids_of(expected)
    assert len(loader.batch_sampler) == len(loader)


def test_set_epoch_of_the_sampler_does_not_change_the_loader(dataset):
    expected = make(dataset)
    whole = [ids_of(expected) for _ in range(4)]
    loader = make(dataset)
    batches = iter(loader)
    next(batches)
    loader.sampler.set_epoch(2)  # as Lightning tells it, when it has made the iterator
    assert loader.state_dict()["epoch"] == 0
    assert loader.state_dict()["offset"] == SIZE
    assert ids_of(rebuilt(loader)) == whole[2]
    assert ids_of(loader) == whole[3]


@warnings_of_torchdata
@pytest.mark.parametrize(("taken", "seed"), [(0, 3), (1, None), (5, 3)])
def test_a_rebuilt_stateful_loader_resumes_within_its_epoch(dataset, taken, seed):
    torch.manual_seed(1)
    loader = rebuilt(make(dataset, seed=seed), StatefulDataLoader)
    assert sorted(itertools.chain(*ids_of(loader))) == list(range(N))
    batches = iter(loader)
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    rest = ids_of(batches)
    torch.manual_seed(2)
    again = make(dataset, seed=seed)
    resumed = rebuilt(again, StatefulDataLoader)
    resumed.load_state_dict(state)
    if taken:
        assert ids_of(resumed) == rest
        assert again.state_dict()["epoch"] == 2
    else:
        assert sorted(itertools.chain(*ids_of(resumed))) == list(range(N))


def test_state_dict_is_refused_while_another_loader_serves_the_epoch(dataset):
    loader = make(dataset)
    batches = iter(rebuilt(loader))
    next(batches)
    with pytest.raises(RuntimeError, match="position in epoch 0 is unknown"):
        loader.state_dict()
    list(batches)
    assert (loader.state_dict()["epoch"], loader.state_dict()["offset"]) == (1, 0)
    batches = iter(rebuilt(loader))
    next(batches)
    loader.set_epoch(5)
    assert loader.state_dict()["epoch"] == 5


@pytest.mark.parametrize("name", ["sampler", "batch_sampler"])
def test_iterating_a_sampler_begins_the_epoch_as_iter_of_the_loader_does(dataset, name):
    epochs = [ids_of(loader) for loader in [make(dataset)] * 3]
    loader = make(dataset)
    given = list(getattr(loader, name))
    assert given == (epochs[0] if name == "batch_sampler" else list(itertools.chain(*epochs[0])))
    assert (loader.state_dict()["epoch"], loader.state_dict()["offset"]) == (1, 0)
    assert ids_of(loader) == epochs[1]
    next(iter(getattr(loader, name)))
    with pytest.raises(RuntimeError, match="sampler or batch_sampler was iterated"):
        loader.state_dict()
    loader.set_epoch(2)
    assert loader.state_dict()["epoch"] == 2
    assert ids_of(loader) == epochs[2]
    loader.batch_sampler.set_epoch(1)  # Hugging Face's Trainer, when it has skipped batches
    assert next(iter(loader.batch_sampler)) == epochs[1][0]


def test_with_workers_the_end_of_the_epoch_is_unknown(dataset):
    loader = make(dataset, num_workers=2)
    list(loader.batch_sampler)
    with pytest.raises(RuntimeError, match=r"if it has worker processes, call set_epoch\(1\)"):
        loader.state_dict()


def test_a_sampler_of_a_loader_within_an_epoch_is_refused(dataset):
    loader = make(dataset)
    next(iter(loader))
    state = loader.state_dict()
    resumed = make(dataset)
    resumed.load_state_dict(state)
    with pytest.raises(RuntimeError, match="iterate the loader itself"):
        ids_of(rebuilt(resumed))
    assert len(ids_of(resumed)) == len(loader) - 1


def test_a_source_without_record_numbers_is_refused(dataset):
    mixed = tc.mix([dataset.take(40), dataset.skip(40)], [0.5, 0.5])
    with pytest.raises(RuntimeError, match="mixture that is shuffled"):
        list(make(mixed).batch_sampler)
    older = tc.Dataset(dataset._source.url, version=1)
    loader = make(dataset)
    loader.load_state_dict(make(older).state_dict())
    with pytest.raises(RuntimeError, match="version=1"):
        list(loader.batch_sampler)


def test_copies_have_samplers_of_their_own(dataset):
    loader = make(dataset)
    whole = [ids_of(loader) for _ in range(2)]
    loader = make(dataset)
    for other in (copy(loader), pickle.loads(pickle.dumps(loader))):
        assert ids_of(rebuilt(other)) == whole[0]
        assert ids_of(other) == whole[1]
    assert ids_of(rebuilt(loader)) == whole[0]
    alone = pickle.loads(pickle.dumps(loader.sampler))
    assert sorted(alone) == list(range(N))


def test_a_batch_sampler_of_its_class_over_another_sampler_gives_that_ones_batches(dataset):
    loader = make(dataset)
    again = type(loader.batch_sampler)([5, 3, 1], batch_size=2, drop_last=False)  # as Lightning puts a sampler in
    assert list(again) == [[5, 3], [1]]


def test_samplers_are_of_torchs_classes(dataset):
    assert isinstance(make(dataset).sampler, RandomSampler)
    assert isinstance(iter(make(dataset).sampler), Stateful)
    assert isinstance(make(dataset, shuffle=False).sampler, SequentialSampler)
    assert isinstance(make(dataset).batch_sampler, BatchSampler)
    assert np.array_equal(sorted(make(dataset).sampler), np.arange(N))
