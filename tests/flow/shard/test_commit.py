"""Commits: races, lost responses of the store, and the content of the new version."""

from __future__ import annotations

import secrets
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.faults import Fault, FaultKind, FaultStore
from tests.support.stores import CountingStore, GateStore

from tiercache.errors import CommitConflict, SchemaError, StoreError
from tiercache.model import ShardInfo
from tiercache.shard import versions as manifest
from tiercache.shard.schema import Schema
from tiercache.shard.versions import MAX_SEGMENTS, Commit, Version, commit, encode_version, plan_merge, version_key
from tiercache.store import MemoryStore, Store

SCHEMA = Schema.of({"tokens": "int64", "caption": "str"})
VERSIONS = "_tiercache/versions/*"


def shard(n_records: int = 10) -> ShardInfo:
    shard_id = secrets.token_hex(16)
    return ShardInfo(f"shards/{shard_id}.tcs", shard_id, n_records, 4096, 7, 3000, 1000)


def names(store: Store) -> list[str]:
    return manifest.read_shards(store, manifest.latest(store)).names.to_pylist()


def append(store: Store, *infos: ShardInfo) -> Version:
    return commit(store, infos, schema=SCHEMA, mode="append")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(secrets.token_hex(8))


@pytest.fixture
def first(store: MemoryStore) -> Version:
    return commit(store, [shard(3)], schema=SCHEMA, mode="create")


class TestModes:
    def test_create_append_and_overwrite_make_consecutive_versions(self, store: MemoryStore) -> None:
        a, b, c, d = shard(1), shard(2), shard(3), shard(4)
        made = commit(store, [a], schema=SCHEMA, mode="create")
        grown = commit(store, [b, c], schema=SCHEMA, mode="append", parent=made, writer_id="w9")
        assert names(store) == [a.name, b.name, c.name]
        replaced = commit(store, [d], schema=Schema.of({"x": "bool"}), mode="overwrite", parent=grown)
        assert names(store) == [d.name]
        chain = [made, grown, replaced]
        assert [(v.number, v.parent, v.kind, v.n_records) for v in chain] == [
            (1, None, "create", 1),
            (2, 1, "append", 6),
            (3, 2, "overwrite", 4),
        ]
        assert len({v.dataset_id for v in chain}) == 1
        assert len({v.fingerprint for v in chain}) == len({v.nonce for v in chain}) == 3
        assert grown.writer == "w9"
        assert [manifest.read_version(store, n) for n in (1, 2, 3)] == chain
        assert grown.segments[0] == made.segments[0]
        assert store.get(manifest.HINT_KEY) == encode_version(replaced)

    def test_appending_no_shards_commits_nothing(self, store: MemoryStore, first: Version) -> None:
        assert append(store) == first
        assert manifest.list_versions(store) == [1]

    def test_a_large_segment_is_uploaded_in_parts(self, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MemoryStore, "min_part_bytes", 1000)
        counting = CountingStore(store)
        commit(counting, [shard() for _ in range(30)], schema=SCHEMA, mode="create")
        assert counting.n_calls("complete", "_tiercache/segments/*") == 1
        assert counting.n_calls("put_if_absent", VERSIONS) == 1
        assert len(names(store)) == 30


class TestSchemas:
    def test_an_append_of_another_schema_names_the_difference(self, store: MemoryStore, first: Version) -> None:
        for given_schema, column, message in (
            ({"tokens": "int64"}, "caption", "the data set has this column, but not the appended batch"),
            ({"tokens": "int64", "caption": "str", "x": "bool"}, "x", "but not the data set"),
            ({"tokens": "int32", "caption": "str"}, "tokens", "int64, the appended batch has int32"),
            ({"tokens": "int64?", "caption": "str"}, "tokens", r"int64, the appended batch has int64\?"),
            ({"caption": "str", "tokens": "int64"}, None, "another order: the data set has tokens, caption"),
        ):
            with pytest.raises(SchemaError, match=message) as failure:
                commit(store, [shard()], schema=Schema.of(given_schema), mode="append")
            assert failure.value.column == column
        assert manifest.list_versions(store) == [1]

    def test_a_schema_that_changed_during_an_append_is_an_error(self, store: MemoryStore, first: Version) -> None:
        gates = GateStore(store)
        with gates.stop_at("before_put_if_absent") as gate, ThreadPoolExecutor(1) as pool:
            racing = pool.submit(append, gates, shard())
            gate.wait_reached()
            commit(store, [shard()], schema=Schema.of({"other": "bool"}), mode="overwrite")
            gate.open()
        assert isinstance(racing.exception(), SchemaError)
        assert manifest.latest(store).number == 2


