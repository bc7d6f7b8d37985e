"""tiercache.integrations.accelerate, and Accelerate's own prepare over our data set; in one process and in several."""

import math
import pickle
from collections import Counter
from itertools import chain

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from tests.support.meshes import FakeMesh
from tests.support.ranks import run_ranks

import tiercache as tc
from tiercache.integrations.accelerate import PreparedLoader, pad_batch, prepare

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def accelerator():
    accelerator = accelerate.Accelerator(cpu=True)
    yield accelerator
    accelerator.free_memory()  # it holds the loaders, and they hold the shards of their next epoch
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def dataset(packed):
    dataset = tc.Dataset(packed(101))
    yield dataset
    dataset.close()


def ids_of(loader):
    return [batch["id"].tolist() for batch in loader]


def test_a_prepared_loader_serves_what_the_loader_would(dataset, accelerator):
    options = tc.LoaderOptions(seed=3)
    loader = tc.DataLoader(dataset, batch_size=8, shuffle=True, options=options)
    prepared = prepare(loader, accelerator)
    assert ids_of(prepared) + ids_of(prepared) == ids_of(loader) + ids_of(loader)
    assert len(prepared) == len(loader) == 13
    assert prepared.stats()["samples"] == 202


def test_accelerate_hands_a_prepared_loader_on_as_it_is(dataset, accelerator):
    prepared = prepare(tc.DataLoader(dataset, batch_size=8), accelerator)
    _, again = accelerator.prepare(torch.nn.Linear(2, 2), prepared)
    assert again is prepared
    assert isinstance(again, torch.utils.data.DataLoader)
    assert again.total_batch_size == 8
    assert again.total_dataset_length == 101


def test_a_loop_that_is_left_leaves_no_loader_behind(dataset, accelerator):
    loader = prepare(tc.DataLoader(dataset, batch_size=8), accelerator)
    for _ in loader:
        break
    assert not accelerator.gradient_state.in_dataloader


def test_a_prepared_loader_is_pickled_with_its_place(dataset, accelerator):
    loader = prepare(tc.DataLoader(dataset, batch_size=8, shuffle=True), accelerator)
    batches = iter(loader)
    next(batches)
    copy = pickle.loads(pickle.dumps(loader))
    assert isinstance(copy, PreparedLoader)
    assert ids_of(copy) == ids_of(batches)
    copy.dataset.close()


def test_batches_come_on_the_device_of_the_accelerator(dataset, accelerator, monkeypatch):
    monkeypatch.setattr(type(accelerator), "device", torch.device("meta"))
    batch = next(iter(prepare(tc.DataLoader(dataset, batch_size=8), accelerator)))
    assert {values.device.type for values in batch.values()} == {"meta"}


def test_skipping_batches_by_their_indices_says_what_to_do_instead(dataset, accelerator):
    loader = prepare(tc.DataLoader(dataset, batch_size=8), accelerator)
    with pytest.raises(RuntimeError, match="load_state_dict"):
        next(iter(accelerator.skip_first_batches(loader, 2)))


@pytest.mark.parametrize(
    ("way", "epoch", "drop_last"),
    [("bare", 0, False), ("bare", 2, True), ("prepared", 2, False), ("bare, by workers", 0, True)],
)
def test_skipping_the_first_batches_leaves_the_rest_of_the_epoch(dataset, accelerator, way, epoch, drop_last):
    def make():
        arguments = {"shuffle": True, "drop_last": drop_last, "options": tc.LoaderOptions(seed=3)}
        loader = tc.DataLoader(dataset, batch_size=8, num_workers=2 if "workers" in way else 0, **arguments)
        return accelerator.prepare(loader) if way == "prepared" else loader

    loader = make()
    epochs = [ids_of(loader) for _ in range(epoch + 3)]
    resumed = make()
    resumed.set_epoch(epoch)
    twice = accelerator.skip_first_batches(accelerator.skip_first_batches(resumed, 2), 3)
    assert ids_of(twice) == epochs[epoch][5:]
    if way == "prepared":
        resumed.set_epoch(epoch + 1)  # Accelerate's loaders count the epochs that they themselves served
    assert ids_of(resumed) == epochs[epoch + 1]
    if way != "prepared":
        assert ids_of(accelerator.skip_first_batches(resumed, 1)) == epochs[epoch + 2][1:]


