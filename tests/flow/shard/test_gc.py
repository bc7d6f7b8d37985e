"""Garbage collection: what it removes, what it spares, and that nothing that is needed is ever removed."""

import os
import random
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from tests.support.clocked_store import ClockedStore
from tests.support.stores import GateStore

import tiercache as tc
from tiercache.errors import CommitConflict, CorruptShard, StoreError
from tiercache.model import ShardInfo
from tiercache.shard.gc import collect_garbage
from tiercache.shard.packings import begin_packing, find_packing
from tiercache.shard.schema import Schema
from tiercache.shard.versions import (
    PACKINGS_FOLDER,
    SEGMENTS_FOLDER,
    SHARDS_FOLDER,
    Commit,
    commit,
    delete_tag,
    latest,
    list_versions,
    put_tag,
    read_shards,
    read_tags,
    read_version,
    version_key,
)
from tiercache.shard.writer import shard_key
from tiercache.store import LocalFolder, placement_log
from tiercache.store.archive import S3StorageClasses
from tiercache.store.contract import WrapperStore
from tiercache.store.local import TEMP_PREFIX
from tiercache.store.placement_log import PlacementRow
from tiercache.waiting import wait_for

SCHEMA = Schema.of({"x": "int64"})
DAY_S = 86400.0
AGE_S = 7 * DAY_S


@pytest.fixture
def store():
    return ClockedStore(secrets.token_hex(8))


def put_shard(store, writer="", number=0):
    """Put an object that stands for a shard, and return its description."""
    key = shard_key(writer or secrets.token_hex(8), number)
    store.put(key, b"records")
    return ShardInfo(key, secrets.token_hex(16), 10, 7, 1, 3, 2)


def append(store, *infos):
    return commit(store, infos or [put_shard(store)], schema=SCHEMA, mode="append")


def create(store):
    return commit(store, [put_shard(store)], schema=SCHEMA, mode="create")


def collect(store, keep_versions=None, **more):
    return collect_garbage(store, older_than_s=AGE_S, keep_versions=keep_versions, **more)


def keys(store, folder):
    return {info.key for info in store.list(folder)}


def needed(store):
    """Return the keys of all segments and shards that the versions name; each of them must exist."""
    found = set()
    for number in list_versions(store):
        version = read_version(store, number)
        found |= {ref.key for ref in version.segments} | set(read_shards(store, version).names.to_pylist())
    return found