class TestRaces:
    def test_sixteen_concurrent_appends_are_all_committed(self, store: MemoryStore, first: Version) -> None:
        ours = [[shard() for _ in range(1 + i % 3)] for i in range(16)]
        start = threading.Barrier(16)

        def race(infos: list[ShardInfo]) -> Version:
            start.wait()
            return append(store, *infos)

        with ThreadPoolExecutor(16) as pool:
            assert sorted(version.number for version in pool.map(race, ours)) == list(range(2, 18))
        found = names(store)
        assert sorted(found[1:]) == sorted(info.name for infos in ours for info in infos)
        assert manifest.latest(store).n_records == 3 + 10 * sum(map(len, ours))
        for infos in ours:  # what was appended at once stays together and in order
            start_at = found.index(infos[0].name)
            assert found[start_at : start_at + len(infos)] == [info.name for info in infos]

    @pytest.mark.parametrize("mode", ["create", "append", "overwrite"])
    def test_the_loser_of_a_race_to_create_or_overwrite_gets_a_conflict(self, store: MemoryStore, mode: str) -> None:
        creating = mode == "create"
        parent = None if creating else commit(store, [shard()], schema=SCHEMA, mode="create")
        gates, late = GateStore(store), shard()
        losing = "create" if creating else "overwrite"
        with gates.stop_at("before_put_if_absent") as gate, ThreadPoolExecutor(1) as pool:
            call = pool.submit(commit, gates, [late], schema=SCHEMA, mode=losing, parent=parent)
            gate.wait_reached()
            winner = commit(store, [shard()], schema=SCHEMA, mode=mode, writer_id="winner")
            gate.open()
        assert isinstance(call.exception(), CommitConflict)
        assert call.exception().number == winner.number
        assert late.name not in names(store)
        assert manifest.latest(store) == winner

    def test_an_append_rebases_past_an_overwrite(self, store: MemoryStore, first: Version) -> None:
        replacement, added = shard(), shard()
        commit(store, [replacement], schema=SCHEMA, mode="overwrite")
        commit(store, [added], schema=SCHEMA, mode="append", parent=first)
        assert names(store) == [replacement.name, added.name]

    def test_an_append_rebases_once_past_many_other_appends(self, store: MemoryStore, first: Version) -> None:
        gates = GateStore(counting := CountingStore(store))
        with gates.stop_at("before_put_if_absent") as gate, ThreadPoolExecutor(1) as pool:
            late = pool.submit(append, gates, shard())
            gate.wait_reached()
            for _ in range(5):
                append(store, shard())
            gate.open()
        assert late.result().number == 7
        assert counting.n_calls("put_if_absent") == 2

    def test_an_append_is_not_committed_to_a_data_set_that_replaced_its_own(
        self, store: MemoryStore, first: Version
    ) -> None:
        store.delete([version_key(1), manifest.HINT_KEY])
        commit(store, [shard()], schema=SCHEMA, mode="create")
        with pytest.raises(CommitConflict, match="the data set was replaced"):
            commit(store, [shard()], schema=SCHEMA, mode="append", parent=first)

    def test_an_append_that_loses_every_race_ends_with_a_conflict(
        self, store: MemoryStore, first: Version, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(manifest, "MAX_REBASES", 5)

        class Crowd(CountingStore):
            """Somebody else always commits just before."""

            def put_if_absent(self, key: str, data: bytes) -> bool:
                append(store, shard())
                return super().put_if_absent(key, data)

        crowd = Crowd(store)
        with pytest.raises(CommitConflict, match="lost 5 races"):
            append(crowd, shard())
        assert crowd.n_calls("put_if_absent") == 5
        assert crowd.n_calls("put", "_tiercache/segments/*") == 1


def lost(verb: str, **facts: object) -> Fault:
    return Fault(verb, kind=FaultKind.LOST_RESPONSE, keys=VERSIONS, **facts)


class TestLostAnswers:
    @pytest.mark.parametrize("mode", ["create", "append", "overwrite"])
    def test_a_commit_whose_response_was_lost_is_recognised_as_our_own(self, store: MemoryStore, mode: str) -> None:
        if mode != "create":
            commit(store, [shard()], schema=SCHEMA, mode="create")
        faulty, ours = FaultStore(store, [lost("put_if_absent")]), shard()
        version = commit(faulty, [ours], schema=SCHEMA, mode=mode)
        assert faulty.faulted_calls
        assert manifest.latest(store) == version
        assert names(store).count(ours.name) == 1

    @pytest.mark.parametrize("n_closes", [1, 3])
    def test_a_commit_of_unknown_result_is_an_error_and_can_be_settled_later(
        self, store: MemoryStore, first: Version, n_closes: int
    ) -> None:
        faulty = FaultStore(store, [lost("put_if_absent"), Fault("get", keys=version_key(2), nth=2, times=n_closes)])
        ours = shard()
        landing = Commit(faulty, [ours], schema=SCHEMA, mode="append", parent=first)
        for _ in range(n_closes):
            with pytest.raises(StoreError, match=r"may have happened.*repeat the call") as failure:
                landing.run()
            assert (failure.value.maybe_done, failure.value.details["number"], failure.value.retryable) == (
                True,
                2,
                True,
            )
            assert failure.value.details["nonce"] == manifest.read_version(store, 2).nonce
        version = landing.run()
        assert version == landing.run() == manifest.latest(store)
        assert names(store)[1:] == [ours.name]
        assert manifest.list_versions(store) == [1, 2]

    def test_a_commit_of_unknown_result_that_lost_the_race_rebases_later(
        self, store: MemoryStore, first: Version
    ) -> None:
        class TimesOutOnce(CountingStore):
            def put_if_absent(self, key: str, data: bytes) -> bool:
                self.calls.append(("put_if_absent", key))
                if self.n_calls("put_if_absent") > 1:
                    return self.inner.put_if_absent(key, data)
                raise StoreError("timed out", url=self.url, retryable=True, maybe_done=True)

        faulty, ours = TimesOutOnce(FaultStore(store, [Fault("get", keys=version_key(2), nth=2)])), shard()
        landing = Commit(faulty, [ours], schema=SCHEMA, mode="append", parent=first)
        with pytest.raises(StoreError, match="may have happened"):
            landing.run()
        append(store, shard())
        assert landing.run().number == 3
        assert names(store)[2] == ours.name

    @given(data=st.data())
    def test_with_any_store_error_an_append_is_committed_once_or_not_at_all(self, data: st.DataObject) -> None:
        store = MemoryStore(secrets.token_hex(8))
        commit(store, [], schema=SCHEMA, mode="create")
        verbs = st.sampled_from(["get", "put", "put_if_absent", "read_into"])
        kinds = st.sampled_from([FaultKind.ERROR, FaultKind.LOST_RESPONSE])
        fault = st.builds(
            Fault, verb=verbs, nth=st.integers(1, 6), times=st.integers(1, 3), kind=kinds, retryable=st.booleans()
        )
        faulty = FaultStore(store, data.draw(st.lists(fault, max_size=5)))
        landed, unsure = [], []
        for _ in range(4):
            ours = shard()
            landing = Commit(faulty, [ours], schema=SCHEMA, mode="append")
            for _ in range(data.draw(st.integers(1, 4))):
                try:
                    landing.run()
                except StoreError as error:
                    maybe_done = error.maybe_done
                else:
                    landed.append(ours.name)
                    break
            else:
                unsure += [ours.name] if maybe_done else []
        found = names(store)
        assert len(set(found)) == len(found)
        assert set(landed) <= set(found) <= set(landed) | set(unsure)


class TestMerging:
    @given(appends=st.lists(st.integers(1, 50) | st.just(3000), min_size=MAX_SEGMENTS, max_size=300))
    def test_merging_keeps_segments_few_and_in_order_and_copies_rows_rarely(self, appends: list[int]) -> None:
        rows: list[list[int]] = []
        n_copied = n_merges = 0
        for i, n_rows in enumerate(appends):
            rows.append([i] * n_rows)
            start = plan_merge([len(segment) for segment in rows])
            if start < len(rows):
                assert start <= len(rows) // 2
                merged = [row for segment in rows[start:] for row in segment]
                rows[start:] = [merged]
                n_copied, n_merges = n_copied + len(merged), n_merges + 1
            assert len(rows) <= MAX_SEGMENTS
        assert [row for segment in rows for row in segment] == [i for i, n in enumerate(appends) for _ in range(n)]
        assert n_merges <= len(appends) // (MAX_SEGMENTS // 2)
        assert n_copied <= n_merges * sum(appends)
