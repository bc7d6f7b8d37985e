"""The story: pack, list, train cold, train warm in a new process, stop, resume, evict, tier; with claims to check."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from tiercache.cache import Cache
from tiercache.dataset import Dataset
from tiercache.demo import claims
from tiercache.demo.data import WINDOW_BYTES, check_packages, python_windows, write_digits
from tiercache.demo.events import Claim, Epoch, Event, Note, PackedDataSet, Step
from tiercache.demo.stage import CACHE_BYTES, NAMES, DemoSetup
from tiercache.demo.tiers import run_tiering
from tiercache.errors import TierCacheError
from tiercache.model import format_bytes
from tiercache.pack import pack
from tiercache.shard.read.verify import verify_dataset
from tiercache.shard.schema import Tensor
from tiercache.shard.write.dataset_writer import Writer
from tiercache.store import open_store
from tiercache.testing.s3_server import S3Server

PACKAGES = ("torch", "torchdata", "sklearn", "PIL")


def run_story(folder: Path) -> Generator[Event, None, None]:
    """Yield the events of the whole story in a folder. A claim that does not hold does not end the story.

    The S3 server runs until the iterator is closed or exhausted.

    Raises:
        TierCacheError: A package of the extra `demo` is missing, the server does not start, or a step failed.
    """
    check_packages(PACKAGES)
    yield Step("An object store")
    with _started(folder / "server") as server:
        stage = DemoSetup(folder, server)
        yield _about(server)
        yield from _pack(stage)
        yield from _look(stage)
        warm = yield from _train(stage)
        yield from _evict(stage)
        yield from run_tiering(stage, warm)


@contextmanager
def _started(folder: Path) -> Iterator[S3Server]:
    """Yield a running server, which is stopped even if its start is interrupted."""
    with ExitStack() as stack:
        try:
            server = S3Server(folder)
            stack.callback(server.stop)
            server.start()
        except RuntimeError as error:
            raise TierCacheError(str(error)) from error
        yield server


def _about(server: S3Server) -> Note:
    if server.kind == "moto":
        return Note(f"moto's S3 server, because SeaweedFS has no package for this platform, at {server.endpoint}")
    return Note(f"SeaweedFS, a real S3 server, one process on this machine, at {server.endpoint}")


def _pack(stage: DemoSetup) -> Iterator[Event]:
    yield Step("Pack two data sets, from files of installed packages, to s3://")
    images = stage.folder / "digits"
    n_train, n_test = write_digits(images)
    yield Note(f"scikit-learn's digits: {n_train + n_test} PNG images, one folder per digit, {n_test} held out")
    options = stage.server.storage_options
    for part in ("train", "test"):
        pack(
            images / part, stage.url(f"digits/{part}"), shard_size="64KiB", block_size="16KiB", storage_options=options
        )
        raw_bytes = sum(path.stat().st_size for path in (images / part).rglob("*.png"))
        yield _packed(stage, f"digits/{part}", raw_bytes)
    windows = python_windows()
    yield Note(
        f"Python source of installed packages: {len(windows)} windows of {WINDOW_BYTES} bytes and their next byte"
    )
    schema = {"tokens": Tensor("uint8", (WINDOW_BYTES + 1,))}
    with Writer(
        stage.url("python"), schema=schema, shard_size="64KiB", block_size="32KiB", storage_options=options
    ) as writer:
        writer.write_batch({"tokens": windows})
    yield _packed(stage, "python", windows.nbytes)


def _packed(stage: DemoSetup, name: str, raw_bytes: int) -> PackedDataSet:
    dataset = Dataset(stage.url(name), cache=False, storage_options=stage.server.storage_options)
    shards_bytes = dataset.source.shard_bytes
    columns = ", ".join(dataset.column_names)
    return PackedDataSet(
        name, stage.url(name), columns, len(dataset), len(shards_bytes), raw_bytes, int(shards_bytes.sum())
    )


def _look(stage: DemoSetup) -> Iterator[Event]:
    yield Step("List the data sets and verify every byte")
    for name in NAMES:
        with closing(open_store(stage.url(name), **stage.server.storage_options)) as store:
            names = [info.key for info in store.list("")]
            findings = list(verify_dataset(store))
        shards = sum(1 for key in names if key.endswith(".tcs"))
        yield Note(f"{stage.url(name)}: {len(names)} objects: {shards} shards, and the files of its versions")
        yield Claim(
            f"{name} contains what was written", not findings, "; ".join(map(str, findings)) or "no damage found"
        )


def _train(stage: DemoSetup) -> Generator[Event, None, Sequence[Epoch]]:
    """Yield the events of three epochs; return the epochs of the second."""
    yield Step("Epoch 1, cold: shards are fetched from S3 while the models train on them")
    yield from stage.run("cold")
    yield Step("Epoch 2, warm: a new process, the same cache")
    sent_before = stage.server.bytes_sent()
    warm = yield from stage.run("warm")
    sent_after = stage.server.bytes_sent()
    yield claims.warm_fetched_nothing(warm)
    if sent_before is not None and sent_after is not None:
        yield claims.store_sent_versions_only(sent_after - sent_before, _version_bytes(stage))
    yield Step("Epoch 3, in a third process: once as a whole, then again up to its middle")
    before = yield from stage.run("stop")
    yield Step("The rest of epoch 3, resumed in a fourth process")
    after = yield from stage.run("resume")
    yield from claims.resumed_exactly(before, after)
    return warm


def _version_bytes(stage: DemoSetup) -> int:
    """Return the bytes of the version files of all data sets, which an open reads even if everything is cached."""
    with closing(stage.server.store()) as store:
        small = [info for info in store.list("") if "/_tiercache/" in info.key and "/segments/" not in info.key]
    return sum(info.n_bytes for info in small)


def _evict(stage: DemoSetup) -> Iterator[Event]:
    yield Step("Evict: the cache frees its disk space; the store still has everything")
    with Cache(stage.cache, size=CACHE_BYTES) as cache:
        used_bytes, n_copies = cache.stats()["bytes_used"], len(cache.entries())
        freed_bytes = cache.evict()
        left_bytes = cache.stats()["bytes_used"]
    yield Note(f"{n_copies} cached files, {format_bytes(used_bytes)}; {format_bytes(freed_bytes)} freed")
    yield Claim("the cache is empty after eviction", left_bytes == 0, f"{left_bytes} bytes left")