class TestWhatIsRemoved:
    def test_shards_and_segments_of_killed_writers_are_removed_when_they_are_old(self, store):
        create(store)
        left = [put_shard(store, "killed", number) for number in range(3)]
        store.put(f"{SEGMENTS_FOLDER}{'0' * 32}.arrow", b"rows")
        report = collect(store)
        assert (report.shards, report.segments, report.n_young) == ((), (), 4)
        store.advance(AGE_S)
        report = collect(store)
        assert report.shards == tuple(info.name for info in left)
        assert report.segments == (f"{SEGMENTS_FOLDER}{'0' * 32}.arrow",)
        assert report.n_bytes == 3 * 7 + 4
        assert keys(store, SHARDS_FOLDER) | keys(store, SEGMENTS_FOLDER) == needed(store)

    def test_a_data_set_in_the_folder_named_shards_keeps_its_own(self, tmp_path):
        for folder in (tmp_path, tmp_path / "shards"):
            tc.pack([{"x": 1}], folder)
        assert tc.Versions(tmp_path).gc(older_than="0s").shards == ()
        assert tc.Dataset(tmp_path / "shards")[0] == {"x": 1}

    def test_a_writer_that_still_writes_keeps_its_oldest_shards(self, store):
        create(store)
        infos = []
        for day in range(20):
            infos.append(put_shard(store, "slow", day))
            assert collect(store).shards == ()
            store.advance(DAY_S)
        append(store, *infos)
        store.advance(2 * AGE_S)
        assert collect(store).shards == ()
        assert needed(store) >= {info.name for info in infos}

    def test_old_versions_are_deleted_only_if_that_is_asked_for(self, store):
        create(store)
        for _ in range(5):
            commit(store, [put_shard(store)], schema=SCHEMA, mode="overwrite")
        put_tag(store, "release", 2)
        store.advance(AGE_S)
        assert collect(store) == collect(store)
        assert list_versions(store) == [1, 2, 3, 4, 5, 6]
        report = collect(store, keep_versions=2)
        assert (report.versions, len(report.shards), len(report.segments)) == ((1, 3, 4), 3, 3)
        assert list_versions(store) == [2, 5, 6]
        assert keys(store, SHARDS_FOLDER) | keys(store, SEGMENTS_FOLDER) == needed(store)

    def test_young_versions_are_kept_whatever_their_number(self, store):
        create(store)
        store.advance(AGE_S)
        append(store)
        append(store)
        assert collect(store, keep_versions=1).versions == (1,)

    def test_a_dry_run_removes_and_writes_nothing(self, store, monkeypatch):
        create(store)
        append(store)
        put_shard(store)
        store.advance(AGE_S)
        monkeypatch.setattr("time.time", lambda: store.now_s)
        before = {info.key: info.etag for info in store.list()}
        report = collect(store, keep_versions=1, dry_run=True)
        assert (report.versions, len(report.shards), len(report.segments)) == ((1,), 1, 0)
        assert {info.key: info.etag for info in store.list()} == before
        assert collect(store, keep_versions=1) == report

    def test_files_of_others_are_left_alone(self, store):
        create(store)
        others = ("shards/notes.txt", "shards/table.tcs", "readme.md", "_tiercache/own.json", "_tiercache/segments/x")
        for key in others:
            store.put(key, b"mine")
        store.advance(AGE_S)
        collect(store, keep_versions=1)
        assert {info.key for info in store.list()} >= set(others)

    def test_the_shards_of_a_packing_that_may_go_on_stay_and_those_of_an_abandoned_one_are_removed(self, store):
        create(store)
        packing = begin_packing(store, "a" * 32, {"": 1})
        infos = [put_shard(store), put_shard(store)]
        packing.finish(0, {"": infos[:1]})
        store.advance(AGE_S - 1)
        packing.finish(1, {"": infos[1:]})
        store.advance(AGE_S - 1)
        assert (collect(store).shards, collect(store).n_young) == ((), 2)
        begin_packing(store, "a" * 32, {"": 1})  # the same command goes on
        store.advance(AGE_S - 1)
        assert (collect(store).shards, collect(store).packings) == ((), ())
        store.advance(1)
        report = collect(store)
        assert (set(report.shards), report.packings) == ({info.name for info in infos}, ("a" * 32,))
        assert find_packing(store, "a" * 32) is None

    def test_an_old_packing_that_commits_just_before_its_records_are_removed_keeps_its_shards(self, store):
        create(store)
        packing, infos = begin_packing(store, "a" * 32, {"": 1}), [put_shard(store)]
        packing.finish(0, {"": infos})
        store.advance(AGE_S)
        gated = GateStore(store)
        with gated.stop_at("before_delete", f"{PACKINGS_FOLDER}*") as gate, ThreadPoolExecutor(1) as pool:
            collecting = pool.submit(collect, gated)
            gate.wait_reached()
            append(store, *packing.finished()[0][""])
            gate.open()
            assert collecting.result().shards == ()
        assert needed(store) >= {infos[0].name}
        assert needed(store) <= keys(store, "")

    def test_a_packing_of_several_data_sets_has_its_records_in_the_folder_above_them(self, store):
        above, name = ClockedStore(store.name, "sets"), "train"
        train = ClockedStore(store.name, "sets/train")
        create(train)
        packing = begin_packing(above, "a" * 32, {"train": 1, "val": 1})
        infos = [put_shard(train)]
        store.advance(AGE_S)
        packing.finish(0, {name: infos, "val": [put_shard(store)]})
        assert collect(train).shards == ()
        store.advance(AGE_S)
        assert collect(train).shards == (infos[0].name,)
        assert find_packing(above, "a" * 32) is None

    def test_temporary_files_of_a_local_folder_are_removed_when_they_are_old(self, tmp_path):
        store = LocalFolder(tmp_path)
        create(store)
        old, young = (tmp_path / "shards" / f"{TEMP_PREFIX}{name}" for name in ("old", "young"))
        for file in (old, young):
            file.write_bytes(b"part")
        past_s = old.stat().st_mtime - AGE_S
        os.utime(old, (past_s, past_s))
        report = collect(store)
        assert (report.uploads, report.n_bytes) == ((f"shards/{TEMP_PREFIX}old",), 4)
        assert (old.exists(), young.exists()) == (False, True)


