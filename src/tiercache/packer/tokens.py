"""Text as a source of a packing: files of text, one document each, and a source whose text becomes tokens."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tiercache.errors import SchemaError
from tiercache.packer.files import BadRecord, Files, InputBatch, InputSplit, RecordSource, SourceFile
from tiercache.packer.transform import taken, values_of
from tiercache.shard.schema import Kind, Schema, UserType

TEXT_SUFFIXES = (
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".hpp",
    ".cu", ".java", ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb", ".php", ".cs", ".swift", ".r",
    ".jl", ".lua", ".pl", ".hs", ".ml", ".sql", ".sh", ".html", ".css",
)  # fmt: skip
TOKENS_COLUMN = "tokens"
_SPLIT_FILES = 64
_MOST_OF_UINT16 = 1 << 16


@dataclass(frozen=True)
class TextFiles:
    """Files of text in UTF-8, a files.RecordSource: each file is a record with its text and its path."""

    files: Files
    texts: tuple[SourceFile, ...]

    @property
    def schema(self) -> Schema:
        return Schema.of({"text": "str", "path": "str"})

    @property
    def splits(self) -> tuple[InputSplit, ...]:
        starts = range(0, len(self.texts), _SPLIT_FILES)
        runs = [(start, min(start + _SPLIT_FILES, len(self.texts))) for start in starts]
        return tuple(InputSplit("", s, e, sum(f.n_bytes for f in self.texts[s:e])) for s, e in runs)

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        chosen = self.texts[split.start : split.end]
        for run in _runs([file.n_bytes for file in chosen], batch_bytes):
            paths = [file.path for file in chosen[run]]
            texts: list[str] = []
            good: list[str] = []
            bad: list[BadRecord] = []
            for path, data in zip(paths, self.files.read_many(paths), strict=True):
                try:
                    texts.append(data.decode())
                    good.append(path)
                except UnicodeDecodeError as error:
                    what = f"byte {data[error.start]:#04x} at offset {error.start:,}"
                    reason = f"not text in UTF-8: {what}; convert the file, or leave it out with exclude=[{path!r}]"
                    bad.append(BadRecord(self.files.location(path), reason, data))
            locations = [self.files.location(path) for path in good]
            n_bytes = sum(file.n_bytes for file in chosen[run])
            yield InputBatch({"text": texts, "path": good}, len(good), n_bytes, locations.__getitem__, bad)


@dataclass(frozen=True)
class Tokenizer:
    """Tokenizer that adds no special tokens, and takes the names of special tokens in a text as plain text. Picklable.

    Attributes:
        name: What the user named it by.
        n_tokens: Size of its vocabulary.
        digest: Hash of its definition, if the file or the Hub gave one; otherwise "".
        definition: Its tokenizer.json, so that other processes need neither the file nor the network; "" if it is
            loaded by its name.
    """

    name: str
    n_tokens: int
    digest: str = ""
    definition: str = field(default="", repr=False)

    @property
    def dtype(self) -> str:
        """Dtype of its tokens: "uint16" if the vocabulary fits, otherwise "int32"."""
        return "uint16" if self.n_tokens <= _MOST_OF_UINT16 else "int32"

    @cached_property
    def _loaded(self) -> Any:
        if self.definition:
            return _plain(_package("tokenizers", self.name).Tokenizer.from_str(self.definition))
        return _tiktoken(self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.name, self.n_tokens, self.digest, self.definition)

    def encode(self, text: str) -> np.ndarray[Any, Any]:
        """Return the tokens of a text.

        Texts are encoded one by one: encode_batch() of tokenizers starts a thread for each CPU in each process, and
        its results, with offsets, are many times as large as the text.
        """
        if self.name == "bytes":
            return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)
        if self.definition:
            return np.array(self._loaded.encode(text, add_special_tokens=False).ids, self.dtype)
        return np.array(self._loaded.encode_ordinary(text), self.dtype)


def find_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer with a name: as `pack(tokenize=)`. Raises ValueError, which says what to install."""
    if name == "bytes":
        return Tokenizer(name, 256)
    if name.startswith("tiktoken:"):
        return Tokenizer(name, _tiktoken(name).n_vocab)
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        loaded = _read(name, path)
    elif Path(name).exists() or name.endswith(".json") or name.count("/") > 1:
        raise ValueError(f"tokenize={name!r}: there is no file {str(path)!r}; name a tokenizer.json or its folder")
    else:
        loaded = _from_hub(name)
    definition = loaded.to_str()
    # Tokens are numbered up to the largest one, which may be more than there are.
    n_tokens = max(loaded.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return Tokenizer(name, n_tokens, hashlib.sha256(definition.encode()).hexdigest()[:16], definition)


def _package(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"tokenize={name!r} needs the package {package}: pip install {package}") from error


def _read(name: str, path: Path) -> Any:
    try:
        return _package("tokenizers", name).Tokenizer.from_file(str(path))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"tokenize={name!r}: {path} is not a tokenizer.json: {error}") from error


