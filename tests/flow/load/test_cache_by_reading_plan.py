"""What a loader fetches, each epoch in a new job, with a cache smaller than its data set: what that cannot hold."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.cache_world import open_below
from tests.support.http_server import HttpFaultServer

import tiercache as tc
from tiercache.data.opened_version import OpenedVersion
from tiercache.load import epoch as epoch_module
from tiercache.load.planner import NextEpoch
from tiercache.model import NEVER, ReadingPlan
from tiercache.shard.reader import ReleasingPlan

N, WORDS = 1536, 1536  # records of 15 KiB, in blocks that are further apart than requests are joined
# Options with which a rank reads other shards in each epoch.
DEALT_ANEW = {"rank": 0, "world_size": 4, "shuffle_streams": 4, "placement": "global"}
DEALT_ANEW |= {"shuffle_group_bytes": "500KiB", "shuffle_window_bytes": "256KiB"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[dict[str, bytes], int, int]:
    """Objects of a data set of two columns, stored bytes of its shards, and what a cache is charged for them."""
    path = tmp_path_factory.mktemp("planned") / "data"
    schema = {"x": tc.Tensor("int64", (WORDS,)), "y": tc.Tensor("int64", (WORDS // 4,)), "id": "int64"}
    rng = np.random.default_rng(0)
    with tc.Writer(path, schema=schema, shard_size="480KiB", block_size="120KiB", compression="none") as writer:
        for first in range(0, N, 32):
            columns = {name: rng.integers(0, 2**62, (32, n)) for name, n in (("x", WORDS), ("y", WORDS // 4))}
            writer.write_batch({**columns, "id": np.arange(first, first + 32)})
    objects = {f"data/{f.relative_to(path).as_posix()}": f.read_bytes() for f in path.rglob("*") if f.is_file()}
    sizes = [len(data) for key, data in objects.items() if "/shards/" in key]
    return objects, sum(sizes), sum(-(-size // 4096) * 4096 + 4096 for size in sizes)


@pytest.fixture
def server(packed, no_hedges) -> Iterator[HttpFaultServer]:
    with HttpFaultServer(dict(packed[0])) as server:
        yield server
        for name in ("tiercache-plan", "tiercache-load"):  # the one starts the others
            for thread in threading.enumerate():
                if thread.name.startswith(name):
                    thread.join(30)


@pytest.fixture
def followed(monkeypatch) -> tuple[list[ReadingPlan], list[int]]:
    """The plans that are published from now on, and the clocks to which they advance."""
    plans: list[ReadingPlan] = []
    clocks: list[int] = []
    publish, advance = OpenedVersion.publish_plan, ReleasingPlan.advance
    monkeypatch.setattr(OpenedVersion, "publish_plan", lambda self, plan: (plans.append(plan), publish(self, plan))[1])
    monkeypatch.setattr(ReleasingPlan, "advance", lambda self, clock: (clocks.append(clock), advance(self, clock))[1])
    return plans, clocks


def options(**given: Any) -> tc.LoaderOptions:
    sizes = {"shuffle_group_bytes": "3MiB", "shuffle_window_bytes": "1MiB", "memory_bytes": 1}
    return tc.LoaderOptions(**{"seed": 1, **sizes, **given})


def read_epoch(server: HttpFaultServer, cache: dict[str, Any], epoch: int, columns=None, **given: Any) -> list[int]:
    """One epoch as a process of its own reads it: a cache, a data set and a loader that begin with nothing.

    The process ends when the first shards of the next epoch are fetched: copies were evicted for them, so a process
    that ends earlier leaves less in the cache, up to a shard for each fetch.
    """
    with tc.Cache(cache["path"], size=cache["size"], min_free=0, policy=cache["policy"]) as opened:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = tc.Dataset(f"{server.url}/data", cache=opened, columns=columns)
        loader = tc.DataLoader(dataset, 16, shuffle=True, options=options(**given))
        loader.set_epoch(epoch)
        found = [i for batch in loader for i in batch["id"].tolist()]
        end_threads()
        dataset.close()
    return found


def fetched(server: HttpFaultServer) -> int:
    return sum(seen.n_bytes for seen in server.log if "/shards/" in seen.path)


def most_bytes(packed, share: float) -> float:
    """Bytes of an epoch of which the cache holds a share: the rest, and two shards.

    A copy of which the cache has only a part, and one whose first blocks found no space, are each fetched in part
    again, depending on how the threads of the loader and of the fetches meet.
    """
    n_shards = sum("/shards/" in key for key in packed[0])
    return packed[1] * (1.005 - share + 2 / n_shards)


def cache_of(tmp_path: Path, packed, share: float, policy: str = "plan") -> dict[str, Any]:
    return {"path": tmp_path / policy, "size": int(packed[2] * share) + (64 << 10), "policy": policy}


def test_one_rank_fetches_only_what_the_cache_cannot_hold(server, packed, tmp_path):
    share = 0.25
    cache = cache_of(tmp_path, packed, share)
    for epoch in range(3):
        server.log.clear()
        assert sorted(read_epoch(server, cache, epoch)) == list(range(N))
        assert fetched(server) <= most_bytes(packed, share if epoch else 0)
    assert fetched(server) >= 0.9 * packed[1] * (1 - share)


def test_shards_that_a_rank_needs_next_are_kept_until_slower_ranks_end(server, packed, tmp_path):
    cache, ranks = (
        cache_of(tmp_path, packed, 0.5),
        [{"rank": rank, "world_size": 2, "shuffle_streams": 2} for rank in range(2)],
    )
    for epoch in range(3):  # one after the other: the most that one can be behind
        server.log.clear()
        for rank in ranks:
            read_epoch(server, cache, epoch, **rank)
    assert fetched(server) <= most_bytes(packed, 0.5)


def test_a_plan_begins_at_the_resumed_position_and_advances_with_served_records(server, packed, tmp_path, followed):
    plans, clocks = followed
    with tc.Cache(tmp_path / "cache", size=packed[2] // 2, min_free=0) as cache:
        with pytest.warns(RuntimeWarning, match="fetched again"):
            dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        loader = tc.DataLoader(dataset, 16, shuffle=True, options=options())
        batches = iter(loader)
        for _ in range(50):
            next(batches)
        state = loader.state_dict()
        batches.close()
        assert not list((tmp_path / "cache" / "plans").iterdir())
        first = plans[0]
        n_shards = len(dataset._source.leaves[0].table)
        assert len(first.shards) == n_shards
        assert first.first.min() == 0
        assert (first.first_later >= first.last.max()).all()
        assert 0 < clocks[-1] < first.last.max() * 0.6
        assert clocks == sorted(clocks)
        plans.clear()
        resumed = tc.DataLoader(dataset, 16, shuffle=True, options=options())
        resumed.load_state_dict(state)
        batches = iter(resumed)
        next(batches)
        left = plans[0]
        over = left.first == NEVER
        assert 0.3 * n_shards < over.sum() < 0.6 * n_shards
        assert (left.first_later[over] != NEVER).all()
        assert left.last[~over].max() == pytest.approx(packed[1] * (1 - 50 * 16 / (N)), rel=0.05)
        del batches, resumed, loader
        dataset.close()


def test_a_plan_exists_between_epochs_and_ends_with_the_loader(server, packed, tmp_path):
    with tc.Cache(tmp_path / "cache", size="64MiB", min_free=0) as cache:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        loader = tc.DataLoader(dataset, 16, shuffle=True, options=options())
        live = []
        for _ in range(2):
            for _ in loader:
                live.append(len(list((tmp_path / "cache" / "plans").iterdir())))
            live.append(len(list((tmp_path / "cache" / "plans").iterdir())))
        assert min(live) >= 1
        del loader
        assert not list((tmp_path / "cache" / "plans").iterdir())
        dataset.close()


def test_at_the_end_of_an_epoch_no_shard_is_in_use(server, packed, tmp_path, monkeypatch, followed):
    plans, clocks = followed
    # The preparation of the next epoch may open its first shards before this one has ended.
    monkeypatch.setattr("tiercache.load.planner.NextEpoch.prepare", lambda *_: None)
    with tc.Cache(tmp_path / "cache", size=packed[2] // 2, min_free=0) as cache:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        loader = tc.DataLoader(dataset, 1000, shuffle=True, drop_last=True, options=options())
        assert len(list(loader)) == 1  # a third of the records is dropped
        last = plans[0].last
        assert max(clocks) == last[last != NEVER].max()
        assert len(dataset._source.leaves[0]._readers._open) == 0  # which would hold copies that others need room of
        del loader
        dataset.close()


@contextmanager
def too_small(folder: Path, packed: tuple[dict[str, bytes], int, int]) -> Iterator[tc.Cache]:
    """A cache of an eighth of the data set, and nothing said about that."""
    with tc.Cache(folder / "cache", size=packed[2] // 8, min_free=0) as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield cache


def read_dealt_anew(server: HttpFaultServer, cache: tc.Cache) -> tuple[tc.Dataset, tc.DataLoader]:
    """A data set and its loader, which has served an epoch and makes the next one ready, of other shards."""
    dataset = tc.Dataset(f"{server.url}/data", cache=cache)
    loader = tc.DataLoader(dataset, 16, shuffle=True, options=options(**DEALT_ANEW))
    assert sum(len(batch["id"]) for batch in loader) == N // 4
    return dataset, loader


def end_threads() -> None:
    for name in ("tiercache-plan", "tiercache-load", "tiercache-fetch"):
        for thread in threading.enumerate():
            if thread.name.startswith(name):
                thread.join(60)


def test_a_plan_that_is_ready_after_close_does_not_open_the_cache(server, packed, tmp_path, monkeypatch):
    closed, forecast = threading.Event(), epoch_module.make_reading_plan

    def forecast_late(*given):
        plan = forecast(*given)
        assert closed.wait(60)
        return plan

    monkeypatch.setattr(epoch_module, "make_reading_plan", forecast_late)
    monkeypatch.setattr(epoch_module, "QUICK_SHARDS", 1)  # so that a thread of its own makes it
    monkeypatch.setattr(NextEpoch, "prepare", lambda *_: None)
    with tc.Cache(tmp_path / "cache", size="64MiB", min_free=0) as cache:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        loader = tc.DataLoader(dataset, 16, shuffle=True, options=options())
        assert sum(len(batch["id"]) for batch in loader) == N
        del loader
        dataset.close()
    closed.set()
    end_threads()
    assert list((tmp_path / "cache" / "owners").iterdir()) == []


def test_a_plan_that_cannot_be_written_is_not_an_error(server, packed, tmp_path, monkeypatch):
    def refuse(self, plan):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OpenedVersion, "publish_plan", refuse)
    assert sorted(read_epoch(server, cache_of(tmp_path, packed, 2), 0)) == list(range(N))


@pytest.mark.parametrize("kind", ["view", "joined", "mixed", "views of one"])
def test_views_joined_and_mixed_data_sets_publish_what_they_read_of_each(server, packed, tmp_path, monkeypatch, kind):
    plans: list[tuple[str, ReadingPlan]] = []
    publish = OpenedVersion.publish_plan
    monkeypatch.setattr(
        OpenedVersion, "publish_plan", lambda self, plan: (plans.append((self.url, plan)), publish(self, plan))[1]
    )
    server.objects.update({key.replace("data/", "other/", 1): data for key, data in packed[0].items()})
    with tc.Cache(tmp_path / "cache", size="64MiB", min_free=0) as cache:
        one, two = (tc.Dataset(f"{server.url}/{name}", cache=cache) for name in ("data", "other"))
        half = one.select(range(N // 2))
        dataset = {"view": half, "joined": one + two, "mixed": tc.mix([one, two], [1, 1]), "views of one": half + one}[
            kind
        ]
        loader = tc.DataLoader(dataset, 16, shuffle=True, options=options())
        batches = iter(loader)
        next(batches)
        by_url, n_shards = dict(plans), len(one._source.leaves[0].table)
        assert len(by_url) == (1 if kind in ("view", "views of one") else 2)
        for plan in by_url.values():
            assert (np.diff(plan.shards) > 0).all()
            assert len(plan.shards) == (-(-n_shards // 2) if kind == "view" else n_shards)
        batches.close()
        del batches, loader
        for dataset in (one, two):
            dataset.close()


def test_preparing_an_epoch_stops_when_the_data_set_is_closed(server, packed, tmp_path, monkeypatch):
    in_begin, asked, closed = threading.Event(), threading.Event(), threading.Event()
    prepare, ahead = NextEpoch.prepare, NextEpoch.shards_ahead

    def beginning(self, *what):
        in_begin.set()
        prepare(self, *what)

    def late(self, n_bytes):
        found = ahead(self, n_bytes)
        if in_begin.is_set() and threading.current_thread().name == "tiercache-plan":
            asked.set()  # it knows what to prefetch, and has not begun to
            assert closed.wait(60)
        return found

    monkeypatch.setattr(NextEpoch, "prepare", beginning)
    monkeypatch.setattr(NextEpoch, "shards_ahead", late)
    with too_small(tmp_path, packed) as cache:
        dataset, _loader = read_dealt_anew(server, cache)  # kept: what it makes ready goes with it
        assert asked.wait(60)
        planner = next(thread for thread in threading.enumerate() if thread.name == "tiercache-plan")
        dataset.close()
    n_requests = len(server.log)
    closed.set()
    planner.join(60)
    assert len(server.log) == n_requests
    assert open_below(tmp_path / "cache") == []
    assert not [thread.name for thread in threading.enumerate() if "fetch" in thread.name]