class TestRefusals:
    def test_where_there_is_no_data_set_nothing_is_removed(self, store):
        put_shard(store)
        store.advance(AGE_S)
        with pytest.raises(tc.NotFound, match="there are shards, but no version"):
            collect(store)
        assert len(keys(store, SHARDS_FOLDER)) == 1

    @pytest.mark.parametrize("what", ["version", "segment", "tag"])
    def test_what_a_damaged_object_needs_is_unknown_so_nothing_is_removed(self, store, what):
        first = create(store)
        append(store)
        put_tag(store, "v1", 1)
        put_shard(store)
        store.advance(AGE_S)
        key = {"version": version_key(1), "segment": first.segments[0].key, "tag": "_tiercache/tags/v1.json"}[what]
        store.put(key, store.get(key)[:-9] + b"x" * 9)
        before = keys(store, "")
        with pytest.raises(CorruptShard):
            collect(store, keep_versions=1 if what == "tag" else None)
        assert keys(store, "") == before

    def test_a_tier_that_is_not_the_home_names_the_home(self, store):
        create(store)
        placement_log.lead_to_home(store, "s3://bucket/home")
        with pytest.raises(StoreError, match=r"tier of the data set at s3://bucket/home"):
            collect(store)

    def test_shards_that_were_moved_to_other_tiers_are_reported_and_left(self, store):
        create(store)
        commit(store, [put_shard(store)], schema=SCHEMA, mode="overwrite")
        (moved,) = read_shards(store, read_version(store, 1)).names.to_pylist()
        placement_log.start_tracking(store)
        placement_log.commit_placement(store, {moved: PlacementRow(moved, "s3://cold/set", n_bytes=7)})
        store.advance(AGE_S)
        report = collect(store, keep_versions=1)
        assert (report.versions, report.shards, report.elsewhere) == ((1,), (), (moved,))
        assert moved in keys(store, SHARDS_FOLDER)

    @pytest.mark.parametrize("options", [{"keep_versions": 0}, {"older_than_s": -1.0}])
    def test_invalid_arguments_are_refused(self, store, options):
        create(store)
        with pytest.raises(ValueError, match=next(iter(options)).removesuffix("_s")):
            collect_garbage(store, **{"older_than_s": AGE_S, **options})


class Interleaved(WrapperStore):
    """A store that lets others act before the calls that the test's thread makes through it."""

    def __init__(self, inner, act):
        super().__init__(inner)
        self.act = act

    def around(self, method, key, call):
        if threading.current_thread() is threading.main_thread():
            self.act()
        return call()


@dataclass
class LiveWriter:
    mode: str
    parent: object
    last_s: float
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    infos: list = field(default_factory=list)
    packing: object = None