def test_skipping_again_what_a_loaded_state_skips_is_refused(dataset, accelerator):
    loader = tc.DataLoader(dataset, batch_size=8, shuffle=True)
    batches = iter(loader)
    next(batches), next(batches)
    resumed = tc.DataLoader(dataset, batch_size=8, shuffle=True)
    resumed.load_state_dict(loader.state_dict())
    with pytest.raises(RuntimeError, match="iterate the loader itself"):
        ids_of(accelerator.skip_first_batches(resumed, 2))
    assert ids_of(resumed) == ids_of(batches)


def test_a_loader_of_another_kind_is_refused(dataset, accelerator):
    with pytest.raises(TypeError, match=r"takes a tiercache\.DataLoader, got a DataLoader"):
        prepare(torch.utils.data.DataLoader(dataset), accelerator)
    with pytest.raises(ValueError, match=r"native path: use accelerator\.prepare\(loader\)"):
        prepare(tc.DataLoader(range(4)), accelerator)
    with pytest.raises(ValueError, match="has a sampler"):
        prepare(tc.DataLoader(dataset, sampler=[3, 1, 2]), accelerator)


MESH = {"dp_shard": 2, "tp": 4}


def test_a_loader_with_the_ranks_of_the_accelerators_mesh_serves_its_share(dataset, accelerator, monkeypatch):
    alone = tc.DataLoader(dataset, batch_size=8, shuffle=True)
    state, served = alone.state_dict(), []
    for rank in (2, 5, 7):
        monkeypatch.setattr(type(accelerator), "torch_device_mesh", FakeMesh(MESH, rank))
        options = tc.LoaderOptions(rank=rank // 4, world_size=2)
        loader = tc.DataLoader(dataset, batch_size=8, shuffle=True, options=options)
        loader.load_state_dict(state)
        prepared = prepare(loader, accelerator)
        assert prepared.total_batch_size == 16
        served.append(ids_of(prepared))
    assert served[1] == served[2]
    records = Counter(chain.from_iterable(chain.from_iterable(served[:2])))
    assert sorted(records) == list(range(101))
    assert records.total() == 102  # one is repeated, so that the last batches have the same size


def test_a_loader_of_other_ranks_than_the_mesh_of_the_accelerator_is_refused(dataset, accelerator, monkeypatch):
    monkeypatch.setattr(type(accelerator), "torch_device_mesh", FakeMesh(MESH, 5))
    with pytest.raises(ValueError, match=r"rank 1 of 2 data ranks: .*rank=1, world_size=2"):
        prepare(tc.DataLoader(dataset, batch_size=8), accelerator)


def test_reading_on_one_rank_for_all_is_refused(dataset):
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    with pytest.raises(ValueError, match="dispatch_batches=True reads on one rank only"):
        prepare(tc.DataLoader(dataset), accelerator)


# Global batches of 2 * 8 leave 5, 4, 2, 1, 0, 1 of them; those of 3 * 8: 5, 4, 10, 9, 8, 1.
SIZES = [101, 100, 82, 81, 80, 1]


# Of two ranks there is little that three do not show.
@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.stress), 3], ids="{} ranks".format)
def job(request, packed, tmp_path_factory, warm_python):
    """By name, what each rank found."""
    urls, folder = [str(packed(n)) for n in SIZES], tmp_path_factory.mktemp("job")
    arguments = {"urls": urls, "batch_size": 8, "folder": str(folder)}
    answers = run_ranks(warm_python, "tests.integration.accelerate_jobs:serve", request.param, folder, arguments)
    return {name: [answer[name] for answer in answers] for name in answers[0]}


