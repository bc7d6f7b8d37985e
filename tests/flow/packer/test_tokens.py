"""Packing of text as tokens: by bytes, and by tokenizers of the packages tokenizers and tiktoken."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiercache as tc
from tiercache.packer.tokens import find_tokenizer

TEXTS = ["", "a", "zwei Wörter", "def f():\n\treturn '\U0001f600'\n", "<|end|> as text", "long " * 5000]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"n": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    return path


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 0)]
    )
    tokenizer.enable_truncation(4)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_bytes_of_each_document_are_its_tokens_and_other_columns_stay(lines, tmp_path):
    tc.pack(lines, tmp_path / "set", tokenize="bytes")
    data = tc.Dataset(tmp_path / "set")
    assert data.schema.names == ("n", "tokens")
    assert [bytes(record["tokens"].tolist()).decode() for record in data] == TEXTS
    assert [record["n"] for record in data] == list(range(len(TEXTS)))
    assert data[1]["tokens"].dtype == np.uint16


def test_the_schema_of_a_data_set_keeps_the_tokenizer_and_appending_with_another_one_is_refused(
    lines, tmp_path, tokenizer_file
):
    tc.pack(lines, tmp_path / "set", tokenize="bytes")
    column = tc.Dataset(tmp_path / "set").schema.columns[1]
    assert column.tokenizer == {"name": "bytes", "vocabulary": 256}
    assert tc.Dataset(tmp_path / "set", cast={"tokens": "int64"}).schema.columns[1].tokenizer == column.tokenizer
    tc.pack(lines, tmp_path / "set", tokenize="bytes", mode="append")
    with pytest.raises(tc.SchemaError):
        tc.pack(lines, tmp_path / "set", tokenize=str(tokenizer_file), mode="append")
    assert len(tc.Dataset(tmp_path / "set")) == 2 * len(TEXTS)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_document_has_the_tokens_of_itself_alone_without_special_tokens(lines, tmp_path, tokenizer_file, workers):
    tokenizers = pytest.importorskip("tokenizers")
    alone = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    alone.no_truncation()
    alone.encode_special_tokens = True
    copies = tmp_path / "copies"
    copies.mkdir()
    for n in range(3):
        (copies / f"{n}.jsonl").write_text(lines.read_text())
    tc.pack(copies, tmp_path / "set", tokenize=str(tokenizer_file), workers=workers, shard_size="16KiB")
    data = tc.Dataset(tmp_path / "set")
    assert len(data) == 3 * len(TEXTS)
    for n, record in enumerate(data):
        assert record["tokens"].tolist() == alone.encode(TEXTS[n % len(TEXTS)], add_special_tokens=False).ids
    assert 0 not in data[4]["tokens"]  # <|end|>


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8))
@settings(max_examples=50, deadline=None)
def test_random_unicode_comes_back_from_its_tokens(tokenizer_file, texts):
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    plain.decoder = tokenizers.decoders.ByteLevel()
    encoded = map(find_tokenizer(str(tokenizer_file)).encode, texts)
    assert [plain.decode(tokens.tolist(), skip_special_tokens=False) for tokens in encoded] == texts


def test_a_vocabulary_of_tiktoken_is_named_by_its_prefix(lines, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"lo": 256, b"ng": 257, b"long": 258}
    encoding = tiktoken.Encoding("tiny", pat_str=r"\S+|\s", mergeable_ranks=ranks, special_tokens={"<|end|>": 70000})
    tiktoken.registry.ENCODINGS["tiny"] = encoding
    try:
        tc.pack(lines, tmp_path / "set", tokenize="tiktoken:tiny")
    finally:
        del tiktoken.registry.ENCODINGS["tiny"]
    data = tc.Dataset(tmp_path / "set")
    assert [record["tokens"].tolist() for record in data] == [encoding.encode_ordinary(text) for text in TEXTS]
    assert data[0]["tokens"].dtype == np.int32


def test_nulls_of_a_parquet_column_stay_nulls(tmp_path):
    pq.write_table(pa.table({"body": ["ab", None, "", "c"], "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    tc.pack(tmp_path / "a.parquet", tmp_path / "set", tokenize="bytes", text_column="body")
    tokens = [record["tokens"] for record in tc.Dataset(tmp_path / "set")]
    assert tokens[1] is None
    assert [list(t) for t in tokens if t is not None] == [[97, 98], [], [99]]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "code").mkdir(parents=True)
    (folder / "a.txt").write_bytes("Wörter\r\n".encode())
    (folder / "code/b.py").write_text("print()\n")
    (folder / "code/empty.c").write_text("")
    return folder


def test_each_file_of_a_folder_of_text_is_a_document_with_its_path(corpus, tmp_path):
    tc.pack(corpus, tmp_path / "set")
    records = [(record["path"], record["text"]) for record in tc.Dataset(tmp_path / "set")]
    assert records == [("a.txt", "Wörter\r\n"), ("code/b.py", "print()\n"), ("code/empty.c", "")]


def test_a_file_that_is_not_utf8_is_named_with_the_place(corpus, tmp_path):
    (corpus / "latin.txt").write_bytes("Wörter".encode("latin-1"))
    with pytest.raises(tc.SchemaError, match=r"latin\.txt: not text in UTF-8: byte 0xf6 at offset 1; .*exclude="):
        tc.pack(corpus, tmp_path / "set", tokenize="bytes")
    tc.pack(corpus, tmp_path / "set", tokenize="bytes", exclude=["latin.txt"])
    assert len(tc.Dataset(tmp_path / "set")) == 3


def test_files_of_other_names_are_text_only_if_the_kind_says_so(corpus, tmp_path):
    (corpus / "Makefile").write_text("all:\n")
    with pytest.raises(ValueError, match="kind="):
        tc.pack(corpus, tmp_path / "set")
    tc.pack(corpus, tmp_path / "set", kind="text")
    assert len(tc.Dataset(tmp_path / "set")) == 4


def test_a_readme_beside_tables_is_not_packed_as_text(lines, tmp_path):
    (tmp_path / "README.md").write_text("about")
    with pytest.warns(UserWarning, match=r"README\.md"):
        tc.pack(tmp_path, tmp_path.parent / "beside", tokenize="bytes")
    assert len(tc.Dataset(tmp_path.parent / "beside")) == len(TEXTS)


def test_half_of_a_surrogate_pair_is_an_error_that_names_the_record(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b\\ud800"}\n')
    with pytest.raises(tc.SchemaError, match=r"texts\.jsonl.*surrogate"):
        tc.pack(path, tmp_path / "set", tokenize="bytes")


def test_a_missing_text_column_lists_the_columns_of_text(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"body": "a", "n": 1}\n')
    with pytest.raises(tc.SchemaError, match=r"text_column=: 'body'"):
        tc.pack(path, tmp_path / "set", tokenize="bytes")


def test_a_missing_tokenizer_file_is_named(lines, tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*missing\.json"):
        tc.pack(lines, tmp_path / "set", tokenize=str(Path(tmp_path, "missing.json")))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("name", "package"), [("gpt2", "tokenizers"), ("tiktoken:gpt2", "tiktoken")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(lines, tmp_path, name, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        tc.pack(lines, tmp_path / "set", tokenize=name)


def test_bad_documents_are_left_out_on_request_and_listed_in_the_report(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a", "n": 1}\n{"text": "b\\ud800", "n": 2}\n{"text": "c", "n": 3}\n')
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin/a.txt").write_bytes(b"W\xf6rter")
    (tmp_path / "latin/b.txt").write_text("b")
    for source, kept in ((path, ["a", "c"]), (tmp_path / "latin", ["b"])):
        url = tmp_path / f"{source.name}-set"
        with pytest.warns(UserWarning, match="1 bad records"):
            tc.pack(source, url, tokenize="bytes", on_error="skip")
        assert [bytes(r["tokens"].tolist()).decode() for r in tc.Dataset(url)] == kept
    assert [record["n"] for record in tc.Dataset(tmp_path / "texts.jsonl-set")] == [1, 3]


def test_text_of_a_python_object_becomes_tokens(tmp_path):
    tc.pack(pa.table({"text": ["ab", "c"], "n": [1, 2]}), tmp_path / "set", tokenize="bytes")
    records = [(record["tokens"].tolist(), int(record["n"])) for record in tc.Dataset(tmp_path / "set")]
    assert records == [([97, 98], 1), ([99], 2)]


def _records(number):
    yield {"text": "a" * number, "n": number}
    yield {"text": "b", "n": number}


def test_text_of_the_records_of_a_function_becomes_tokens_for_any_number_of_workers(tmp_path):
    for workers in (1, 2):
        tc.pack(_records, [0, 3], tmp_path / f"{workers}", tokenize="bytes", workers=workers)
        records = [(bytes(r["tokens"].tolist()), int(r["n"])) for r in tc.Dataset(tmp_path / f"{workers}")]
        assert records == [(b"", 0), (b"b", 0), (b"aaa", 3), (b"b", 3)]


def test_a_document_whose_other_column_is_bad_is_in_the_report_with_its_tokens(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a", "n": 1}\n{"text": "b", "n": "x"}\n{"text": "c", "n": 3}\n')
    with pytest.warns(UserWarning, match="1 bad records"):
        tc.pack(path, tmp_path / "set", schema={"n": "int64"}, tokenize="bytes", on_error="dead-letter")
    assert [int(record["n"]) for record in tc.Dataset(tmp_path / "set")] == [1, 3]
    assert "[98]" in (tmp_path / "set.bad.jsonl").read_text()
