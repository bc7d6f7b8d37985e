"""The native path: every record once, in an order that follows from the state, in the consumer's own memory."""

from __future__ import annotations

import gc
import itertools
import json
import pickle
import threading

import numpy as np
import pytest
import torch
from tests.support.records import check_batch, ids_of

import tiercache as tc
from tiercache.errors import UnsupportedFormat
from tiercache.shard.schema import Schema


def test_epochs_differ_and_equal_seeds_agree(make_dataset):
    path = make_dataset(200)
    first = tc.DataLoader(tc.Dataset(path), batch_size=16, shuffle=True, options=tc.LoaderOptions(seed=1))
    second = tc.DataLoader(tc.Dataset(path), batch_size=16, shuffle=True, options=tc.LoaderOptions(seed=1, threads=1))
    epochs = [ids_of(first), ids_of(first)]
    assert epochs == [ids_of(second), ids_of(second)]
    assert epochs[0] != epochs[1]
    second.set_epoch(0)
    assert ids_of(second) == epochs[0]


def test_the_seed_comes_from_torch_as_a_random_sampler_draws_it(make_dataset):
    path = make_dataset(100)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(ids_of(tc.DataLoader(tc.Dataset(path), batch_size=10, shuffle=True)))
    assert runs[0] == runs[1]
    generator = torch.Generator().manual_seed(9)
    assert ids_of(tc.DataLoader(tc.Dataset(path), batch_size=10, shuffle=True, generator=generator)) != runs[0]


def test_batches_are_the_consumers_own_and_may_be_written(make_dataset):
    dataset = tc.Dataset(make_dataset(64))
    for batch in tc.DataLoader(dataset, batch_size=8):
        batch["tokens"].zero_()
        batch["id"] += 1
        batch["boxes"][3].fill_(0)
    assert list(itertools.chain(*ids_of(tc.DataLoader(dataset, batch_size=8)))) == list(range(64))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_resume_at_every_step_serves_what_the_uninterrupted_run_serves(make_dataset, shuffle, drop_last):
    path = make_dataset(150)
    options = tc.LoaderOptions(seed=4, shuffle_window_bytes="3KiB", shuffle_group_bytes="9KiB")

    def make():
        return tc.DataLoader(tc.Dataset(path), batch_size=16, shuffle=shuffle, drop_last=drop_last, options=options)

    loader, whole, states = make(), [], [make().state_dict()]
    for _ in range(2):
        for batch in loader:
            whole.append(check_batch(batch))
            states.append(loader.state_dict())
    per_epoch = len(whole) // 2
    for step, state in enumerate(states):
        assert len(json.dumps(state)) < 600
        resumed = make()
        resumed.load_state_dict(json.loads(json.dumps(state)))
        rest = list(itertools.chain(ids_of(resumed), ids_of(resumed)))
        behind = (step + per_epoch - 1) // per_epoch * per_epoch - per_epoch if step else 0
        until = min(len(whole), behind + 2 * per_epoch)
        assert rest[: until - step] == whole[step:until]


def test_a_state_is_plain_values_whatever_kind_of_integer_was_given(make_dataset):
    options = tc.LoaderOptions(seed=np.int64(3), rank=np.int32(0), world_size=np.uint8(1), threads=np.int64(1))
    loader = tc.DataLoader(tc.Dataset(make_dataset(60)), batch_size=16, options=options)
    loader.set_epoch(np.int64(2))
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert (state["seed"], state["epoch"], state["offset"]) == (3, 2, 16)
    iterator.close()


def test_a_state_that_does_not_fit_is_refused_by_name(make_dataset):
    path = make_dataset(60)
    loader = tc.DataLoader(tc.Dataset(path), batch_size=16, shuffle=True, options=tc.LoaderOptions(seed=4))
    state = loader.state_dict()
    for name, changed in [
        ("shuffle", tc.DataLoader(tc.Dataset(path), batch_size=16)),
        ("drop_last", tc.DataLoader(tc.Dataset(path), batch_size=16, shuffle=True, drop_last=True)),
        ("seed", tc.DataLoader(tc.Dataset(path), batch_size=16, shuffle=True, options=tc.LoaderOptions(seed=5))),
        (
            "shuffle_window_bytes",
            tc.DataLoader(tc.Dataset(path), shuffle=True, options=tc.LoaderOptions(shuffle_window_bytes="1MiB")),
        ),
    ]:
        with pytest.raises(ValueError, match=name):
            changed.load_state_dict(state)
    other = tc.DataLoader(tc.Dataset(make_dataset(60, "other")), batch_size=16, shuffle=True)
    with pytest.raises(tc.ObjectChanged, match="another data set"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="not a state"):
        other.load_state_dict({"_num_yielded": 3})
    with pytest.raises(UnsupportedFormat, match="update tiercache"):
        loader.load_state_dict({**state, "format": 99})


def test_an_invalid_state_is_refused_and_changes_nothing(make_dataset):
    loader = tc.DataLoader(tc.Dataset(make_dataset(60)), batch_size=16, shuffle=True)
    before = loader.state_dict()
    for change, match in (
        ({"shuffle_streams": 0}, "shuffle_streams"),
        ({"shuffle_streams": 1 << 40}, "shuffle_streams"),
        ({"placement": "elsewhere"}, "elsewhere"),
        ({"parts": []}, "parts"),
        ({"parts": [["id", 1, "fingerprint"]]}, "parts"),
        ({"parts": [["id", "a", "fingerprint", None]]}, "parts"),
        ({"seed": None}, "seed"),
        ({"shuffle": 1}, "shuffle"),
        ({"window_bytes": 0}, "window_bytes"),
        ({"mixture": {"weights": [1, 1], "stop": "all"}}, "mixture"),
        ({"offset": 61}, "offset 61"),
        ({"offset": -1}, "offset"),
        ({"offset": 1.5}, "offset"),
        ({"epoch": -1}, "epoch"),
        ({"format": True}, "not a state"),
        ({"more": 1}, "more"),
    ):
        with pytest.raises(ValueError, match=match):
            loader.load_state_dict({**before, **change})
        assert loader.state_dict() == before, change
    for state in (None, [], "text"):
        with pytest.raises(TypeError, match=r"dict .*, got"):
            loader.load_state_dict(state)


