"""Packed sequences: speed against stored rows of tokens and against a plain Python packer, fill ratio, and resume.

    python benchmarks/bench_packing.py [--length 4096] [--tokens 64000000] [--repetitions 7] [--batch-size 8]

The data sets have the same tokens (uint16): documents of log-normal length, and rows of `length` tokens, alone or with
the other columns of packed rows (labels as int32, position_ids and document_ids as int16). The loader serves all of
them shuffled and, by cast=, with the dtypes of packed rows. A turn serves an epoch by every way, so that the ways see
the same machine; the table has medians over the turns, and medians of the ratios within a turn to the stored rows that
have the same columns. The plain Python packer is a loop over documents that concatenates and cuts them with numpy, as
in torchtune's PackedDataset, without reading: its documents are in memory. --threads sets the gather threads of the
loader. pack: time of pack_sequences(), which makes the index of a data set once. resume: each state of an epoch is
loaded into a new loader, whose next batch is compared. The rows are written to packing.jsonl. --quick uses small data.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import tiercache as tc
from rows import OUT, spread, table, write_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

MEAN_TOKENS, SIGMA = 600, 1.0
MODES = ("concatenate", "best_fit", "separate")
STORED, STORED_ALL = "stored rows, tokens", "stored rows, all columns"
DTYPES = {"tokens": "int64", "labels": "int64", "position_ids": "int64", "document_ids": "int32"}


def lengths_of(n_tokens: int) -> NDArray[np.int64]:
    """Return document lengths with this sum, log-normal with a mean of about MEAN_TOKENS."""
    random = np.random.default_rng(0)
    n = 2 * n_tokens // MEAN_TOKENS
    lengths = np.maximum(random.lognormal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA, n), 1).astype(np.int64)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), n_tokens))]


def write(folder: Path, tokens: NDArray[np.uint16], lengths: NDArray[np.int64], length: int) -> None:
    """Write the data set of documents and the data set of rows."""
    bounds = np.append(0, np.cumsum(lengths)).tolist()
    with tc.Writer(folder / "documents", schema={"tokens": tc.Ragged("uint16", (None,))}, compression="none") as writer:
        for first in range(0, len(lengths), 4096):
            some = bounds[first : first + 4097]
            writer.write_batch({"tokens": [tokens[a:b] for a, b in pairwise(some)]})
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    types = {"tokens": "uint16", "labels": "int32", "position_ids": "int16", "document_ids": "int16"}
    for name, columns in (("rows", ["tokens"]), ("all", list(types))):
        schema = {column: tc.Tensor(types[column], (length,)) for column in columns}
        with tc.Writer(folder / name, schema=schema, compression="none") as writer:
            for first in range(0, len(rows), 512):
                some = rows[first : first + 512]
                others = {column: (some & 0xFFF).astype(types[column]) for column in columns[1:]}
                writer.write_batch({"tokens": some, **others})


def plain_packer(documents: Sequence[NDArray[np.uint16]], length: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield batches of concatenated and cut documents: a usual packer in Python, with numpy for the tokens."""
    rows: list[tuple[Any, ...]] = []
    tokens, positions, ids, n = [], [], [], 0
    for document in documents:
        start = 0
        while start < len(document):
            part = document[start : start + length - n]
            tokens.append(part)
            positions.append(np.arange(len(part)))
            ids.append(np.full(len(part), len(ids), np.int32))
            start, n = start + len(part), n + len(part)
            if n < length:
                continue
            row = np.concatenate(tokens).astype(np.int64)
            labels = np.append(row[1:], -100)
            rows.append((row, labels, np.concatenate(positions), np.concatenate(ids)))
            tokens, positions, ids, n = [], [], [], 0
            if len(rows) == batch_size:
                names = ("tokens", "labels", "position_ids", "document_ids")
                columns = zip(names, zip(*rows, strict=True), strict=True)
                yield {name: torch.from_numpy(np.stack(column)) for name, column in columns}
                rows = []


def served(loader: Any) -> float:
    """Return the rows per second of an epoch."""
    start_s, n_rows = time.perf_counter(), 0
    for batch in loader:
        n_rows += len(batch["tokens"])
    return n_rows / (time.perf_counter() - start_s)


