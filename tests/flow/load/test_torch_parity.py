"""Side by side with torch's own DataLoader: what it takes, refuses, says, warns of, draws and gives, so does ours."""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
import warnings

import pytest
import torch
from tests.support.records import SCHEMA, ids_of, make_columns
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
    random_split,
)
from torch.utils.data import DataLoader as TorchLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import tiercache as tc

N = 60
HAS_IN_ORDER = "in_order" in inspect.signature(TorchLoader.__init__).parameters  # torch 2.6 and later
ACCELERATOR = getattr(torch, "accelerator", torch.cuda)  # torch before 2.6 knows only cuda here


class Squares(torch.utils.data.Dataset):
    """A plain map-style data set."""

    def __init__(self, n=N):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.tensor(index * index)


class Numbers(IterableDataset):
    """A plain iterable data set, split among workers; it may say a wrong length."""

    def __init__(self, n=N, length=None):
        self.n = n
        self.length = length

    def __iter__(self):
        info = get_worker_info()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(range(start, self.n, step))

    def __repr__(self):
        return f"Numbers({self.n})"

    def __len__(self):
        if self.length is None:
            raise TypeError("no length")
        return self.length


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="4KiB", block_size="1KiB") as writer:
        writer.write_batch(make_columns(N))
    opened = tc.Dataset(path)
    list(opened)  # its files are open before the first test begins, and not a leak of it
    return opened


def raised_by(call):
    """(class, text) of what a call raises, with its warnings ignored; None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except Exception as error:  # noqa: BLE001 -- compared
            return type(error), str(error)
    return None


def warned_by(call):
    """(class, text) of each warning of a call, in order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [(w.category, str(w.message)) for w in caught]


def test_the_signature_is_torchs_with_two_arguments_more():
    theirs = list(inspect.signature(TorchLoader.__init__).parameters.values())
    ours = list(inspect.signature(tc.DataLoader.__init__).parameters.values())
    added = [p for p in ours if p.name in ("snapshot_every_n_steps", "options")]
    assert [p.kind for p in added] == [inspect.Parameter.KEYWORD_ONLY] * 2
    kept = [p for p in ours if p not in added and (p.name != "in_order" or HAS_IN_ORDER)]
    assert [(p.name, p.kind, p.default) for p in kept] == [(p.name, p.kind, p.default) for p in theirs]


REFUSED = [
    {"num_workers": -1},
    {"timeout": -1},
    {"prefetch_factor": 2},
    {"num_workers": 1, "prefetch_factor": -1},
    {"persistent_workers": True},
    {"sampler": [1, 2], "shuffle": True},
    {"batch_sampler": [[1]], "batch_size": 2},
    {"batch_sampler": [[1]], "shuffle": True},
    {"batch_sampler": [[1]], "sampler": [1]},
    {"batch_sampler": [[1]], "drop_last": True},
    {"batch_size": None, "drop_last": True},
    {"batch_size": 0},
    {"batch_size": -3},
    {"batch_size": True},
    {"batch_size": "4"},
    {"batch_size": 2.5},
    {"drop_last": "yes"},
    {"drop_last": 1},
    {"multiprocessing_context": "spawn"},
    {"num_workers": 1, "multiprocessing_context": "thread"},
    {"num_workers": 1, "multiprocessing_context": object},
    {"pages": 4},
]


@pytest.mark.parametrize("kind", ["native", "map", "iterable"])
def test_what_torch_refuses_is_refused_in_its_words(dataset, kind):
    data = {"native": dataset, "map": Squares(), "iterable": Numbers()}[kind]
    of_iterable = [{"shuffle": True}, {"sampler": [1]}, {"batch_sampler": [[1]]}] if kind == "iterable" else []
    for arguments in (*REFUSED, *of_iterable):
        theirs = raised_by(lambda given=arguments: TorchLoader(data, **given))
        assert theirs is not None, arguments
        assert raised_by(lambda given=arguments: tc.DataLoader(data, **given)) == theirs, arguments


NAMES = (
    *("batch_size", "drop_last", "num_workers", "prefetch_factor", "pin_memory", "pin_memory_device", "timeout"),
    *("worker_init_fn", "multiprocessing_context", "generator", "persistent_workers", "dataset"),
    *(["in_order"] if HAS_IN_ORDER else []),
)
GIVEN = [
    {},
    {"batch_size": 7, "drop_last": True},
    {"batch_size": None},
    {"batch_size": 7, "shuffle": True, "generator": torch.Generator()},
    {"num_workers": 2},
    {"num_workers": 2, "prefetch_factor": 5, "persistent_workers": True, "timeout": 3, "worker_init_fn": print},
    {"num_workers": 1, "multiprocessing_context": "spawn", **({"in_order": False} if HAS_IN_ORDER else {})},
    {"num_workers": 1, "multiprocessing_context": multiprocessing.get_context("fork")},
    {"sampler": SequentialSampler(range(N)), "batch_size": 4},
    {"batch_sampler": BatchSampler(range(N), 4, True)},
]


