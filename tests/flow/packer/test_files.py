"""Which files a source has."""

import gzip
import pickle

import pytest
from tests.support.http_server import HttpFault, HttpFaultServer

import tiercache as tc
from tiercache.errors import NotFound
from tiercache.packer.files import StoreFiles, find_files, selected
from tiercache.store import open_store


@pytest.fixture
def folder(tmp_path):
    for path in ("a/1.txt", "a-b/1.txt", "a/.hidden", ".git/x", "b/deep/2.txt", "top.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    return tmp_path


def paths(source, **options):
    return [f.path for f in find_files(source, options)[1]]


def test_visible_files_are_listed_folder_by_folder(folder, monkeypatch):
    assert paths(folder) == ["a/1.txt", "a-b/1.txt", "b/deep/2.txt", "top.txt"]
    assert paths(f"file://{folder}") == paths(folder)
    (folder / "a b").mkdir()
    (folder / "a b" / "x[1].txt").write_text("")  # a name that looks like a glob
    assert paths(f"file://{folder}/a%20b") == paths(folder / "a b" / "x[1].txt") == ["x[1].txt"]
    monkeypatch.chdir(folder)
    files, found, _ = find_files("a/1.txt", {})
    assert [(f.path, f.n_bytes) for f in found] == [("1.txt", 7)]
    assert files.location("1.txt") == str(folder / "a" / "1.txt")


def test_links_are_followed_but_not_in_a_loop(folder):
    (folder / "link.txt").symlink_to(folder / "top.txt")
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "c").symlink_to(folder / "a")
    assert [p for p in paths(folder) if not p.startswith("b/loop")] == [
        "a/1.txt",
        "a-b/1.txt",
        "b/deep/2.txt",
        "c/1.txt",
        "link.txt",
        "top.txt",
    ]
    assert len(paths(folder)) < 20


def test_a_glob_matches_segment_by_segment(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for glob, expected in (
        ("*.txt", ["top.txt"]),
        ("*/*.txt", ["a/1.txt", "a-b/1.txt"]),
        ("**/*.txt", ["a/1.txt", "a-b/1.txt", "b/deep/2.txt", "top.txt"]),
        ("[ab]/**", ["a/1.txt", "b/deep/2.txt"]),
        ("?/1.txt", ["a/1.txt"]),
    ):
        assert paths(f"{folder}/{glob}") == paths(glob) == expected
    for missing in ("gone", "gone/*.txt", "*.parquet"):
        with pytest.raises(NotFound, match=r"no such file or folder|no file matches"):
            find_files(folder / missing, {})


def test_objects_of_a_store_are_read_like_files():
    store = open_store("memory://test-pack-files/in")
    store.put("x/2.bin", b"0123456789" * 1000)
    store.put("x/1.bin", gzip.compress(b"unpacked"))
    store.put(".hidden/3", b"")
    assert paths("memory://test-pack-files/in") == ["x/1.bin", "x/2.bin"]
    assert paths("memory://test-pack-files/in/*/2.*") == ["x/2.bin"]
    files, found, _ = find_files("memory://test-pack-files/in/x/2.bin", {})
    assert isinstance(files, StoreFiles)
    assert [f.path for f in found] == ["2.bin"]
    files = pickle.loads(pickle.dumps(files))
    with files.open("2.bin") as file:
        file.seek(-5, 2)
        assert (file.read(), file.read(), file.tell()) == (b"56789", b"", 10000)
        file.seek(3)
        assert file.read(4) == b"3456"
    files = StoreFiles("memory://test-pack-files/in", {})
    assert list(files.read_many(["x/2.bin", "x/1.bin"])) == [store.get("x/2.bin"), store.get("x/1.bin")]
    assert files.location("x/1.bin") == "memory://test-pack-files/in/x/1.bin"


def test_include_and_exclude():
    for path, include, exclude, expected in (
        ("a/b.jpg", [], [], True),
        ("a/b.jpg", ["*.jpg"], [], True),
        ("a/b.jpg", ["*.png"], [], False),
        ("a/b.jpg", ["*.png", "a/*"], [], True),
        ("a/b.jpg", ["a"], [], True),
        ("a/b.jpg", [], ["a"], False),
        ("a/c/b.jpg", ["a/*.jpg"], [], True),
        ("a/b.jpg", ["*"], ["*.jpg"], False),
        ("a/b.jpg", ["b"], [], False),
    ):
        assert selected(path, include, exclude) is expected


def test_one_file_is_packed_although_the_store_refuses_all_other_keys(tmp_path):
    with HttpFaultServer({"rows.jsonl": b'{"x": 1}\n{"x": 2}\n'}) as server:
        server.when(lambda _, path: None if path == "/rows.jsonl" else HttpFault("status", 403))
        tc.pack(f"{server.url}/rows.jsonl", tmp_path / "out")
    assert [record["x"] for record in tc.Dataset(tmp_path / "out")] == [1, 2]