def test_ranks_serve_every_record_in_batches_of_one_size(job):
    for number, n in enumerate(SIZES):
        parts = [answer[number] for answer in job["epochs"]]
        served = Counter(chain.from_iterable(chain.from_iterable(part["batches"] for part in parts)))
        assert sorted(served) == list(range(n))
        assert served.total() == n + sum(part["padded"] for part in parts)
        assert len({tuple(map(len, part["batches"])) for part in parts}) == 1
        assert all(part["ends"] == [False] * (len(part["ends"]) - 1) + [True] for part in parts)


def test_gathering_for_metrics_drops_what_was_repeated(job):
    n_ranks = len(job["epochs"])
    for number, n in enumerate(SIZES):
        gathered = [answer[number]["gathered"] for answer in job["epochs"]]
        assert gathered == [gathered[0]] * n_ranks
        assert sorted(gathered[0]) == list(range(n))


def test_without_even_batches_no_record_is_repeated(job):
    served = Counter(chain.from_iterable(chain.from_iterable(job["uneven"])))
    assert sorted(served.elements()) == list(range(101))


@pytest.mark.parametrize("way", ["plain", "bare"])
def test_skipping_the_first_batches_leaves_the_rest_of_each_ranks_epoch(job, way):
    served = chain.from_iterable(chain.from_iterable(found["batches"] for found in job[way]))
    assert sorted(set(served)) == list(range(101))
    assert all(found["skipped"] == found["batches"][2:] for found in job[way])


def test_save_state_keeps_the_place_of_every_rank(job):
    resumed = job["resumed"]
    assert all(found["again"] == found["rest"] for found in resumed)
    served = chain.from_iterable(chain.from_iterable(found["before"] + found["again"] for found in resumed))
    assert sorted(set(served)) == list(range(101))


def test_gradients_are_synchronised_at_the_steps_at_which_accelerate_does(job):
    n_batches = math.ceil(101 / (8 * len(job["steps"])))
    for steps in job["steps"]:
        assert steps["ours"] == steps["Accelerate's"]
        assert steps["ours"][n_batches - 1]


@pytest.mark.parametrize("layout", ["list", "padded", "nested", "buffer"])
def test_the_last_record_is_repeated_in_every_layout(tmp_path, layout):
    schema = {"id": "int64", "tokens": tc.Ragged("int32", (None,)), "text": "str", "score": "float32?"}
    tokens = [np.arange(n, dtype="int32") for n in (2, 0, 3)]
    with tc.Writer(tmp_path / "data", schema=schema) as writer:
        writer.write_batch({"id": [0, 1, 2], "tokens": tokens, "text": ["a", "", "ccc"], "score": [1.0, None, 3.0]})
    layouts = {"tokens": layout} if layout != "list" else {}
    layouts |= {"text": "buffer"} if layout == "buffer" else {}
    dataset = tc.Dataset(tmp_path / "data", layouts=layouts)
    (batch,) = tc.DataLoader(dataset, batch_size=3)
    longer, n_repeated = pad_batch(batch, 5)
    assert n_repeated == 2
    assert longer["id"].tolist() == [0, 1, 2, 2, 2]
    assert longer["score.valid"].tolist() == [True, False, True, True, True]
    assert [t.tolist()[:3] if layout == "padded" else t.tolist() for t in longer["tokens"]][3:] == [
        [0, 1, 2],
        [0, 1, 2],
    ]
    assert len(longer["text"]) == 5
    assert bytes(longer["text"][4]) == b"ccc" if layout == "buffer" else longer["text"][4] == "ccc"
    dataset.close()


def test_a_list_of_columns_is_made_longer_column_by_column():
    thing = object()
    assert pad_batch({"a": thing, "b": torch.tensor(1.0)}, 4) == ({"a": thing, "b": torch.tensor(1.0)}, 0)
    (ids, texts, thing), n_repeated = pad_batch([torch.arange(2), ["a", "b"], None], 3)
    assert (ids.tolist(), texts, thing, n_repeated) == ([0, 1, 1], ["a", "b", "b"], None, 1)