@pytest.mark.parametrize("plain", [False, True], ids=["native", "map"])
@pytest.mark.parametrize("arguments", GIVEN, ids=lambda a: ",".join(a))
def test_attributes_and_length_are_torchs(dataset, arguments, plain):
    data = Squares() if plain else dataset
    theirs, ours = TorchLoader(data, **arguments), tc.DataLoader(data, **arguments)
    assert {n: getattr(ours, n) for n in NAMES} == {n: getattr(theirs, n) for n in NAMES}
    assert len(ours) == len(theirs)
    assert isinstance(ours, TorchLoader)
    assert (ours.batch_sampler is None) == (theirs.batch_sampler is None)
    if theirs.batch_sampler is not None:
        assert isinstance(ours.batch_sampler, BatchSampler)
        assert vars(ours.batch_sampler).keys() - {"set_epoch"} == vars(theirs.batch_sampler).keys()
        assert len(ours.batch_sampler) == len(theirs.batch_sampler)
    assert len(ours.sampler) == len(theirs.sampler)
    for name in ("sampler", "batch_sampler"):
        if name in arguments:
            assert getattr(ours, name) is arguments[name]


@pytest.mark.parametrize("plain", [False, True], ids=["native", "map"])
def test_attributes_that_torch_fixes_are_fixed_and_others_may_be_set(dataset, plain):
    data = Squares() if plain else dataset
    theirs, ours = TorchLoader(data), tc.DataLoader(data)
    for name in ("batch_size", "batch_sampler", "sampler", "drop_last", "dataset", "persistent_workers"):
        mine = raised_by(lambda name=name: setattr(ours, name, 1))
        assert mine is not None
        assert mine == raised_by(lambda name=name: setattr(theirs, name, 1))
    for loader in (theirs, ours):
        loader.num_workers = 0
        loader.worker_init_fn = print
        loader.of_the_users_own = 3
    assert raised_by(lambda: setattr(ours, "multiprocessing_context", "spawn")) == raised_by(
        lambda: setattr(theirs, "multiprocessing_context", "spawn")
    )


WARNED = {
    "many workers": ({"num_workers": 4096}, lambda loader: None),
    "nothing to pin for": ({"pin_memory": True}, iter),
    "pin_memory_device": ({"pin_memory": True, "pin_memory_device": "cuda"}, iter),
    "nothing": ({"num_workers": 1, "batch_size": 4}, len),
}


@pytest.mark.parametrize("kind", ["native", "sampler", "map"])
@pytest.mark.parametrize("name", WARNED)
def test_warnings_are_torchs(dataset, name, kind):
    if ACCELERATOR.is_available() and "pin" in name:
        pytest.skip("here something can be pinned")
    arguments, call = WARNED[name]
    data = Squares() if kind == "map" else dataset
    more = {"sampler": range(N)} if kind == "sampler" else {}
    theirs = warned_by(lambda: call(TorchLoader(data, **arguments, **more)))
    assert bool(theirs) is (name == "many workers" or ("pin" in name and hasattr(torch, "accelerator")))
    starts_no_worker = name == "many workers" and kind != "map"
    assert warned_by(lambda: call(tc.DataLoader(data, **arguments, **more))) == ([] if starts_no_worker else theirs)


def test_torchs_path_over_our_data_set_warns_of_too_many_workers(dataset):
    for more in ({"collate_fn": list}, {"batch_size": None}):
        found = warned_by(lambda more=more: tc.DataLoader(dataset, num_workers=4096, **more))
        assert found == warned_by(lambda: TorchLoader(dataset, num_workers=4096))


IGNORED = {
    "worker_init_fn": print,
    "multiprocessing_context": "spawn",
    "prefetch_factor": 3,
    "persistent_workers": True,
    "in_order": False,
    "snapshot_every_n_steps": 5,
}


@pytest.mark.parametrize("kind", ["native", "sampler"])
def test_options_for_workers_change_nothing_on_the_native_path(dataset, kind):
    more = {"sampler": range(N)} if kind == "sampler" else {}
    loader = tc.DataLoader(dataset, 16, num_workers=2, **IGNORED, **more)
    assert [i for ids in ids_of(loader) for i in ids] == list(range(N))
    assert not multiprocessing.active_children()
    assert loader.in_order is False


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 16, N, 100])
def test_batches_of_the_native_path_are_those_of_torchs_loader(dataset, batch_size, drop_last):
    ours = tc.DataLoader(dataset, batch_size, drop_last=drop_last)
    theirs = TorchLoader(dataset, batch_size, drop_last=drop_last, collate_fn=tc.collate)
    assert ids_of(ours) == ids_of(theirs)
    assert len(ours) == len(theirs)


