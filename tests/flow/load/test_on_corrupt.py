"""on_corrupt="previous": a record that cannot be read is the one before it in the sequence, however it is read."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.http_server import HttpFaultServer
from tests.support.pictures import encode, picture
from tests.support.records import check_batch, ids_of, join_loading, replace_bytes
from torch.utils.data import BatchSampler

import tiercache as tc

N = 300
WARNED = "replaced by the ones before them"


def options(**more) -> tc.LoaderOptions:
    given = {"seed": 5, "on_corrupt": "previous", "shuffle_window_bytes": "4KiB", "memory_bytes": 1}
    return tc.LoaderOptions(**{**given, **more})


def blocks_of(dataset: tc.Dataset) -> list[tuple[int, int, list[int]]]:
    """(shard, block, records in it) of each block that has any."""
    source, found = dataset._source, []
    for shard, table in enumerate(source.block_sizes(range(len(source.shard_records)))):
        first = int(source.first_record[shard])
        for block, n in enumerate(table.records.tolist()):
            found.append((shard, block, list(range(first, first + n))))
            first += n
    return found


def strike(dataset: tc.Dataset, path: Path, shard: int, block: int, column: str, at: int = 3) -> None:
    """Turn a bit of the stored bytes of one column of one block."""
    info = dataset._source.leaves[0].table.info(shard)
    footer = dataset._source.leaves[0]._footer(shard)
    chunk = footer.chunks[block, footer.schema.index(column)]
    file = path / info.name
    data = bytearray(file.read_bytes())
    data[int(chunk["offset"]) + min(at, int(chunk["stored"]) - 1)] ^= 0x41
    file.chmod(0o644)
    file.write_bytes(data)


def strike_footer(dataset: tc.Dataset, path: Path, shard: int) -> None:
    info = dataset._source.leaves[0].table.info(shard)
    data = bytearray((path / info.name).read_bytes())
    data[info.footer_offset + info.footer_bytes // 2] ^= 0x41
    (path / info.name).write_bytes(data)


def mend(ids: list[int], bad: set[int], before: int | None = None) -> list[int]:
    """The rule in its plainest form."""
    found, last = [], before
    for i in ids:
        last = i if i not in bad else last
        found.append(last)
    first_good = next((i for i in ids if i not in bad), None)
    return [first_good if i is None else i for i in found]


def read_with_states(loader) -> list[tuple[dict, dict]]:
    """Each batch, and the state after it."""
    return [(batch, loader.state_dict()) for batch in loader]


def resumed(loader, state) -> list[dict]:
    """The batches of a loader from a state on; what it warns of is not looked at."""
    loader.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(loader)


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain(*batches))


@pytest.fixture(params=["local", "ranges", "cached"])
def opened(request, tmp_path) -> Callable[[Path], tc.Dataset]:
    """A function that opens a packed folder as a data set, read in each of the ways that there are."""
    at_end = []

    def open_dataset(path: Path) -> tc.Dataset:
        if request.param == "local":
            return tc.Dataset(path)
        files = [file for file in path.rglob("*") if file.is_file()]
        server = HttpFaultServer({f"data/{f.relative_to(path).as_posix()}": f.read_bytes() for f in files})
        server.__enter__()
        at_end.append(lambda: server.__exit__(None, None, None))
        cache = tc.Cache(tmp_path / f"cache{len(at_end)}", size="64MiB") if request.param == "cached" else False
        if cache:
            at_end.append(cache.close)
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        at_end.extend([dataset.close, join_loading, dataset.close])  # data set and cache open themselves for who reads
        return dataset

    yield open_dataset
    for end in reversed(at_end):
        end()


@pytest.mark.parametrize(
    ("compression", "column", "shuffle"), [("none", "id", False), ("none", "boxes", True), ("zstd:3", "text", True)]
)
def test_records_of_corrupt_blocks_are_replaced_by_those_before_them(
    make_dataset, opened, compression, column, shuffle
):
    path = make_dataset(N, compression=compression)
    clean = tc.Dataset(path)
    sequence = flat(ids_of(tc.DataLoader(clean, 16, shuffle=shuffle, options=options())))
    blocks = blocks_of(clean)
    struck = [blocks[0], blocks[len(blocks) // 2]]  # without shuffle the epoch's first records among them
    bad = set()
    for shard, block, records in struck:
        strike(clean, path, shard, block, column)
        bad |= set(records)
    loader = tc.DataLoader(opened(path), 16, shuffle=shuffle, options=options())
    with pytest.warns(RuntimeWarning, match=WARNED) as warned:
        found = ids_of(loader)
    assert flat(found) == mend(sequence, bad)
    assert loader.stats()["skipped"] == len(bad)
    assert loader.stats()["samples"] == N
    said = [str(one.message) for one in warned if WARNED in str(one.message)]
    assert len(said) == len({shard for shard, _, _ in struck})
    assert all(".tcs" in text or "shards/" in text for text in said)
    assert all("block" in text for text in said)
    second = ids_of(loader)  # and nobody is told again
    assert flat(second) == mend(flat(second), bad)
    assert loader.stats()["skipped"] == 2 * len(bad)


def test_a_resumed_run_serves_the_same_replacements(make_dataset, opened):
    path = make_dataset(N, compression="zstd:3")
    clean = tc.Dataset(path)
    blocks = blocks_of(clean)
    for shard, block, _ in (blocks[2], blocks[3], blocks[-1]):
        strike(clean, path, shard, block, "tokens")
    dataset = opened(path)
    loader = tc.DataLoader(dataset, 8, shuffle=True, options=options())
    with pytest.warns(RuntimeWarning, match=WARNED):
        read = read_with_states(loader)
    found, states = [check_batch(batch) for batch, _ in read], [state for _, state in read]
    for n in range(0, len(states) - 1, 11):
        assert ids_of(resumed(tc.DataLoader(dataset, 8, shuffle=True, options=options()), states[n])) == found[n + 1 :]


@pytest.mark.parametrize("streams", [1, 4])
def test_each_rank_replaces_by_its_own_sequence(make_dataset, streams):
    path = make_dataset(N, compression="zstd:3")
    clean = tc.Dataset(path)
    blocks = blocks_of(clean)
    ranks = [{"rank": rank, "world_size": 2, "shuffle_streams": streams} for rank in range(2)]
    sequences = [flat(ids_of(tc.DataLoader(clean, 8, shuffle=True, options=options(**rank)))) for rank in ranks]
    shard, block, bad = blocks[4]
    strike(clean, path, shard, block, "blob")
    skipped = 0
    for rank, sequence in zip(ranks, sequences, strict=True):
        loader = tc.DataLoader(tc.Dataset(path), 8, shuffle=True, options=options(**rank))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert flat(ids_of(loader)) == mend(sequence, set(bad))
        skipped += loader.stats()["skipped"]
    assert skipped == len(bad)


def test_of_a_large_block_only_the_records_of_damaged_pages_are_replaced(tmp_path):
    path, n, words = tmp_path / "data", 512, 128
    rows = np.arange(n)[:, None] * 1000 + np.arange(words)
    with tc.Writer(path, schema={"row": tc.Tensor("int64", (words,))}, block_size="512KiB", compression="none") as w:
        w.write_batch({"row": rows})
    clean = tc.Dataset(path)
    batches = tc.DataLoader(clean, 16, shuffle=True, options=options())
    sequence = flat([(batch["row"][:, 0] // 1000).tolist() for batch in batches])
    strike(clean, path, 0, 0, "row", at=70_000)  # in its second page of 64 KiB
    bad = set(range(64, 128))
    loader = tc.DataLoader(tc.Dataset(path), 16, shuffle=True, options=options())
    with pytest.warns(RuntimeWarning, match=WARNED):
        rows = torch.cat([batch["row"] for batch in loader])
    assert (rows == rows[:, :1] + torch.arange(words)).all()
    assert (rows[:, 0] // 1000).tolist() == mend(sequence, bad)
    assert loader.stats()["skipped"] == len(bad)


def test_a_shard_without_a_footer_is_replaced_whole(make_dataset, opened):
    path = make_dataset(N)
    clean = tc.Dataset(path)
    shard = 1
    bad = {i for s, _, records in blocks_of(clean) if s == shard for i in records}
    strike_footer(clean, path, shard)
    dataset = opened(path)
    loader = tc.DataLoader(dataset, 8, shuffle=False, options=options())
    with pytest.warns(RuntimeWarning, match=WARNED) as warned:
        read = read_with_states(loader)
    found, states = [check_batch(batch) for batch, _ in read], [state for _, state in read]
    assert len([one for one in warned if WARNED in str(one.message)]) == 1
    assert loader.stats()["skipped"] == len(bad)
    assert flat(found) == mend(list(range(N)), bad)
    assert ids_of(resumed(tc.DataLoader(dataset, 8, shuffle=False, options=options()), states[11])) == found[12:]


def test_a_missing_shard_is_an_error_with_on_corrupt(make_dataset):
    path = make_dataset(N)
    dataset = tc.Dataset(path)
    (path / dataset._source.leaves[0].table.info(1).name).unlink()
    with pytest.raises(tc.NotFound):
        list(tc.DataLoader(dataset, 8, shuffle=True, options=options()))


def test_a_rank_without_a_readable_record_is_an_error(make_dataset):
    path = make_dataset(40)
    clean = tc.Dataset(path)
    for shard, block, _ in blocks_of(clean):
        strike(clean, path, shard, block, "id")
    loader = tc.DataLoader(tc.Dataset(path), 8, shuffle=True, options=options())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(tc.CorruptShard, match="no record of this rank"):
            list(loader)


def test_records_of_views_joined_and_mixed_data_sets_are_replaced_too(make_dataset):
    first, second = make_dataset(100, "first"), make_dataset(100, "second")
    for path in (first, second):
        clean = tc.Dataset(path)
        shard, block, records = blocks_of(clean)[3]
        strike(clean, path, shard, block, "text")
    bad = set(records)
    whole = [tc.Dataset(path) for path in (first, second)]
    shown = {
        "view": whole[0].select(range(1, 100, 2)),
        "joined": whole[0] + whole[1],
        "mixed": tc.mix(whole, [1, 2]),
    }
    for dataset in shown.values():
        loader = tc.DataLoader(dataset, 8, shuffle=True, options=options())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = flat(ids_of(loader))
        assert not set(found) & bad
        assert len(found) == len(dataset)
        assert loader.stats()["skipped"] > 0


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
def test_corrupt_records_of_a_sampler_are_replaced_by_those_before_them(make_dataset, kind):
    path = make_dataset(N, compression="zstd:3")
    clean = tc.Dataset(path)
    shard, block, bad = blocks_of(clean)[5]
    strike(clean, path, shard, block, "score")
    sequence = np.random.default_rng(3).permutation(N).tolist()
    batches = BatchSampler(sequence, 10, False)
    how = {"sampler": sequence, "batch_size": 10} if kind == "sampler" else {"batch_sampler": batches}
    loader = tc.DataLoader(
        tc.Dataset(path), **how, options=tc.LoaderOptions(on_corrupt="previous", shuffle_window_bytes="2KiB")
    )
    with pytest.warns(RuntimeWarning, match=WARNED):
        found = ids_of(loader)
    assert flat(found) == mend(sequence, set(bad))
    assert loader.stats()["skipped"] == len(bad)


def test_invalid_text_is_replaced_for_its_record_alone(tmp_path):
    path = tmp_path / "data"
    with tc.Writer(path, schema={"id": "int64", "text": "str"}, compression="none") as writer:
        writer.write_batch({"id": np.arange(50), "text": ["a" if i != 20 else "needle" for i in range(50)]})
    clean = tc.Dataset(path)
    sequence = flat([batch["id"].tolist() for batch in tc.DataLoader(clean, 5, shuffle=True, options=options())])
    replace_bytes(path, b"needle", b"needl\xff")  # not UTF-8, and nobody checks sums
    loader = tc.DataLoader(tc.Dataset(path, verify="never"), 5, shuffle=True, options=options())
    with pytest.warns(RuntimeWarning, match=WARNED):
        found = flat([batch["id"].tolist() for batch in loader])
    assert found == mend(sequence, {20})
    assert loader.stats()["skipped"] == 1


def test_images_that_cannot_be_decoded_are_replaced_by_those_before_them(tmp_path):
    path, n, bad = tmp_path / "data", 60, {0, 17, 18, 19, 44}
    with tc.Writer(
        path, schema={"id": "int64", "image": tc.Image("jpeg")}, shard_size="16KiB", block_size="4KiB"
    ) as writer:
        for i in range(n):
            image = b"\xff\xd8\xffnot a picture" if i in bad else encode(picture(20, 30, seed=i))
            writer.write({"id": i, "image": image})
    dataset = tc.Dataset(path, decode={"image": tc.DecodeImage(8)})
    clean = tc.Dataset(path)
    sequence = flat([batch["id"].tolist() for batch in tc.DataLoader(clean, 5, shuffle=True, options=options())])
    loader = tc.DataLoader(dataset, 5, shuffle=True, options=options())
    with pytest.warns(RuntimeWarning, match="cannot be decoded"):
        read = read_with_states(loader)
    found, states = flat([batch["id"].tolist() for batch, _ in read]), [state for _, state in read]
    pictures: dict[int, torch.Tensor] = {}
    for i, shown in zip(found, itertools.chain(*(batch["image"] for batch, _ in read)), strict=True):
        assert (pictures.setdefault(i, shown) == shown).all()
    assert found == mend(sequence, bad)
    assert loader.stats()["skipped"] == len(bad)
    for at in (2, 7):
        again = tc.Dataset(path, decode={"image": tc.DecodeImage(8)})
        rest = resumed(tc.DataLoader(again, 5, shuffle=True, options=options()), states[at])
        assert flat([batch["id"].tolist() for batch in rest]) == found[5 * (at + 1) :]


def test_corruption_is_an_error_by_default_and_other_options_are_refused(make_dataset):
    path = make_dataset(N)
    clean = tc.Dataset(path)
    strike(clean, path, *blocks_of(clean)[5][:2], "id")
    loader = tc.DataLoader(tc.Dataset(path), 4, options=options(on_corrupt="raise", shuffle_window_bytes="1KiB"))
    served = []
    with pytest.raises(tc.CorruptShard, match="block"):
        served.extend(check_batch(batch) for batch in loader)
    assert served
    assert flat(served) == list(range(4 * len(served)))
    assert loader.stats()["skipped"] == 0
    with pytest.raises(ValueError, match="on_corrupt must be 'raise' or 'previous', got 'skip'"):
        tc.LoaderOptions(on_corrupt="skip")


def test_a_file_truncated_under_a_running_loader_costs_records_and_not_the_process(make_dataset):
    path = make_dataset(N)
    batches = iter(tc.DataLoader(tc.Dataset(path), 8, shuffle=True, options=options()))
    found = check_batch(next(batches))
    for file in sorted((path / "shards").rglob("*.*"))[::2]:
        file.chmod(0o644)
        os.truncate(file, file.stat().st_size // 2 // 4096 * 4096)  # of the page that a file ends in the rest is zeros
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in batches:
            found += check_batch(batch)
    assert len(found) == N


@pytest.mark.parametrize("on_corrupt", ["raise", "previous"])
def test_a_partial_copy_truncated_under_a_running_loader_is_fetched_again(tmp_path, on_corrupt):
    path, n = tmp_path / "data", 256
    schema = {"id": tc.Tensor("int64", (64,)), "other": tc.Tensor("int64", (640,))}
    with tc.Writer(path, schema=schema, shard_size="512KiB", block_size="64KiB", compression="none") as writer:
        writer.write_batch({"id": np.arange(n)[:, None] + np.zeros(64, np.int64), "other": np.ones((n, 640), np.int64)})
    files = [file for file in path.rglob("*") if file.is_file()]
    objects = {f"data/{f.relative_to(path).as_posix()}": f.read_bytes() for f in files}
    with HttpFaultServer(objects) as server, tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache, columns=["id"])
        loader = tc.DataLoader(dataset, 8, shuffle=True, options=options(on_corrupt=on_corrupt))
        assert sorted(flat([batch["id"][:, 0].tolist() for batch in loader])) == list(range(n))
        batches = iter(loader)
        found = next(batches)["id"][:, 0].tolist()
        parts = list((cache.path / "copies").glob("*.part"))
        assert parts  # of the shards only one column is here
        for file in parts:
            os.truncate(file, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in batches:
                assert (batch["id"] == batch["id"][:, :1]).all()
                found += batch["id"][:, 0].tolist()
        assert sorted(found) == list(range(n))
        join_loading()
        del batches, loader
        dataset.close()
