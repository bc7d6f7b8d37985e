"""WebDataset: what is a sample, what is refused, and damage in headers."""

import tarfile

import pytest
from tests.support.layout_cases import add_file

import tiercache as tc
from tiercache.errors import CorruptShard, SchemaError, TierCacheError


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "default-cache"))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    return path


def write(path, *files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            add_file(tar, name, content)


def test_files_without_an_ending_and_of_tar_programs_are_no_samples(folder):
    write(
        folder / "a.tar",
        ("README", b"text"),
        (".hidden", b"x"),
        ("__info.x__", b"{}"),
        ("x/0.TXT", b"zero"),
        ("x/0.Seg.Cls", b"7"),
        ("x/1.txt", b"one"),
    )
    records = list(tc.Dataset(folder))
    assert records == [
        {"__key__": "x/0", "txt": "zero", "seg.cls": 7},
        {"__key__": "x/1", "txt": "one", "seg.cls": None},
    ]


def test_two_files_of_one_ending_in_a_sample_are_an_error(folder):
    write(folder / "a.tar", ("0.txt", b"a"), ("0.txt", b"b"))
    with pytest.raises(CorruptShard, match="two files 'txt'"):
        tc.Dataset(folder)


@pytest.mark.parametrize(("name", "mode"), [("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")])
def test_compressed_shards_are_refused_with_what_to_do(folder, name, mode):
    write(folder / name, ("0.txt", b"a"), mode=mode)
    with pytest.raises(SchemaError, match="decompress the shards"):
        tc.Dataset(folder)


def test_a_tar_without_samples_is_an_error(folder):
    write(folder / "a.tar", ("README", b"text"))
    with pytest.raises(SchemaError, match="no samples"):
        tc.Dataset(folder)


def test_a_damaged_header_in_the_middle_is_no_end(folder):
    write(folder / "a.tar", *((f"{i}.txt", b"abc") for i in range(9)))
    data = bytearray((folder / "a.tar").read_bytes())
    data[1024 * 5 + 3] ^= 1
    (folder / "a.tar").write_bytes(data)
    with pytest.raises(CorruptShard, match=r"a\.tar.*header at byte 5120 is damaged"):
        tc.Dataset(folder)


def test_text_where_a_number_is_expected_names_the_file(folder):
    write(folder / "a.tar", ("0.cls", b"cat"))
    with pytest.raises(TierCacheError, match=r"a\.tar"):
        list(tc.Dataset(folder))