def _from_hub(name: str) -> Any:
    tokenizers = _package("tokenizers", name)
    try:
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"tokenize={name!r}: the Hugging Face Hub gave no such tokenizer: {error}. Without network, name the path "
            "of a tokenizer.json (save_pretrained() of a tokenizer of transformers writes one); other names are "
            "'bytes' and 'tiktoken:gpt2'"
        ) from error


def _tiktoken(name: str) -> Any:
    package = _package("tiktoken", name)
    try:
        return package.get_encoding(name.removeprefix("tiktoken:"))
    except (ValueError, OSError) as error:  # OSError: tiktoken downloads its vocabularies
        raise ValueError(f"tokenize={name!r}: tiktoken cannot load it: {error}") from error


def _plain(loaded: Any) -> Any:
    loaded.no_truncation()
    loaded.no_padding()
    loaded.encode_special_tokens = True
    return loaded


@dataclass(frozen=True)
class TokenizedText:
    """Source whose text column becomes a column of tokens, "tokens"; a files.RecordSource."""

    source: RecordSource
    tokenizer: Tokenizer
    column: str

    @property
    def schema(self) -> Schema:
        types: dict[str, UserType] = {}
        plain = self.source.schema
        for column in plain.columns:
            types[TOKENS_COLUMN if column.name == self.column else column.name] = column.arrow
        nullable = plain.columns[plain.index(self.column)].nullable
        types[TOKENS_COLUMN] = f"{self.tokenizer.dtype}[*]{'?' if nullable else ''}"
        facts = {"name": self.tokenizer.name, "vocabulary": self.tokenizer.n_tokens, "sha256": self.tokenizer.digest}
        return Schema.of(types).with_tokenizer(TOKENS_COLUMN, {key: value for key, value in facts.items() if value})

    @property
    def splits(self) -> tuple[InputSplit, ...]:
        return self.source.splits

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        for batch in self.source.read(split, batch_bytes):
            yield self._tokenized(batch) if batch.n_records else batch

    def _tokenized(self, batch: InputBatch) -> InputBatch:
        texts = values_of(batch, self.column, slice(None))
        if isinstance(texts, pa.Array):
            texts = texts.to_pylist()
        none = np.empty(0, self.tokenizer.dtype)
        good, parts, bad = list[int](), [none], list(batch.bad)
        for i, text in enumerate(texts):
            reason = _fault(text)
            if reason is None:
                good.append(i)
                parts.append(none if text is None else self.tokenizer.encode(text))
            else:
                bad.append(BadRecord(batch.location(i), reason, column=self.column))
        nulls = pa.array([texts[i] is None for i in good], pa.bool_())
        offsets = pa.array(np.cumsum([len(part) for part in parts], dtype=np.int64))
        tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(parts)), mask=nulls)
        kept = taken(batch, np.array(good, np.int64))
        columns: Any = kept.columns
        if isinstance(columns, list):
            columns = [
                {**self._others(record), TOKENS_COLUMN: None if texts[i] is None else part}
                for record, i, part in zip(columns, good, parts[1:], strict=True)
            ]
        elif isinstance(columns, pa.RecordBatch):
            columns = columns.set_column(columns.schema.get_field_index(self.column), TOKENS_COLUMN, tokens)
        else:
            columns = {**self._others(columns), TOKENS_COLUMN: tokens}
        return replace(kept, columns=columns, bad=bad)

    def _others(self, named: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in named.items() if name != self.column}


def _fault(text: object) -> str | None:
    """Return why a value cannot be tokenized, or None."""
    if text is None:
        return None
    if not isinstance(text, str):
        return f"expected a str to tokenize, got {type(text).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at character {error.start:,}"
        return f"not Unicode text: {half} is half of a character (a surrogate)"
    return None


def tokenized(source: RecordSource, name: str, column: str) -> TokenizedText:
    """Return the source with the tokens of a text column in its place. Raises SchemaError, ValueError."""
    schema = source.schema
    if column not in schema.names or schema.columns[schema.index(column)].kind is not Kind.STR:
        texts = [one.name for one in schema.columns if one.kind is Kind.STR]
        what = f"it is {schema.columns[schema.index(column)]}" if column in schema.names else "there is no such column"
        listed = ", ".join(map(repr, texts)) or "there is none"
        raise SchemaError(
            f"no text to tokenize: {what}; name one with text_column=: {listed}",
            column=column,
        )
    if TOKENS_COLUMN in schema.names and column != TOKENS_COLUMN:
        raise SchemaError("the source has this column already, so the tokens have no name", column=TOKENS_COLUMN)
    return TokenizedText(source, find_tokenizer(name), column)


def _runs(sizes: Sequence[int], run_bytes: int) -> Iterator[slice]:
    """Yield runs of neighbours, each of at least run_bytes except the last one."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        total += size
        if total >= run_bytes:
            yield slice(start, i + 1)
            start, total = i + 1, 0
    if start < len(sizes):
        yield slice(start, len(sizes))
