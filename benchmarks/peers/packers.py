"""The packers of the compared libraries on files: `python -m peers.packers JSON`; the last line is the result.

Each packs the same input as the guide of its library shows: a folder of JPEGs in folders of classes, documents of
tokens (a file of uint16 and one of lengths, which a generator reads), and a Parquet table of numbers and short text.
`bench_write.py --packers` runs them, each in its own environment.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from peers.child import stored_bytes, sync
from processes import PeakMemory, cpu_s

CHUNK_BYTES = 64 << 20
PIECE = 2000  # records that one call of a user's function reads


def images_of(folder: str, start: int = 0, end: int | None = None) -> Iterator[tuple[str, bytes, int]]:
    """Yield path, content and class of the images, in the order of their paths."""
    paths = sorted(Path(folder).glob("*/*.jpg"))
    names = sorted({path.parent.name for path in paths})
    for path in paths[start:end]:
        yield str(path), path.read_bytes(), names.index(path.parent.name)


def documents_of(folder: str, start: int = 0, end: int | None = None) -> Iterator[np.ndarray]:
    """Yield documents of tokens, uint16 each."""
    tokens = np.load(Path(folder) / "tokens.npy", mmap_mode="r").view(np.ndarray)
    bounds = np.append(0, np.cumsum(np.load(Path(folder) / "lengths.npy")))
    for first, last in pairwise(bounds[start : None if end is None else end + 1].tolist()):
        yield tokens[first:last]


def rows_of(folder: str, start: int = 0, end: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield rows of the table as dicts. start, end: Numbers of row groups."""
    from pyarrow import parquet

    file = parquet.ParquetFile(Path(folder) / "rows.parquet")
    for group in range(start, min(end or file.num_row_groups, file.num_row_groups)):
        yield from file.read_row_group(group).to_pylist()


def pieces(folder: str, case: str) -> list[tuple[str, int, int]]:
    """Return the input in pieces that processes read: folder, start and end."""
    if case == "rows":
        from pyarrow import parquet

        n, step = parquet.ParquetFile(Path(folder) / "rows.parquet").num_row_groups, 1
    elif case == "images":
        n, step = len(list(Path(folder).glob("*/*.jpg"))), PIECE // 10
    else:
        n, step = len(np.load(Path(folder) / "lengths.npy")), PIECE
    return [(folder, start, min(start + step, n)) for start in range(0, n, step)]


def token_records(piece: tuple[str, int, int]) -> Iterator[dict[str, Any]]:
    """Yield documents as records."""
    for document in documents_of(*piece):
        yield {"tokens": document}


def tiercache(case: str, source: str, target: str, workers: int) -> None:
    """Pack a folder, a table, or what a function yields."""
    import tiercache as tc

    if case == "tokens":
        schema = {"tokens": tc.Ragged("uint16", (None,))}
        tc.pack(token_records, pieces(source, case), f"{target}/set", schema=schema, workers=workers)
    else:
        tc.pack(source, f"{target}/set", workers=workers)


def mosaic(case: str, source: str, target: str, workers: int) -> None:  # noqa: ARG001 -- one process, as its guide
    """Write record by record; images as the bytes of their files, because "jpeg" would encode them again."""
    from streaming import MDSWriter

    columns = {
        "images": {"image": "bytes", "label": "int64"},
        "tokens": {"tokens": "ndarray:uint16"},
        "rows": {"id": "int64", "count": "int32", "price": "float32", "score": "float64", "text": "str"},
    }[case]
    with MDSWriter(out=target, columns=columns) as writer:
        if case == "images":
            for _, data, label in images_of(source):
                writer.write({"image": data, "label": label})
        elif case == "tokens":
            for document in documents_of(source):
                writer.write({"tokens": document})
        else:
            for row in rows_of(source):
                writer.write({**row, "price": np.float32(row["price"]), "count": np.int32(row["count"])})


def lit_tokens(piece: tuple[str, int, int]) -> Iterator[Any]:
    """Yield documents as its TokensLoader reads them."""
    import torch

    for document in documents_of(*piece):
        yield torch.from_numpy(document)


