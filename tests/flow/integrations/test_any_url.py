"""The file system `tiercache::` over a target that counts: what is read of it and kept."""

from __future__ import annotations

import io

import fsspec
import pytest
from tests.flow.integrations.conftest import DATA, CountedFileSystem, stamped

import tiercache as tc

UNIT = 4096


# -- what is read of the source -------------------------------------------------------------------------------------


def test_a_second_read_fetches_no_byte(fs, source, path):
    assert fs.cat_file(path) == DATA
    assert source.n_bytes_read() == len(DATA)
    assert fs.cat_file(path) == DATA
    with fs.open(path) as file:
        assert file.read() == DATA
    assert source.n_bytes_read() == 0


def test_a_range_fetches_its_units_once_and_an_open_file_asks_once_for_its_identity(fs, source, path):
    assert fs.cat_file(path, 500_000, 510_000) == DATA[500_000:510_000]
    assert 10_000 <= source.n_bytes_read() <= 10_000 + 2 * UNIT
    assert fs.cat_file(path, 500_000, 510_000) == DATA[500_000:510_000]
    source.heads.clear()
    with fs.open(path) as file:
        file.seek(501_000)
        assert file.read(9000) == DATA[501_000:510_000]
    assert source.n_bytes_read() == 0
    assert source.heads == [path]


def test_only_sequential_small_reads_are_prefetched(fs, source, path):
    with fs.open(path) as file:
        for _ in range(100):
            file.read(1000)
    assert len(source.reads) < 12
    source.pipe_file("/b/y", DATA)
    with fs.open("/b/y") as file:
        for start in range(900_000, 500_000, -40_000):
            file.seek(start)
            assert file.read(100) == DATA[start : start + 100]
    assert sum(n_bytes for name, n_bytes in source.reads if name == "/b/y") <= 10 * 3 * UNIT


def test_contents_and_ranges_of_many_paths_are_kept(fs, source):
    expected = {f"/b/{number}": str(number).encode() * 9 for number in range(9)}
    for name, data in expected.items():
        source.pipe_file(name, data)
    assert fs.cat("/b/*") == expected
    source.n_bytes_read()
    paths, starts, ends = ["/b/1", "/b/2", "/b/1", "/b/3"], [0, 1, -5, 5], [3, 20, None, 5]
    assert fs.cat_ranges(paths, starts, ends) == [b"111", b"2" * 8, b"11111", b""]
    assert source.n_bytes_read() == 0
    assert fs.cat("/b/7") == b"7" * 9
    assert isinstance(fs.cat(["/b/7", "/b/none"], on_error="return")["/b/none"], FileNotFoundError)


def test_get_copies_files_out_of_the_cache(fs, source, path, tmp_path):
    seen = []

    class Callback(fsspec.callbacks.Callback):
        def call(self, *args, **kwargs):
            seen.append(self.value)

    fs.get_file(path, tmp_path / "new" / "x", callback=Callback())
    assert (tmp_path / "new" / "x").read_bytes() == DATA
    assert seen[-1] == len(DATA)
    source.n_bytes_read()
    whole = io.BytesIO()
    fs.get_file(path, whole)
    fs.get("/b", str(tmp_path / "tree"), recursive=True)
    assert whole.getvalue() == (tmp_path / "tree" / "x").read_bytes() == DATA
    assert source.n_bytes_read() == 0


# -- objects that change --------------------------------------------------------------------------------------------


def test_an_open_file_is_what_was_opened_and_uncached_bytes_of_a_replaced_object_are_an_error(fs, source, path):
    with fs.open(path) as opened:
        assert opened.read(10) == DATA[:10]
        source.pipe_file(path, DATA[::-1])
        opened.seek(900_000)
        with pytest.raises(tc.ObjectChanged, match=r"counted:///b/x"):
            opened.read(10)
        opened.seek(0)
        assert opened.read(10) == DATA[:10]
    assert fs.cat_file(path) == DATA[::-1], "another cached copy"


def test_cached_bytes_of_a_deleted_object_stay_readable(fs, source, path):
    with fs.open(path) as opened:
        assert opened.read(20_000) == DATA[:20_000]
        source.rm_file(path)
        opened.seek(0)
        assert opened.read(20_000) == DATA[:20_000]
        opened.seek(900_000)
        with pytest.raises(FileNotFoundError):
            opened.read(10)
    with pytest.raises(FileNotFoundError):
        fs.open(path)


def test_an_object_without_identity_bypasses_the_cache(fs, source, cache, path):
    for about in ({}, {"ETag": 'W/"1"'}, {"mode": 33188, "uid": 1}):
        CountedFileSystem.about = about
        source.pipe_file(path, DATA)
        for _ in range(2):
            assert fs.cat_file(path, 0, 10) == DATA[:10]
        assert source.n_bytes_read() == 20, about
        source.pipe_file(path, DATA[::-1])
        assert fs.cat_file(path) == DATA[::-1]
        with fs.open(path, "rb") as file:
            assert file.read() == DATA[::-1]
        source.n_bytes_read()
    assert cache.entries() == []


def test_each_field_that_changes_with_the_bytes_identifies_a_copy(fs, source, path):
    for before, after in [
        ({"ETag": '"1"'}, {"ETag": '"2"'}),
        ({"ETag": 'W/"1"', "LastModified": stamped(1)}, {"ETag": 'W/"1"', "LastModified": stamped(2)}),
        ({"Last-Modified": "Mon"}, {"Last-Modified": "Tue"}),
        ({"md5Hash": "a", "mtime": 1.5}, {"md5Hash": "b", "mtime": 1.5}),
    ]:
        CountedFileSystem.about = before
        source.pipe_file(path, DATA)
        assert fs.cat_file(path) == fs.cat_file(path) == DATA
        assert source.n_bytes_read() == len(DATA), before
        source.pipe_file(path, DATA[::-1])
        CountedFileSystem.about = after
        assert fs.cat_file(path) == DATA[::-1]
        assert source.n_bytes_read() == len(DATA), after


def test_an_option_that_may_select_the_object_bypasses_the_cache(fs, source, cache, path):
    assert fs.cat_file(path, version_id="1") == fs.cat_ranges([path], 0, None, version_id="1")[0] == DATA
    with fs.open(path, version_id="1") as file:
        assert file.read() == DATA
    assert cache.entries() == []
    with fs.open(path, block_size=1 << 20, cache_type="readahead", size=1) as file:
        assert file.read() == DATA
    assert len(cache.entries()) == 1


def test_writing_is_refused_and_the_error_names_the_way(fs, source, path, tmp_path):
    (tmp_path / "new").write_bytes(b"new")
    for write in (
        lambda: fs.open(path, "wb"),
        lambda: fs.open(path, "at"),
        lambda: fs.pipe({path: b"new"}),
        lambda: fs.put(str(tmp_path / "new"), path),
        lambda: fs.cp(path, "/b/y"),
        lambda: fs.mv(path, "/b/y"),
        lambda: fs.touch(path),
        lambda: fs.rm("/b", recursive=True),
        lambda: fs.makedirs("/c"),
    ):
        with pytest.raises(OSError, match="write to the URL without tiercache::"):
            write()
    assert source.cat_file(path) == DATA
    assert source.ls("/", detail=False) == ["/b"]