class World:
    """Writers, readers, tags and collections over one data set, at random times and between each other's calls."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.store = ClockedStore(f"gc-{seed}-{secrets.token_hex(4)}")
        create(self.store)
        self.writers = []
        self.readers = {}  # by the version that they read: the keys that it named when they opened it
        self.n_collections = self.n_removed = self.n_deleted = 0

    def act(self):
        """Do one random thing."""
        acts = [self.begin, self.write, self.commit, self.kill, self.tag, self.untag, self.read, self.wait, self.wait]
        self.random.choice(acts)()

    def begin(self):
        mode = self.random.choice(["append", "append", "overwrite", "drop"])
        writer = LiveWriter(mode, latest(self.store), self.store.now_s)
        if mode != "drop" and self.random.random() < 0.4:
            writer.packing = begin_packing(self.store, secrets.token_hex(16), {"": 1})
        self.writers.append(writer)

    def write(self):
        if self.writers:
            self.write_of(self.random.choice(self.writers))

    def write_of(self, writer):
        """Write a shard; in a packing, each task has a writer of its own, and a record."""
        number = len(writer.infos)
        name = secrets.token_hex(8) if writer.packing else writer.name
        if writer.mode == "drop":  # writes what is left of each shard with a writer of its own
            name, number = f"{writer.name}-{number:06d}", 0
        writer.infos.append(put_shard(self.store, name, number))
        if writer.packing:
            writer.packing.finish(number, {"": writer.infos[-1:]})
        writer.last_s = self.store.now_s

    def commit(self):
        if self.writers:
            self.commit_of(self.writers.pop(self.random.randrange(len(self.writers))))

    def commit_of(self, writer):
        if writer.mode == "drop":
            base = latest(self.store)
            kept = [info for info in read_shards(self.store, base).infos() if self.random.random() < 0.7]
            options = {"schema": SCHEMA, "mode": "overwrite", "kind": "drop", "parent": base}
            Commit(self.store, [*kept, *writer.infos], **options).run()
            return
        try:
            made = Commit(self.store, writer.infos, schema=SCHEMA, mode=writer.mode, parent=writer.parent).run()
            assert made.number == list_versions(self.store)[-1]
        except CommitConflict:
            assert writer.mode == "overwrite"
        if writer.packing:
            writer.packing.remove()

    def kill(self):
        if self.writers and self.random.random() < 0.3:
            self.writers.pop(self.random.randrange(len(self.writers)))

    def tag(self):
        numbers = list_versions(self.store)
        number = self.random.choice([numbers[0], numbers[0], *numbers])  # the oldest are deleted next
        with suppress(CommitConflict, tc.NotFound):
            put_tag(self.store, self.random.choice("abc"), number, replace=self.random.random() < 0.8)

    def untag(self):
        if (tags := read_tags(self.store)) and self.random.random() < 0.5:
            delete_tag(self.store, self.random.choice(tags).name)

    def read(self):
        number = self.random.choice(list_versions(self.store))
        version = read_version(self.store, number)
        self.readers[number] = {ref.key for ref in version.segments} | set(
            read_shards(self.store, version).names.to_pylist()
        )

    def wait(self):
        """Let time pass; a writer that would pause for longer than the age writes or commits before."""
        duration_s = self.random.choice([3600, DAY_S, 3 * DAY_S, 6 * DAY_S])
        while late := [w for w in self.writers if self.store.now_s + duration_s - w.last_s >= AGE_S]:
            if self.random.random() < 0.7:
                self.write_of(late[0])
            else:
                self.writers.remove(late[0])
                self.commit_of(late[0])
        self.store.advance(duration_s)

    def collect(self, *, between):
        store = self.store
        if between:
            # The actors must not advance the clock between gc's look at it and its end: that is the age's slack.
            def act():
                if self.random.random() < 0.5:
                    acts = [self.begin, self.write, self.commit, self.tag, self.tag, self.tag, self.untag, self.read]
                    self.random.choice(acts)()

            store = Interleaved(self.store, act)
        report = collect_garbage(store, older_than_s=AGE_S, keep_versions=self.random.choice([None, 1, 1, 2]))
        self.n_collections += 1
        self.n_removed += len(report.shards)
        self.n_deleted += len(report.versions)

    def check(self):
        numbers = list_versions(self.store)
        everything = keys(self.store, "")
        assert needed(self.store) <= everything
        assert {tag.number for tag in read_tags(self.store)} <= set(numbers)
        for number, wanted in self.readers.items():
            assert number not in numbers or wanted <= everything
        for writer in self.writers:
            assert {info.name for info in writer.infos} <= everything


@pytest.mark.parametrize("seed", range(20))
def test_nothing_that_a_version_a_tag_a_reader_or_a_live_writer_needs_is_removed(seed):
    world = World(seed)
    for _ in range(20):
        for _ in range(world.random.randrange(20)):
            world.act()
        world.collect(between=world.random.random() < 0.7)
        world.check()
    world.writers.clear()
    world.store.advance(2 * AGE_S)
    world.collect(between=False)
    world.check()
    left = keys(world.store, SHARDS_FOLDER) | keys(world.store, SEGMENTS_FOLDER) | keys(world.store, PACKINGS_FOLDER)
    assert left == needed(world.store)


def test_the_random_worlds_remove_shards_and_delete_versions():
    world = World(1)
    for _ in range(40):
        for _ in range(8):
            world.act()
        world.collect(between=True)
    assert min(world.n_collections, world.n_removed, world.n_deleted) > 3


@pytest.mark.s3
def test_parts_of_killed_uploads_are_removed_when_they_are_old(s3_server):
    store = s3_server.store("gc-parts")
    create(store)
    classes = S3StorageClasses(store)
    for key in ("shards/killed-000000.tcs", "notes/of-another-program"):
        upload = classes.create(key)
        upload.put_part(0, bytes(5 << 20))
        upload.put_part(1, b"end")
    assert collect(store).uploads == ()
    # The server rounds times to seconds, so an upload may seem to begin after now.
    wait_for(lambda: collect_garbage(store, older_than_s=0).uploads == ("shards/killed-000000.tcs",), deadline_s=30)
    assert [upload.key for upload in classes.unfinished_uploads()] == ["notes/of-another-program"]
    assert needed(store) <= keys(store, "")
    classes.close()