def lit_images(piece: tuple[str, int, int]) -> Iterator[Any]:
    """Yield images as the bytes of their files."""
    for _, data, label in images_of(*piece):
        yield {"image": data, "label": label}


def lit_rows(piece: tuple[str, int, int]) -> Iterator[Any]:
    """Yield rows."""
    yield from rows_of(*piece)


def lit(case: str, source: str, target: str, workers: int) -> None:
    """Optimize pieces in processes; tokens without the headers of records."""
    import litdata

    litdata.optimize(
        fn={"images": lit_images, "tokens": lit_tokens, "rows": lit_rows}[case],
        inputs=pieces(source, case),
        output_dir=target,
        num_workers=workers,
        **({"chunk_size": CHUNK_BYTES // 2, "item_loader": litdata.TokensLoader()} if case == "tokens" else {}),
        **({"chunk_bytes": CHUNK_BYTES} if case != "tokens" else {}),
    )


def wds(case: str, source: str, target: str, workers: int) -> None:  # noqa: ARG001 -- one process, as its guide
    """Write samples to tar shards; of the rows, only the first 100,000, which take a quarter of a minute."""
    import webdataset

    with webdataset.ShardWriter(f"{target}/%06d.tar", maxsize=CHUNK_BYTES, verbose=0) as writer:
        if case == "images":
            for number, (_, data, label) in enumerate(images_of(source)):
                writer.write({"__key__": f"{number:09d}", "jpg": data, "cls": label})
        elif case == "tokens":
            for number, document in enumerate(documents_of(source)):
                writer.write({"__key__": f"{number:09d}", "npy": document})
        else:
            for number, row in enumerate(rows_of(source, 0, 1)):
                writer.write({"__key__": f"{number:09d}", "json": row})


class FFCVRecords:
    """Records by number, as tuples."""

    def __init__(self, case: str, source: str) -> None:
        if case == "tokens":
            self._get = self._tokens
            self._tokens_of = np.load(Path(source) / "tokens.npy", mmap_mode="r").view(np.ndarray)
            self._bounds = np.append(0, np.cumsum(np.load(Path(source) / "lengths.npy")))
            self._n = len(self._bounds) - 1
        elif case == "images":
            self._get = self._image
            self._paths = sorted(Path(source).glob("*/*.jpg"))
            self._names = {name: i for i, name in enumerate(sorted({path.parent.name for path in self._paths}))}
            self._n = len(self._paths)
        else:
            from pyarrow import parquet

            table = parquet.read_table(Path(source) / "rows.parquet")
            self._columns = [table[name].to_pylist() for name in table.column_names]
            self._get = self._row
            self._n = len(table)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        return self._get(number)

    def _tokens(self, number: int) -> tuple[Any, ...]:
        document = self._tokens_of[self._bounds[number] : self._bounds[number + 1]]
        return (document.view(np.uint8), len(document))

    def _image(self, number: int) -> tuple[Any, ...]:
        from PIL import Image

        path = self._paths[number]
        return (np.asarray(Image.open(path)), self._names[path.parent.name])

    def _row(self, number: int) -> tuple[Any, ...]:
        *numbers, text = (column[number] for column in self._columns)
        return (*numbers, np.frombuffer(text.encode(), np.uint8))


def beton(case: str, source: str, target: str, workers: int) -> None:
    """Write by index. FFCV encodes images again, and has no field for arrays of varying length but bytes."""
    from ffcv.fields import BytesField, FloatField, IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {
        "images": lambda: {"image": RGBImageField(write_mode="jpg"), "label": IntField()},
        "tokens": lambda: {"tokens": BytesField(), "n": IntField()},
        "rows": lambda: {
            "id": IntField(),
            "count": IntField(),
            "price": FloatField(),
            "score": FloatField(),
            "text": BytesField(),
        },
    }[case]()
    DatasetWriter(f"{target}/data.beton", fields, num_workers=workers).from_indexed_dataset(FFCVRecords(case, source))


def grain_ar(case: str, source: str, target: str, workers: int) -> None:  # noqa: ARG001 -- one process
    """Write serialised records, in groups of one, as Grain needs them."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(f"{target}/data.array_record", "group_size:1")
    if case == "images":
        for _, data, label in images_of(source):
            writer.write(pickle.dumps({"image": data, "label": label}))
    elif case == "tokens":
        for document in documents_of(source):
            writer.write(document.tobytes())
    else:
        for row in rows_of(source):
            writer.write(pickle.dumps(row))
    writer.close()


def lance_arrow(case: str, source: str, target: str, workers: int) -> None:  # noqa: ARG001 -- has threads of its own
    """Write a stream of record batches."""
    import lance
    import pyarrow as pa
    from pyarrow import dataset

    if case == "rows":
        lance.write_dataset(dataset.dataset(f"{source}/rows.parquet").scanner().to_reader(), f"{target}/data.lance")
        return
    types = {"images": {"image": pa.binary(), "label": pa.int64()}, "tokens": {"tokens": pa.list_(pa.uint16())}}[case]
    schema = pa.schema(types)

    def batches() -> Iterator[pa.RecordBatch]:
        for piece in pieces(source, case):
            columns: list[Any]
            if case == "images":
                columns = [*zip(*((data, label) for _, data, label in images_of(*piece)), strict=True)]
            else:
                columns = [list(documents_of(*piece))]
            arrays = [pa.array(column, kind) for column, kind in zip(columns, types.values(), strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), f"{target}/data.lance")


def hf_documents(parts: list[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """Yield documents as records."""
    for piece in parts:
        for document in documents_of(*piece):
            yield {"tokens": document}


def hf(case: str, source: str, target: str, workers: int) -> None:
    """Load and save to disk; load_dataset() and from_generator() write an Arrow file of their own first."""
    import datasets

    datasets.disable_progress_bars()
    cache = {"cache_dir": f"{target}/cache", "num_proc": workers if workers > 1 else None}
    if case == "tokens":
        features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"))})
        parts = {"parts": pieces(source, case)}
        found = datasets.Dataset.from_generator(hf_documents, features, gen_kwargs=parts, **cache)
    elif case == "images":
        found = datasets.load_dataset("imagefolder", data_dir=source, split="train", **cache)
    else:
        found = datasets.load_dataset("parquet", data_files=f"{source}/rows.parquet", split="train", **cache)
    found.save_to_disk(f"{target}/set", num_proc=cache["num_proc"])


def megatron(case: str, source: str, target: str, workers: int) -> None:  # noqa: ARG001 -- tokens, one process
    """Add documents to its builder, as its tools/preprocess_data.py does."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{target}/text_document.bin", dtype=np.uint16)
    for document in documents_of(source):
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{target}/text_document.idx")


PACKERS: dict[str, tuple[Callable[[str, str, str, int], None], str]] = {
    "tiercache": (tiercache, "tiercache.packer.pack"),
    "mosaic": (mosaic, "streaming"),
    "lit": (lit, "litdata"),
    "wds": (wds, "webdataset"),
    "beton": (beton, "ffcv.writer"),
    "grain_ar": (grain_ar, "array_record.python.array_record_module"),
    "lance_arrow": (lance_arrow, "lance"),
    "hf": (hf, "datasets"),
    "megatron": (megatron, "megatron.core.datasets.indexed_dataset"),
}


def main() -> None:
    """Pack once, in an empty folder, until all files are on the disk."""
    job = json.loads(sys.argv[1])
    packer, module = PACKERS[job["peer"]]
    importlib.import_module(module)
    target = Path(job["target"])
    os.sync()
    with PeakMemory() if job["memory"] else nullcontext() as peak:
        start_s, start_cpu_s = time.perf_counter(), cpu_s()
        packer(job["case"], job["source"], str(target), job["workers"])
        sync(target)
        found = {"seconds": time.perf_counter() - start_s, "cpu_s": cpu_s() - start_cpu_s}
    kept = [path for path in target.iterdir() if path.name != "cache"]
    n_bytes = sum(stored_bytes(path) if path.is_dir() else path.stat().st_size for path in kept)
    found |= {"stored_bytes": n_bytes, "peak_bytes": peak.n_bytes if peak else None}
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    # Processes that a packer spawns find its functions in the module, and not in a script.
    importlib.import_module("peers.packers").main()
