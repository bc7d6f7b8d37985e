"""Data of other libraries, read in place: our loader against the library's own, on the same files.

    python benchmarks/bench_in_place.py [--only "MDS, tokens" ...] [--repetitions 5] [--quick] [--folder FOLDER]

Contenders whose package is missing are left out. An environment that has them all, and tiercache from this folder:

    python -m venv benchmarks/out/envs/in_place
    benchmarks/out/envs/in_place/bin/pip install . mosaicml-streaming webdataset datasets pillow
    benchmarks/out/envs/in_place/bin/pip install --no-deps megatron-core
    benchmarks/out/envs/in_place/bin/python benchmarks/bench_in_place.py

Every contender reads whole shuffled epochs of batches of torch tensors (images: of encoded bytes) from a local folder,
in this process and, where the library offers it, in two worker processes. Contenders take turns: one epoch, which fills
the page cache and starts the workers, and then timed epochs for two seconds or more. The table has the medians of the
turns, and the processor time of the process and its workers, which a loaded machine changes less. MB/s are
bytes of the records: tokens have 2 bytes each in every layout. "pyarrow alone" is the floor of Parquet: it decodes the
row groups in one thread, and shuffles nothing. "converted to Arrow" is what datasets.load_dataset() does by default: it
has decoded everything before the first epoch, into a copy on the disk.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

import tiercache as tc
from processes import cpu_s
from rows import OUT, spread, table, write_rows

TOKENS, BATCH = 2048, 32
TURN_S = 2.0
# In Parquet and Megatron the lengths of documents vary. The others' batches are one tensor because all are equal here.
ONE_TENSOR = {"tokens": tc.Padded()}
_TICK_S = 0.01  # of the clock of CPU time
Epoch = Callable[[], int]  # reads an epoch and returns its bytes
Contender = Callable[[], Epoch]  # makes a loader


def tokens(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50000, (n, TOKENS)).astype(np.uint16)


def images(n: int) -> list[bytes]:
    """Return contents of about 100 KB, as JPEGs of ImageNet have; nothing decodes them."""
    rng = np.random.default_rng(0)
    return [rng.bytes(int(size)) for size in rng.integers(50_000, 150_000, n)]


def ours(folder: Path, column: str, layouts: dict[str, Any] | None = None) -> Contender:
    dataset = tc.Dataset(folder, columns=[column], layouts=layouts)
    return lambda: _epochs(tc.DataLoader(dataset, batch_size=BATCH, shuffle=True), column)


def _epochs(loader: Iterable[dict[str, Any]], column: str) -> Epoch:
    return lambda: sum(_n_bytes(batch[column]) for batch in loader)


def _n_bytes(values: Any) -> int:
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, np.ndarray):
        return int(values.nbytes)
    return sum(map(_n_bytes, values)) if isinstance(values, list | tuple) else len(values)


def torch_contender(dataset: Any, column: str, workers: int, sampler: Sampler[int] | None = None) -> Contender:
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0, "sampler": sampler}
    return lambda: _epochs(DataLoader(dataset, batch_size=BATCH, collate_fn=_collate, **options), column)


def _collate(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch: arrays of numbers as one tensor, encoded images as a list."""
    return {name: _joined([record[name] for record in records]) for name in records[0] if not name.startswith("__")}


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], bytes):
        return values
    return torch.stack([value if isinstance(value, torch.Tensor) else torch.from_numpy(value) for value in values])


def write_parquet(folder: Path, n: int) -> None:
    flat = pa.array(tokens(n).reshape(-1))
    for part in range(4):
        some = flat.slice(part * len(flat) // 4, len(flat) // 4)
        lists = pa.FixedSizeListArray.from_arrays(some, TOKENS).cast(pa.list_(pa.uint16()))
        pq.write_table(pa.table({"tokens": lists}), folder / f"part-{part}.parquet", row_group_size=1000)


def parquet_alone(folder: Path) -> Contender:
    def read() -> int:
        n_bytes = 0
        for path in sorted(folder.glob("*.parquet")):
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    n_bytes += file.read_row_group(group, use_threads=False).nbytes
        return n_bytes

    return lambda: read


def parquet_contenders(folder: Path) -> dict[str, Contender]:
    found = {"ours": ours(folder, "tokens", ONE_TENSOR), "pyarrow alone": parquet_alone(folder)}
    if find_spec("datasets"):
        import datasets

        files = str(folder / "*.parquet")
        stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        stream = stream.with_format("torch").shuffle(buffer_size=1000, seed=0)
        mapped = datasets.load_dataset("parquet", data_files=files, split="train").with_format("torch").shuffle(seed=0)
        for workers in (0, 2):
            found[f"datasets, streaming, {workers} workers"] = torch_contender(stream, "tokens", workers)
            found[f"datasets, converted to Arrow, {workers} workers"] = torch_contender(mapped, "tokens", workers)
    return found


def write_arrow(folder: Path, n: int) -> None:
    import datasets

    columns = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"), length=TOKENS)})
    flat = pa.FixedSizeListArray.from_arrays(pa.array(tokens(n).reshape(-1)), TOKENS)
    table = pa.table({"tokens": flat}, schema=columns.arrow_schema)
    datasets.Dataset(table).save_to_disk(folder, num_shards=4)


def arrow_contenders(folder: Path) -> dict[str, Contender]:
    import datasets

    mapped = datasets.load_from_disk(folder).with_format("torch").shuffle(seed=0)
    found = {"ours": ours(folder, "tokens")}
    return found | {f"datasets, {workers} workers": torch_contender(mapped, "tokens", workers) for workers in (0, 2)}


def write_megatron(folder: Path, n: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "text_document.bin"), dtype=np.uint16)
    for document in tokens(n):
        builder.add_document(document, [TOKENS])
    builder.finalize(str(folder / "text_document.idx"))