def test_without_batches_records_come_as_torch_gives_them(dataset):
    chosen = dataset.select_columns(["id", "tokens", "text"])
    theirs, ours = (list(c(chosen, batch_size=None)) for c in (TorchLoader, tc.DataLoader))
    assert [list(map(type, record.values())) for record in ours] == [list(map(type, r.values())) for r in theirs]
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collate_function_gets_what_torch_would_give_it(dataset, workers):
    chosen = dataset.select_columns(["id", "tokens"])
    found = []
    for loader_class in (TorchLoader, tc.DataLoader):
        loader = loader_class(chosen, 16, collate_fn=describe, num_workers=workers)
        assert loader.collate_fn is describe
        found.append(list(loader))
    assert found[0] == found[1]
    theirs, ours = (list(c(chosen, 16, collate_fn=default_collate)) for c in (TorchLoader, tc.DataLoader))
    for a, b in zip(theirs, ours, strict=True):
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)


def describe(records):
    return len(records), [(type(r).__name__, int(r["id"]), r["tokens"].tolist()) for r in records]


def test_iterators_behave_as_torchs(dataset):
    theirs, ours = (iter(c(dataset, 16)) for c in (TorchLoader, tc.DataLoader))
    assert iter(ours) is ours
    assert len(ours) == len(theirs) == 4
    assert [len(batch["id"]) for batch in ours] == [16, 16, 16, 12]
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(ours)
    for protocol in (0, 1, pickle.HIGHEST_PROTOCOL):
        assert raised_by(lambda n=protocol: pickle.dumps(ours, n))[0] is NotImplementedError
        assert raised_by(lambda n=protocol: pickle.dumps(theirs, n))[0] is NotImplementedError


def test_iterable_data_sets_and_data_sets_of_data_sets_are_served_as_torch_serves_them(dataset):
    chosen = dataset.select_columns(["id"])
    halves = random_split(chosen, [20, N - 20], generator=torch.Generator().manual_seed(1))
    for data, workers in (
        (Numbers(11), 0),
        (Numbers(11), 2),
        (TensorDataset(torch.arange(9), torch.arange(9) * 2), 0),
        (Subset(chosen, range(3, 33)), 2),
        (ConcatDataset([chosen, chosen]), 0),
        (halves[1], 0),
    ):
        theirs, ours = (list(c(data, 4, num_workers=workers)) for c in (TorchLoader, tc.DataLoader))
        assert str(ours) == str(theirs)


def test_a_subclass_of_ours_is_a_loader_like_it(dataset):
    class Mine(tc.DataLoader[dict]):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch["id"].tolist()

    assert [len(ids) for ids in Mine(dataset, 16)] == [16, 16, 16, 12]
    assert raised_by(lambda: setattr(Mine(dataset), "sampler", 1))[1].endswith("after Mine is initialized")


def test_a_batch_sampler_assigned_later_is_refused(dataset):
    loader = tc.DataLoader(dataset, 16)
    object.__setattr__(loader, "batch_sampler", BatchSampler(range(4), 2, False))
    with pytest.raises(RuntimeError, match=r"was replaced .* give batch_sampler= to the constructor"):
        iter(loader)


@pytest.mark.parametrize("arguments", [{}, {"drop_last": True}], ids=str)
@pytest.mark.parametrize("more", [{}, {"collate_fn": list}], ids=["native", "torch"])
def test_an_empty_data_set_has_no_batches_shuffled_or_not(tmp_path, arguments, more):
    with tc.Writer(tmp_path / "none", schema={"id": "int64"}):
        pass
    empty = tc.Dataset(tmp_path / "none")
    assert list(tc.DataLoader(empty, **arguments)) == list(TorchLoader(empty, **arguments)) == []
    for data in (empty, tc.Dataset(tmp_path / "none") + empty):
        loader = tc.DataLoader(data, shuffle=True, **arguments, **more)
        assert (len(loader), list(loader), list(loader)) == (0, [], [])
        again = tc.DataLoader(data, shuffle=True, **arguments, **more)
        again.load_state_dict(loader.state_dict())
        assert list(again) == []


@pytest.mark.parametrize(("workers", "given"), [(0, True), (2, False)])
def test_a_state_of_torchdatas_own_loader_is_gone_on_with(workers, given):
    generator = torch.Generator().manual_seed(2) if given else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchdata calls a function that torch 2.13 deprecated
        theirs = StatefulDataLoader(Squares(), 16, shuffle=True, num_workers=workers, generator=generator)
    iterator = iter(theirs)
    next(iterator)
    state = theirs.state_dict()
    rest = [batch.tolist() for batch in iterator]
    ours = tc.DataLoader(
        Squares(), 16, shuffle=True, num_workers=workers, generator=torch.Generator() if given else None
    )
    ours.load_state_dict(state)
    assert [batch.tolist() for batch in ours] == rest
