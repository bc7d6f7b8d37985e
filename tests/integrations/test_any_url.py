"""The file system `tiercache::` over a target that counts: what is read of it, kept and dropped."""

from __future__ import annotations

import io

import fsspec
import pytest
from tests.integrations.conftest import DATA, CountedFileSystem, stamped

import tiercache as tc
from tiercache.model import ShardIdentity
from tiercache.store import open_store

UNIT = 4096


# -- what is read of the source -------------------------------------------------------------------------------------


def test_a_second_read_fetches_no_byte(fs, source, path):
    assert fs.cat_file(path) == DATA
    assert source.n_bytes_read() == len(DATA)
    assert fs.cat_file(path) == DATA
    with fs.open(path) as file:
        assert file.read() == DATA
    assert source.n_bytes_read() == 0


def test_a_range_fetches_its_units_once(fs, source, path):
    assert fs.cat_file(path, 500_000, 510_000) == DATA[500_000:510_000]
    assert 10_000 <= source.n_bytes_read() <= 10_000 + 2 * UNIT
    assert fs.cat_file(path, 500_000, 510_000) == DATA[500_000:510_000]
    with fs.open(path) as file:
        file.seek(501_000)
        assert file.read(9000) == DATA[501_000:510_000]
    assert source.n_bytes_read() == 0


def test_opening_a_file_asks_the_source_once_for_its_identity(fs, source, path):
    fs.cat_file(path)
    source.heads.clear()
    with fs.open(path) as file:
        file.read(10)
        file.seek(0)
        file.read()
    assert source.heads == [path]


def test_only_sequential_small_reads_are_prefetched(fs, source, path):
    with fs.open(path) as file:
        for _ in range(100):
            file.read(1000)
    assert len(source.reads) < 12
    source.reads.clear()
    with fs.open(path) as file:
        for start in range(900_000, 500_000, -40_000):
            file.seek(start)
            assert file.read(100) == DATA[start : start + 100]
    assert source.n_bytes_read() <= 10 * 3 * UNIT


def test_cat_ranges_asks_once_per_file_and_keeps_the_ranges(fs, source):
    for name in "abc":
        source.pipe_file(f"/b/{name}", DATA)
    paths = ["/b/a", "/b/b", "/b/a", "/b/c", "/b/none"]
    starts, ends = [0, 10, -5, 5, 0], [3, 20, None, 5, 1]
    for _ in range(2):
        source.heads.clear()
        *found, missing = fs.cat_ranges(paths, starts, ends)
        assert found == [DATA[:3], DATA[10:20], DATA[-5:], b""]
        assert isinstance(missing, FileNotFoundError)
    assert {name: source.heads.count(f"/b/{name}") for name in "abc"} == dict.fromkeys("abc", 1)
    assert source.n_bytes_read() <= 4 * 2 * UNIT
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges(["/b/none"], 0, 1, on_error="raise")
    with pytest.raises(ValueError, match="2 paths, 1 starts, 2 ends"):
        fs.cat_ranges(["/b/a", "/b/b"], [0], 1)


def test_cat_returns_the_contents_of_many_paths(fs, source):
    for number in range(20):
        source.pipe_file(f"/b/{number}", str(number).encode())
    expected = {f"/b/{number}": str(number).encode() for number in range(20)}
    assert fs.cat("/b/*") == fs.cat("/b", recursive=True) == expected
    source.n_bytes_read()
    assert fs.cat(list(expected)) == expected
    assert source.n_bytes_read() == 0
    assert fs.cat("/b/7") == b"7"
    assert fs.cat(["/b/7", "/b/none"], on_error="omit") == {"/b/7": b"7"}
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


def test_open_files_opens_files_in_parallel(source, cache, path):
    source.pipe_file("/b/y", b"second")
    for _ in range(2):
        with fsspec.open_files("tiercache::counted://b/*", cache=cache) as files:
            assert [file.read() for file in files] == [DATA, b"second"]
    assert source.n_bytes_read() == len(DATA) + 6
    with fsspec.open_files("tiercache::counted://new/*.txt", "wt", num=2, cache=cache) as files:
        for number, file in enumerate(files):
            file.write(f"text {number}")
    assert source.cat("/new/*") == {"/new/0.txt": b"text 0", "/new/1.txt": b"text 1"}
    fsspec.filesystem("tiercache", target_protocol="counted", cache=cache).close()
    type(fsspec.filesystem("tiercache", target_protocol="counted", cache=cache)).clear_instance_cache()


# -- objects that change --------------------------------------------------------------------------------------------


def test_a_replaced_object_is_another_cached_copy(fs, source, path):
    assert fs.cat_file(path) == DATA
    with fs.open(path) as opened:
        source.pipe_file(path, DATA[::-1])
        assert opened.read() == DATA, "an open file is what was opened"
    assert fs.cat_file(path) == DATA[::-1]


def test_uncached_bytes_of_a_replaced_object_are_an_error(fs, source, path):
    with fs.open(path) as opened:
        assert opened.read(10) == DATA[:10]
        source.pipe_file(path, DATA[::-1])
        opened.seek(900_000)
        with pytest.raises(tc.ObjectChanged, match=r"counted:///b/x"):
            opened.read(10)
        opened.seek(0)
        assert opened.read(10) == DATA[:10]


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