def speed(given: argparse.Namespace, folder: Path, documents: Sequence[NDArray[np.uint16]]) -> list[dict[str, Any]]:
    """Return the rows per second of every way, in turns."""
    options = tc.LoaderOptions(seed=0, threads=given.threads)
    stored = tc.Dataset(folder / "rows", cast={"tokens": "int64"})
    stored_all = tc.Dataset(folder / "all", cast=DTYPES)
    plain = tc.Dataset(folder / "documents")
    rows, pack_ms = {}, {}
    for mode in MODES:
        start_s = time.perf_counter()
        rows[mode] = tc.pack_sequences(plain, "tokens", given.length, mode=mode)
        pack_ms[f"packed, all columns, {mode}"] = 1000 * (time.perf_counter() - start_s)
    datasets = {
        STORED: stored,
        STORED_ALL: stored_all,
        "packed, tokens": rows["concatenate"].select_columns(["tokens"]),
        "packed, tokens and labels": rows["concatenate"].select_columns(["tokens", "labels"]),
        **{f"packed, all columns, {mode}": packed for mode, packed in rows.items()},
    }
    loaders = {
        name: tc.DataLoader(dataset, batch_size=given.batch_size, shuffle=True, options=options)
        for name, dataset in datasets.items()
    }
    ways: dict[str, Callable[[], float]] = {name: lambda one=loader: served(one) for name, loader in loaders.items()}
    ways["plain Python packer"] = lambda: served(plain_packer(documents, given.length, given.batch_size))
    for way in ways.values():
        way()
    turns = [{name: way() for name, way in ways.items()} for _ in range(given.repetitions)]
    found = []
    for name in ways:
        rates = [turn[name] for turn in turns]
        ratios = [turn[name] / turn[STORED_ALL if "all columns" in name else STORED] for turn in turns]
        loader = loaders.get(name)
        found.append(
            {
                "benchmark": "packing",
                "case": name,
                "length": given.length,
                "batch_size": given.batch_size,
                "threads": given.threads,
                "rows_per_s": spread(rates),
                "million_tokens_per_s": statistics.median(rates) * given.length / 1e6,
                "of_stored_rows": spread(ratios),
                "documents": len(plain),
                "pack_ms": pack_ms.get(name),
                "fill_ratio": None if loader is None else loader.stats().get("fill_ratio"),
            }
        )
    return found


def resume(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Load the state of each step of an epoch into a new loader on two ranks, and compare the next batches."""
    rows = tc.pack_sequences(
        tc.Dataset(folder / "documents").take(given.resumed), "tokens", given.length, mode="best_fit"
    )

    def loader(rank: int) -> tc.DataLoader[Any]:
        options = tc.LoaderOptions(seed=0, rank=rank, world_size=2)
        return tc.DataLoader(rows, batch_size=given.batch_size, shuffle=True, drop_last=True, options=options)

    n_right, times_s = 0, []
    for rank in range(2):
        first = loader(rank)
        batches, states = [], [first.state_dict()]
        for batch in first:
            batches.append(batch)
            states.append(first.state_dict())
        for state, expected in zip(states, batches, strict=False):
            again = loader(rank)
            start_s = time.perf_counter()
            again.load_state_dict(state)
            iterator = iter(again)
            batch = next(iterator)
            times_s.append(time.perf_counter() - start_s)
            iterator.close()
            n_right += all(torch.equal(batch[name], expected[name]) for name in ("tokens", "labels", "cu_seqlens"))
    row = {"benchmark": "packing", "case": "resume", "steps": len(times_s), "right": n_right}
    return {**row, "first_batch_ms": spread([1000 * time_s for time_s in times_s])}


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="Tokens of a row.")
    parser.add_argument("--tokens", type=int, default=64_000_000, help="Tokens of the data.")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None, help="Gather threads of the loader.")
    parser.add_argument("--repetitions", type=int, default=7, help="Turns.")
    parser.add_argument("--resumed", type=int, default=4000, help="Documents of the data whose every step is resumed.")
    parser.add_argument("--folder", type=Path, default=OUT, help="Folder for the rows.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: small data.")
    given = parser.parse_args()
    if given.quick:
        given.tokens, given.length, given.repetitions, given.resumed = 400_000, 256, 1, 100
    lengths = lengths_of(given.tokens)
    tokens = np.random.default_rng(1).integers(0, 1 << 16, int(lengths.sum()), dtype=np.uint16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, tokens, lengths, given.length)
        rows = speed(given, folder, np.split(tokens, np.cumsum(lengths)[:-1]))
        lines = [
            [
                row["case"],
                f"{row['rows_per_s']['median']:,.0f}",
                f"{row['million_tokens_per_s']:,.0f}",
                f"{row['of_stored_rows']['median']:.2f}",
                "" if row["fill_ratio"] is None else f"{row['fill_ratio']:.4f}",
                "" if row["pack_ms"] is None else f"{row['pack_ms']:.0f}",
            ]
            for row in rows
        ]
        print(table(["way", "rows/s", "million tokens/s", "of stored rows", "fill ratio", "pack ms"], lines))
        resumed = resume(given, folder)
        print(
            f"\nresume: {resumed['right']} of {resumed['steps']} states continued with the same batch, after "
            f"{resumed['first_batch_ms']['median']:.1f} ms (median)"
        )
    write_rows(given.folder / "packing.jsonl", [*rows, resumed])


if __name__ == "__main__":
    main()
