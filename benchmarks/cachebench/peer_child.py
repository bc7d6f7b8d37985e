"""One epoch of another library, in its environment: `python peer_child.py JSON`; the last line of output is the result.

Both libraries copy their files from a folder, as from a store, into a cache folder with a limit. The copied bytes are
counted where the libraries copy. There are no workers, so one process does everything.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 256


def records(job: dict[str, Any]) -> Any:
    """Return the records of the data set."""
    random = np.random.default_rng(7)
    for i in range(job["n_records"]):
        yield {"id": i, "content": random.integers(0, 256, job["content_bytes"], np.uint8)}


def lit_record(i: int, content_bytes: int) -> dict[str, Any]:
    """Return one record for LitData, which packs in several processes; only the size of its bytes matters."""
    return {"id": i, "content": np.random.default_rng(i).integers(0, 256, content_bytes, np.uint8)}


class Counted:
    """Adds up the bytes of copied files, except index files."""

    def __init__(self) -> None:
        self.n_bytes = 0

    def wrap(self, owner: Any, name: str, local: int) -> None:
        """Count the file that owner.name(...) writes. local: Index of the argument with the destination path."""
        inner = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            path = Path(args[local])
            before = path.exists()
            result = inner(*args, **options)
            if not before and path.exists() and path.suffix != ".json":
                self.n_bytes += path.stat().st_size
            return result

        setattr(owner, name, counted)


def mosaic(job: dict[str, Any]) -> dict[str, Any]:
    """Measure MosaicML Streaming."""
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
    from streaming.base.storage.download import LocalDownloader
    from streaming.base.util import clean_stale_shared_memory

    data = Path(job["data"])
    if not (data / "index.json").exists():
        shutil.rmtree(data, ignore_errors=True)
        columns = {"id": "int", "content": f"ndarray:uint8:{job['content_bytes']}"}
        with MDSWriter(out=str(data), columns=columns, size_limit=job["shard_bytes"] + 65536) as writer:
            for record in records(job):
                writer.write(record)
    clean_stale_shared_memory()
    counted = Counted()
    counted.wrap(LocalDownloader, "_download_file_impl", 2)
    dataset = StreamingDataset(
        remote=str(data),
        local=job["cache"],
        cache_limit=job["cache_bytes"],
        shuffle=True,
        shuffle_algo="py1br",
        shuffle_seed=1,
        shuffle_block_size=job["n_records"] // job["n_shards"] * job["group_shards"],
        num_canonical_nodes=1,
        batch_size=BATCH,
        predownload=4 * BATCH,
    )
    state = {"epoch": job["epoch"], "sample_in_epoch": 0, "num_canonical_nodes": 1, "shuffle_seed": 1}
    state["initial_physical_nodes"] = 1
    dataset.load_state_dict(state)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)
    ids = [i for batch in loader for i in batch["id"].tolist()]
    return {"ids": ids, "fetched_bytes": counted.n_bytes, "stored_bytes": _files(data, ".mds")}


def lit(job: dict[str, Any]) -> dict[str, Any]:
    """Measure LitData."""
    from functools import partial

    import litdata
    from litdata.streaming.downloader import LocalDownloader

    data = Path(job["data"])
    if not (data / "index.json").exists():
        shutil.rmtree(data, ignore_errors=True)
        litdata.optimize(
            fn=partial(lit_record, content_bytes=job["content_bytes"]),
            inputs=list(range(job["n_records"])),
            output_dir=str(data),
            chunk_size=job["n_records"] // job["n_shards"],
            num_workers=1,
            verbose=False,
        )
    counted = Counted()
    counted.wrap(LocalDownloader, "download_file", 2)
    dataset = litdata.StreamingDataset(
        f"local:{data}",
        cache_dir=job["cache"],
        max_cache_size=job["cache_bytes"],
        shuffle=True,
        seed=1,
        drop_last=False,
    )
    dataset.set_epoch(job["epoch"] + 1)
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)
    ids = [i for batch in loader for i in batch["id"].tolist()]
    return {"ids": ids, "fetched_bytes": counted.n_bytes, "stored_bytes": _files(data, ".bin")}


def _files(folder: Path, ending: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(f"*{ending}"))


def main() -> None:
    """Run the job of the argument."""
    warnings.simplefilter("ignore")
    job = json.loads(sys.argv[1])
    started_s = time.perf_counter()
    found = {"mosaic": mosaic, "lit": lit}[job["peer"]](job)
    ids = found.pop("ids")
    held = sum(path.stat().st_size for path in Path(job["cache"]).rglob("*") if path.is_file())
    found |= {"n_records": len(ids), "n_distinct": len(set(ids)), "held_bytes": held}
    print("\n" + json.dumps({**found, "wall_s": time.perf_counter() - started_s}), flush=True)


if __name__ == "__main__":
    main()