@pytest.mark.parametrize(
    "about",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"ETag": 'W/"1"'}, id="weak ETag alone"),
        pytest.param({"mode": 33188, "uid": 1}, id="what says nothing of bytes"),
    ],
)
def test_an_object_without_identity_bypasses_the_cache(fs, source, cache, path, about):
    CountedFileSystem.about = about
    for _ in range(2):
        assert fs.cat_file(path, 0, 10) == DATA[:10]
    assert source.n_bytes_read() == 20
    source.pipe_file(path, DATA[::-1])
    assert fs.cat_file(path) == DATA[::-1]
    with fs.open(path, "rb") as file:
        assert file.read() == DATA[::-1]
    assert cache.entries() == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ETag": '"1"'}, {"ETag": '"2"'}),
        ({"ETag": 'W/"1"', "LastModified": stamped(1)}, {"ETag": 'W/"1"', "LastModified": stamped(2)}),
        ({"Last-Modified": "Mon"}, {"Last-Modified": "Tue"}),
        ({"md5Hash": "a", "mtime": 1.5}, {"md5Hash": "b", "mtime": 1.5}),
    ],
)
def test_each_field_that_changes_with_the_bytes_identifies_a_copy(fs, source, path, before, after):
    CountedFileSystem.about = before
    assert fs.cat_file(path) == fs.cat_file(path) == DATA
    assert source.n_bytes_read() == len(DATA)
    source.pipe_file(path, DATA[::-1])
    CountedFileSystem.about = after
    assert fs.cat_file(path) == DATA[::-1]
    assert source.n_bytes_read() == len(DATA)


def test_an_option_that_may_select_the_object_bypasses_the_cache(fs, source, cache, path):
    assert fs.cat_file(path, version_id="1") == fs.cat_ranges([path], 0, None, version_id="1")[0] == DATA
    with fs.open(path, version_id="1") as file:
        assert file.read() == DATA
    assert cache.entries() == []
    with fs.open(path, block_size=1 << 20, cache_type="readahead", size=1) as file:
        assert file.read() == DATA
    assert len(cache.entries()) == 1


# -- writing --------------------------------------------------------------------------------------------------------


def _write_file(fs, tmp_path):
    with fs.open("/b/x", "wb") as file:
        file.write(b"new")


def _write_text(fs, tmp_path):
    with fs.open("/b/x", "wt") as file:
        file.write("new")


def _put(fs, tmp_path):
    (tmp_path / "new").write_bytes(b"new")
    fs.put(str(tmp_path / "new"), "/b/x")


def _put_file(fs, tmp_path):
    (tmp_path / "new").write_bytes(b"new")
    fs.put_file(str(tmp_path / "new"), "/b/x")


def _in_transaction(fs, tmp_path):
    with fs.transaction, fs.open("/b/x", "wb") as file:
        file.write(b"new")


WRITES = {
    "open": _write_file,
    "text": _write_text,
    "put": _put,
    "put_file": _put_file,
    "transaction": _in_transaction,
    "pipe_file": lambda fs, _: fs.pipe_file("/b/x", b"new"),
    "pipe": lambda fs, _: fs.pipe({"/b/x": b"new"}),
    "pipe by names": lambda fs, _: fs.pipe(path="tiercache::counted://b/x", value=b"new"),
    "write_bytes": lambda fs, _: fs.write_bytes("/b/x", b"new"),
    "cp": lambda fs, _: fs.cp("/b/new", "/b/x"),
    "cp_file": lambda fs, _: fs.cp_file("/b/new", "/b/x"),
    "mv": lambda fs, _: fs.mv("/b/new", "/b/x"),
    "touch": lambda fs, _: fs.touch("/b/x", truncate=True),
    "rm": lambda fs, _: fs.rm("/b/x"),
    "rm of a folder": lambda fs, _: fs.rm("/b", recursive=True),
    "rm by wildcard": lambda fs, _: fs.rm("/b/x*"),
    "rm of a list": lambda fs, _: fs.rm(["/b/x", "/b/new"]),
    "rm_file": lambda fs, _: fs.rm_file("/b/x"),
    "mv away": lambda fs, _: fs.mv("/b/x", "/b/z"),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_goes_to_the_target_and_drops_the_copy(fs, source, cache, path, write, tmp_path):
    source.pipe_file("/b/new", b"new")
    source.pipe_file("/c/x", b"other")
    fs.cat(["/b/x", "/c/x"])
    write(fs, tmp_path)
    assert [entry.source for entry in cache.entries()] == ["counted:///c/x"]
    if source.exists(path):
        assert source.store[path].getvalue() == fs.cat_file(path) in (b"new", b"")
    else:
        with pytest.raises(FileNotFoundError):
            fs.cat_file(path)


def test_a_write_drops_no_shard_of_a_data_set(fs, source, cache, path, tmp_path):
    (tmp_path / "shard").write_bytes(DATA)
    identity = ShardIdentity("d" * 32, "5" * 32, len(DATA), crc32c=_crc32c(DATA))
    cache.warm(open_store(str(tmp_path)), [("shard", identity)])
    fs.rm("/b", recursive=True)
    assert [entry.shard_id for entry in cache.entries()] == ["5" * 32]


def _crc32c(data):
    from tiercache._native.checksum import crc32c

    return crc32c(data)


def test_a_failed_write_is_the_targets_error(fs, source, path):
    with pytest.raises(FileExistsError):
        fs.pipe_file(path, b"new", mode="create")
    assert fs.cat_file(path) == DATA
