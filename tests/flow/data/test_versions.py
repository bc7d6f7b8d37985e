"""Versions: tags, and versions that were deleted."""

import pickle
import secrets

import numpy as np
import pytest
from tests.support.stores import GateStore

import tiercache as tc
from tiercache.errors import CommitConflict
from tiercache.shard.versions import (
    find_latest,
    list_versions,
    put_tag,
    read_tags,
    read_version,
    tag_key,
    version_key,
)
from tiercache.store import MemoryStore, open_store


@pytest.fixture
def url():
    """A data set of three versions with 10, 20 and 30 records."""
    url = f"memory://{secrets.token_hex(8)}/set"
    for number in range(3):
        with tc.Writer(url, schema={"x": "int64"}, mode="append" if number else "create") as writer:
            writer.write_batch({"x": np.arange(10) + 10 * number})
    return url


@pytest.fixture
def versions(url):
    return tc.Versions(url)


def tags_of(versions):
    return {v.number: v.tags for v in versions.list() if v.tags}


class TestTags:
    def test_a_data_set_is_opened_by_the_tag_of_a_version(self, url, versions):
        versions.tag("v1.0", 2)
        dataset = tc.Dataset(url, version="v1.0")
        assert (len(dataset), dataset.version) == (20, 2)
        versions.tag("v1.0", 3, replace=True)
        assert pickle.loads(pickle.dumps(dataset)).version == 2
        assert tc.Dataset(url, version="v1.0").version == 3

    def test_a_tag_names_the_newest_version_or_that_of_another_tag(self, versions):
        versions.tag("newest")
        versions.tag("old", 1)
        versions.tag("also-old", "old")
        assert tags_of(versions) == {1: ("also-old", "old"), 3: ("newest",)}

    def test_a_tag_is_moved_only_if_that_is_asked_for(self, versions):
        versions.tag("v1", 1)
        versions.tag("v1", 1)
        with pytest.raises(CommitConflict, match="the tag 'v1' names version 1 already"):
            versions.tag("v1", 2)
        versions.tag("v1", 2, replace=True)
        assert tags_of(versions) == {2: ("v1",)}

    def test_a_removed_tag_is_not_found_and_can_be_given_again(self, url, versions):
        versions.tag("best", 1)
        versions.untag("best")
        with pytest.raises(tc.NotFound, match="no tag 'best'"):
            tc.Dataset(url, version="best")
        with pytest.raises(tc.NotFound):
            versions.untag("best")
        versions.tag("best", 2)
        assert tags_of(versions) == {2: ("best",)}

    def test_an_error_names_a_similar_tag(self, url, versions):
        versions.tag("release-1")
        with pytest.raises(tc.NotFound, match="no tag 'relaese-1'; did you mean 'release-1'"):
            tc.Dataset(url, version="relaese-1")

    @pytest.mark.parametrize("name", ["", "7", "a/b", "../x", ".hidden", "a b", "x" * 101, "a\n"])
    def test_names_that_no_tag_can_have_are_refused(self, versions, name):
        with pytest.raises(ValueError, match=r"a tag is named by up to 100 letters"):
            versions.tag(name)
        assert tags_of(versions) == {}

    def test_a_version_that_does_not_exist_gets_no_tag(self, url, versions):
        with pytest.raises(tc.NotFound, match="no version 9; the newest is 3"):
            versions.tag("v9", 9)
        assert read_tags(open_store(url)) == []

    def test_a_damaged_tag_is_reported_with_its_url(self, url, versions):
        versions.tag("v1", 1)
        store = open_store(url)
        data = store.get(tag_key("v1"))
        store.put(tag_key("v1"), data.replace(b'"version":1', b'"version":2'))
        with pytest.raises(tc.CorruptShard, match=r"tags/v1.json"):
            tc.Dataset(url, version="v1")

    def test_a_version_that_is_deleted_while_it_is_tagged_gets_no_tag(self, url):
        store = GateStore(open_store(url))
        with store.stop_at("before_put_if_absent", "_tiercache/tags/*") as gate:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(1) as pool:
                tagging = pool.submit(put_tag, store, "late", 1)
                gate.wait_reached()
                store.inner.put(version_key(1), b"")
                gate.open()
                with pytest.raises(tc.NotFound, match="version 1 was deleted"):
                    tagging.result()
        assert read_tags(store) == []


class TestDeletedVersions:
    def test_a_deleted_version_is_not_found_and_not_listed(self, url, versions):
        store = open_store(url)
        store.put(version_key(2), b"")
        assert [v.number for v in versions.list()] == [1, 3]
        with pytest.raises(tc.NotFound, match=r"version 2 was deleted"):
            read_version(store, 2)
        assert tc.Dataset(url).version == 3

    def test_the_newest_version_is_found_past_deleted_ones_without_hint_and_listing(self, url):
        store = open_store(url)
        store.put(version_key(1), b"")
        store.put(version_key(2), b"")

        class Unlisted(MemoryStore):
            def list(self, prefix=""):
                raise tc.StoreError("this store cannot list", url=self.url)

        unlisted = Unlisted(store.name, store.prefix)
        unlisted.delete(["_tiercache/latest"])
        assert find_latest(unlisted).number == 3

    @pytest.mark.parametrize("mode", ["append", "overwrite"])
    def test_a_slow_writer_does_not_commit_under_the_number_of_a_deleted_version(self, url, mode):
        slow = tc.Writer(url, schema={"x": "int64"}, mode=mode)
        slow.write({"x": 99})
        for _ in range(2):
            with tc.Writer(url, mode="append") as writer:
                writer.write({"x": 1})
        store = open_store(url)
        store.put(version_key(4), b"")
        if mode == "append":
            slow.close()
            assert slow.version.number == 6
            assert tc.Dataset(url)[:]["x"].tolist() == [*range(30), 1, 1, 99]
        else:
            with pytest.raises(CommitConflict, match="version 5 was committed"):
                slow.close()
        assert 4 not in list_versions(store)