def test_two_live_iterators_are_independent(make_dataset):
    loader = tc.DataLoader(tc.Dataset(make_dataset(60)), batch_size=10)
    first, second = iter(loader), iter(loader)
    pairs = [(check_batch(a), check_batch(b)) for a, b in zip(first, second, strict=True)]
    assert all(a == b for a, b in pairs)
    assert len(pairs) == 6


def test_an_iterator_dropped_in_mid_epoch_leaves_no_thread(make_dataset):
    loader = tc.DataLoader(tc.Dataset(make_dataset(2000)), batch_size=4)
    before = set(threading.enumerate())
    gc.disable()
    try:
        iterator = iter(loader)
        check_batch(next(iterator))
        started = set(threading.enumerate()) - before
        del iterator
        for thread in started:
            thread.join(10)  # a read that is under way ends by itself
        assert set(threading.enumerate()) == before
    finally:
        gc.enable()


def test_stats_say_what_was_done_and_what_bounds_it(make_dataset):
    loader = tc.DataLoader(tc.Dataset(make_dataset(100), columns=["id", "flag", "blob", "tokens"]), batch_size=10)
    n_bytes = sum(8 + 1 + len(blob) + 12 for batch in loader for blob in batch["blob"])
    stats = loader.stats()
    assert (stats["samples"], stats["batches"], stats["bytes_served"]) == (100, 10, n_bytes)
    assert (stats["bytes_fetched"], stats["hit_ratio"]) == (0, None)
    assert stats["bytes_from"]["disk"] + stats["bytes_from"]["memory"] == sum(stats["bytes_from"].values()) > 0
    assert 0 <= stats["wait_s"]["share"] <= 1
    assert stats["bottleneck"]


def test_a_timeout_is_torchs_error(make_dataset, monkeypatch):
    gate = threading.Event()
    dataset = tc.Dataset(make_dataset(100))
    load = type(dataset._source).load_blocks
    monkeypatch.setattr(type(dataset._source), "load_blocks", lambda *arguments: gate.wait(30) and load(*arguments))
    loader = tc.DataLoader(dataset, batch_size=10, timeout=0.05)
    iterator = iter(loader)
    with pytest.raises(RuntimeError, match=r"timed out after 0\.05 seconds"):
        next(iterator)
    gate.set()
    assert check_batch(next(iterator)) == list(range(10))
    iterator.close()


def test_options_for_torchs_path_are_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"is a list, not a tiercache\.Dataset"):
        tc.DataLoader([1, 2], options=tc.LoaderOptions())


def test_invalid_options_are_refused_by_name():
    for bad, error, match in (
        ({"rank": 1}, ValueError, "go together"),
        ({"rank": 2, "world_size": 2}, ValueError, "in \\[0, world_size\\)"),
        ({"threads": 0}, ValueError, "threads"),
        ({"shuffle_window_bytes": 0}, ValueError, "shuffle_window_bytes"),
        ({"memory_bytes": "all"}, ValueError, "memory_bytes"),
        ({"shuffle_streams": 0}, ValueError, "shuffle_streams"),
        ({"shuffle_streams": 1 << 20}, ValueError, "shuffle_streams"),
        ({"placement": "here"}, ValueError, "placement"),
        ({"seed": "many"}, TypeError, "seed"),
        ({"threads": "many"}, TypeError, "threads"),
    ):
        with pytest.raises(error, match=match):
            tc.LoaderOptions(**bad)


def test_a_failed_iter_begins_no_epoch(make_dataset, monkeypatch):
    loader = tc.DataLoader(tc.Dataset(make_dataset(60)), batch_size=16, shuffle=True, options=tc.LoaderOptions(seed=1))
    with monkeypatch.context() as patch:
        patch.setattr("tiercache.load.pipeline.Ring", lambda *_args, **_options: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            iter(loader)
    assert (loader.state_dict()["epoch"], loader.state_dict()["offset"]) == (0, 0)
    assert sorted(itertools.chain(*ids_of(loader))) == list(range(60))
    assert loader.state_dict()["epoch"] == 1


def test_a_pickled_loader_continues_at_its_position(make_dataset):
    loader = tc.DataLoader(tc.Dataset(make_dataset(200)), batch_size=16, shuffle=True)
    fresh = pickle.loads(pickle.dumps(loader))
    assert sorted(itertools.chain(*ids_of(fresh))) == list(range(200))
    iterator = iter(loader)
    check_batch(next(iterator))
    again = pickle.loads(pickle.dumps(loader))
    assert ids_of(again) == ids_of(iterator)


def test_a_json_value_nested_too_deep_is_a_corrupt_shard(tmp_path):
    text = "[" * 100_000 + "]" * 100_000
    with tc.Writer(tmp_path / "data", schema={"j": "str"}) as writer:
        writer.write_batch({"j": [text]})
    dataset = tc.Dataset(tmp_path / "data")
    dataset._source.schema = Schema.of({"j": "json"})
    with pytest.raises(tc.CorruptShard):
        next(iter(tc.DataLoader(dataset)))
