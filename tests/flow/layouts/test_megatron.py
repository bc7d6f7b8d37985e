"""Data sets of Megatron-LM, NeMo and GPT-NeoX: pairs of .bin and .idx files."""

import struct
from contextlib import suppress

import numpy as np
import pytest
from tests.support.token_and_arrow_cases import megatron_index, write_megatron_pair

import tiercache as tc
from tiercache.errors import CorruptShard, NotFound, SchemaError
from tiercache.layouts import megatron


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "default-cache"))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "data"
    made.mkdir()
    return made


DOCUMENTS = [[np.arange(5, dtype=np.int32)], [np.arange(3, dtype=np.int32)] * 2, [], [np.full(9, 7, np.int32)]]


@pytest.mark.parametrize("name", ["text_document", "text_document.bin", "text_document.idx"])
def test_a_pair_is_opened_by_the_prefix_that_megatron_uses_or_by_one_of_its_files(folder, name):
    write_megatron_pair(folder / "text_document", DOCUMENTS)
    write_megatron_pair(folder / "other", DOCUMENTS[:1])
    dataset = tc.Dataset(folder / name)
    assert [record["tokens"].tolist() for record in dataset] == [[0, 1, 2, 3, 4], [0, 1, 2] * 2, [], [7] * 9]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64"])
def test_tokens_keep_their_type(folder, dtype):
    write_megatron_pair(folder / "a", [[np.arange(100).astype(dtype)]])
    (record,) = tc.Dataset(folder)
    assert record["tokens"].dtype == dtype
    assert record["tokens"].tolist() == list(range(100))


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_an_index_that_is_read_in_pieces_gives_the_same_records(folder, monkeypatch, piece):
    monkeypatch.setattr(megatron, "_PIECE", piece)
    rng = np.random.default_rng(piece)
    documents = [
        [rng.integers(0, 99, n).astype(np.uint16) for n in rng.integers(0, 9, rng.integers(0, 4))] for _ in range(50)
    ]
    write_megatron_pair(folder / "a", documents)
    expected = [np.concatenate([np.zeros(0, np.uint16), *one]).tolist() for one in documents]
    assert [record["tokens"].tolist() for record in tc.Dataset(folder)] == expected


def test_documents_are_packed_into_sequences(folder):
    rng = np.random.default_rng(1)
    write_megatron_pair(folder / "a", [[rng.integers(0, 99, n).astype(np.int32)] for n in rng.integers(1, 60, 200)])
    dataset = tc.Dataset(folder)
    packed = tc.pack_sequences(dataset, "tokens", 64)
    n_tokens = sum(len(record["tokens"]) for record in dataset)
    batches = list(tc.DataLoader(packed, batch_size=4, options=tc.LoaderOptions(seed=1)))
    assert batches[0]["tokens"].shape == (4, 64)
    assert sum(batch["tokens"].numel() for batch in batches) >= n_tokens


DAMAGES = {
    "a negative length": megatron_index([5, -3, 7], [0, 1, 3]),
    "a sequence beyond the tokens": megatron_index([5, 3, 7], [0, 1, 3], pointers=[0, 20, 1 << 40]),
    "a negative pointer": megatron_index([5, 3, 7], [0, 1, 3], pointers=[0, -20, 32]),
    "overlapping sequences": megatron_index([5, 3, 7], [0, 1, 3], pointers=[0, 0, 32]),
    "borders out of order": megatron_index([5, 3, 7], [0, 2, 1, 3]),
    "borders beyond the sequences": megatron_index([5, 3, 7], [0, 1, 1 << 50]),
    "a negative border": megatron_index([5, 3, 7], [0, -1, 3]),
    "documents that begin late": megatron_index([5, 3, 7], [1, 2, 3]),
    "documents that end early": megatron_index([5, 3, 7], [0, 1, 2]),
    "no document": megatron_index([5, 3, 7], []),
    "more tokens than the other file": megatron_index([5, 3, 8], [0, 1, 3]),
    "fewer tokens than the other file": megatron_index([5, 3, 6], [0, 1, 3]),
    "a huge number of sequences": struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 2**64 - 1, 2**64 - 1) + bytes(200),
    "an index of fairseq, which has no documents": megatron_index([5, 3, 7], [0, 1, 3])[:-24],
    "only its first bytes": b"MMIDIDX\0\0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_an_error_that_names_the_file(folder, damage):
    (folder / "a.bin").write_bytes(bytes(60))
    (folder / "a.idx").write_bytes(DAMAGES[damage])
    with pytest.raises(CorruptShard, match=r"a\.(idx|bin)"):
        list(tc.Dataset(folder))


def test_an_index_of_any_length_is_read_or_refused(folder):
    write_megatron_pair(folder / "a", DOCUMENTS)
    whole = (folder / "a.idx").read_bytes()
    for n_bytes in range(9, len(whole)):
        (folder / "a.idx").write_bytes(whole[:n_bytes])
        with pytest.raises(CorruptShard, match=r"a\.idx"):
            list(tc.Dataset(folder))


def test_a_file_that_was_cut_after_its_index_was_made_is_an_error(folder):
    write_megatron_pair(folder / "a", DOCUMENTS)
    assert len(tc.Dataset(folder)) == 4
    (folder / "a.bin").write_bytes((folder / "a.bin").read_bytes()[:-8])
    with pytest.raises(CorruptShard, match=r"a\.bin.*has 72 bytes"):
        tc.Dataset(folder)


def test_an_index_that_changes_while_its_tokens_are_read_never_gives_other_records(folder):
    write_megatron_pair(folder / "a", DOCUMENTS)
    dataset = tc.Dataset(folder)
    index = bytearray((folder / "a.idx").read_bytes())
    index[34:38] = struct.pack("<i", -5)
    (folder / "a.idx").write_bytes(index)
    found = []
    with suppress(tc.TierCacheError):
        found = [record["tokens"].tolist() for record in dataset]
    assert found in ([], [[0, 1, 2, 3, 4], [0, 1, 2] * 2, [], [7] * 9])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"TNTIDX\0\0" + bytes(100), "TNTIDX.*mmap"),
        (megatron_index([5], [0, 1], "float32"), "unsupported type 7"),
        (megatron_index([5], [0, 1], version=2), "version 2"),
    ],
)
def test_other_formats_of_an_index_are_refused_with_their_names(folder, index, message):
    (folder / "a.bin").write_bytes(bytes(20))
    (folder / "a.idx").write_bytes(index)
    with pytest.raises(SchemaError, match=message):
        tc.Dataset(folder)


def test_pairs_of_different_types_are_refused_by_name(folder):
    write_megatron_pair(folder / "a", [[np.arange(3, dtype=np.int32)]])
    write_megatron_pair(folder / "b", [[np.arange(3, dtype=np.uint16)]])
    with pytest.raises(SchemaError, match=r"b\.bin.*uint16.*'a\.bin'"):
        tc.Dataset(folder)


def test_other_idx_files_are_not_taken_for_megatron(folder):
    (folder / "train.bin").write_bytes(bytes(100))
    (folder / "train.idx").write_text("0 100\n100 200\n")
    with pytest.raises(NotFound):
        tc.Dataset(folder)