class MegatronDocuments(Dataset[dict[str, Any]]):
    """Documents by number, as Megatron's own data sets read them."""

    def __init__(self, prefix: Path) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self._documents = IndexedDataset(str(prefix))

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"tokens": self._documents[number]}


def megatron_contenders(folder: Path) -> dict[str, Contender]:
    documents = MegatronDocuments(folder / "text_document")
    order = RandomSampler(documents)
    found = {"ours": ours(folder, "tokens", ONE_TENSOR)}
    by_torch = {
        f"megatron.core, {workers} workers": torch_contender(documents, "tokens", workers, order) for workers in (0, 2)
    }
    return found | by_torch


def write_mds(folder: Path, encoding: str, column: str, values: Iterable[Any]) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={column: encoding}) as out:
        for value in values:
            out.write({column: value})


def mds_contenders(folder: Path, column: str) -> dict[str, Contender]:
    from streaming import StreamingDataset

    found = {"ours": ours(folder, column)}
    # With workers, a second epoch of one object waits for its shared memory for ever in some containers.
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return found | {"streaming, 0 workers": torch_contender(dataset, column, 0)}


def write_tars(folder: Path, values: Iterable[bytes]) -> None:
    import tarfile

    for number, value in enumerate(values):
        mode = "w" if number % 200 == 0 else "a"
        with tarfile.open(folder / f"shard-{number // 200:04}.tar", mode) as tar:
            member = tarfile.TarInfo(f"{number:08}.jpg")
            member.size = len(value)
            tar.addfile(member, io.BytesIO(value))


def tar_contenders(folder: Path) -> dict[str, Contender]:
    found = {"ours": ours(folder, "jpg")}
    if find_spec("webdataset"):
        import webdataset

        shards = sorted(map(str, folder.glob("*.tar")))
        dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False).shuffle(200)
        for workers in (0, 2):
            found[f"webdataset, {workers} workers"] = torch_contender(dataset, "jpg", workers)
    return found


def measure(
    contenders: Mapping[str, Contender], repetitions: int, turn_s: float
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the MB/s and the CPU seconds per GB of each contender, of interleaved turns.

    A loader lives for a turn: between turns it would load the next epoch while other contenders are timed. The timed
    epochs follow another one, so what was loaded before the clock starts is loaded again before it stops.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, contender in contenders.items():
            epoch = contender()
            epoch()
            n_bytes, took_s = 0, 0.0
            start_s, start_cpu_s = time.perf_counter(), cpu_s()
            while took_s <= turn_s:
                n_bytes += epoch()
                took_s = time.perf_counter() - start_s
            rates[name].append(n_bytes / took_s / 1e6)
            cpu[name].append(max(cpu_s() - start_cpu_s, _TICK_S) / n_bytes * 1e9)
            del epoch
    return {name: {"mb_per_s": spread(rates[name]), "cpu_s_per_gb": spread(cpu[name])} for name in contenders}


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CASE", help="Cases to run, such as 'MDS, tokens'.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="Smoke test: few records.")
    parser.add_argument("--folder", type=Path, default=OUT / "in_place")
    asked = parser.parse_args()
    os.environ["TIERCACHE_CACHE_DIR"] = str(asked.folder / "cache")
    os.environ["HF_HOME"] = str(asked.folder / "hf")
    torch.set_num_threads(1)
    n = 400 if asked.quick else 40_000
    cases: dict[str, tuple[Callable[[Path], Any], Callable[[Path], dict[str, Contender]]]] = {
        "Parquet, tokens": (lambda folder: write_parquet(folder, n // 2), parquet_contenders),
        "WebDataset, images": (lambda folder: write_tars(folder, images(n // 20)), tar_contenders),
    }
    if find_spec("datasets"):
        cases["Arrow, tokens"] = (lambda folder: write_arrow(folder, n), arrow_contenders)
    if find_spec("megatron"):
        cases["Megatron, tokens"] = (lambda folder: write_megatron(folder, n), megatron_contenders)
    if find_spec("streaming"):
        cases["MDS, tokens"] = (
            lambda folder: write_mds(folder, f"ndarray:uint16:{TOKENS}", "tokens", tokens(n)),
            lambda folder: mds_contenders(folder, "tokens"),
        )
        cases["MDS, images"] = (
            lambda folder: write_mds(folder, "bytes", "image", images(n // 20)),
            lambda folder: mds_contenders(folder, "image"),
        )
    rows, lines = [], []
    for name in asked.only or cases:
        write, contenders = cases[name]
        folder = asked.folder / name.lower().replace(", ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder)
        found = measure(contenders(folder), *((1, 0.0) if asked.quick else (asked.repetitions, TURN_S)))
        rows += [{"benchmark": "in_place", "case": name, "contender": who, **row} for who, row in found.items()]
        for who, row in found.items():
            rate, cpu = row["mb_per_s"]["median"], row["cpu_s_per_gb"]["median"]
            ratio = found["ours"]["mb_per_s"]["median"] / rate
            lines.append([f"{name}: {who}", f"{rate:,.0f}", f"{ratio:.2f}", f"{cpu:.2f}"])
        shutil.rmtree(folder)
    write_rows(asked.folder / "in_place.jsonl", rows)
    print(table(["data: contender", "MB/s", "ours is times as fast", "CPU s / GB"], lines))


if __name__ == "__main__":
    main()
