"""Cold epochs of the comparison: each begins without local copies, serves every record once, and has a row."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.flow.benchmarks.conftest import BENCHMARKS
from tests.support.warm_python import WarmPython

from tiercache.demo.s3_server import S3Server


def tiny(bench: Callable[[str], ModuleType]) -> Any:
    workloads = bench("workloads")
    return replace(workloads.COLD, fields=(workloads.array_field("values", "uint8", (4096,)),), n_records=323)


@pytest.mark.s3
def test_each_contender_has_a_row_for_the_cold_epoch_of_each_order(
    bench: Callable[[str], ModuleType],
    tmp_path: Path,
    warm_python: WarmPython,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare, peers, store = bench("peers.compare"), bench("peers.catalogue").PEERS, bench("peers.cold_store")

    def run_in_a_fork(_runner: Any, _python: Path, job: Any, environment: Any = None) -> dict[str, Any]:
        command = ["-m", "peers.child", json.dumps(job.as_json())]
        done = warm_python.run(command, cwd=BENCHMARKS, environment=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    @contextmanager
    def shared(_folder: Path) -> Iterator[Any]:
        yield store.ColdStore(s3_server)

    monkeypatch.setattr(bench("peers.runner").Runner, "run", run_in_a_fork)
    monkeypatch.setattr(compare, "cold_store", shared)
    for name, shuffles in {"s3fs_map": ("full",), "s3fs_bulk": ("none",)}.items():
        monkeypatch.setitem(peers, name, replace(peers[name], requirements=(), shuffles=shuffles))  # installed here
    plan = compare.Plan(
        folder=tmp_path,
        environments=tmp_path / "envs",
        peers=("tiercache", "obstore_floor", "s3fs_map", "s3fs_bulk"),
        shuffles=("none", "full"),
        workers=(0,),
        repetitions=1,
        min_s=0.0,
        check_s=0.0,
        timeout_s=60.0,
        reuse=False,
        resume=False,
    )
    workload = tiny(bench)
    rows = compare.compare(workload, plan, compare.Tasks(plan))
    loads = {(row["peer"], row["shuffle"]): row for row in rows if row["benchmark"] == "cold"}
    assert [*loads] == [
        ("tiercache", "none"),
        ("tiercache", "full"),
        ("obstore_floor", "none"),
        ("s3fs_map", "full"),
        ("s3fs_bulk", "none"),
    ]
    for (_, shuffle), row in loads.items():
        assert 0 < row["first_batch_s"]["min"] <= row["epoch_s"]["min"]
        assert row["sent_bytes"]["min"] >= workload.n_records * workload.record_bytes
        assert (row["rank_correlation"]["min"] == 1) == (shuffle == "none")
    text = bench("peers.report").markdown([{**row, **bench("rows").machine()} for row in rows])
    assert "In the stored order:" in text
    assert "Shuffled:" in text
    assert text.count("| s3fs, in bulk") == 2  # and in the table of packing


def cold(bench: Callable[[str], ModuleType], folder: Path, batches: Callable[[Any], list[Any]]) -> Any:
    """Figures of a cold epoch of what batches(source) returns. Copies of an earlier one are in the cache's folder."""
    workload = tiny(bench)
    source = bench("generate").generate(workload, folder / "data")
    places = {"source_folder": str(folder / "data"), "folder": "", "library_folder": ""}
    job = bench("peers.job").Job(task="measure", peer="one", workload=workload, **places, url="s3://bucket/one")
    cache = folder / "cache"
    cache.mkdir()
    (cache / "copy").write_bytes(b"of an earlier epoch")

    @contextmanager
    def opened(_job: Any) -> Iterator[Any]:
        assert not any(cache.iterdir())
        yield bench("peers.job").Opened(lambda: iter(batches(source)), "a note")

    return bench("peers.child").cold(SimpleNamespace(opened=opened), replace(job, cache_folder=str(cache)))


def halves(source: Any) -> list[Any]:
    n, size = source.workload.n_records, source.workload.batch_size
    return [source.batch(start, min(start + size, n)) for start in range(0, n, size)]


def test_a_cold_epoch_begins_without_the_copies_of_an_earlier_one(
    bench: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    found = cold(bench, tmp_path, halves)
    assert 0 < found["first_batch_s"] < found["epoch_s"]
    assert found["samples_per_s"] == pytest.approx(323 / found["epoch_s"])
    assert (found["note"], found["rank_correlation"]) == ("a note", 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda batches: batches[:-1], "records were not served"),
        (lambda batches: [*batches, batches[0]], "records were not served"),
        (lambda batches: [{**batches[0], "values": batches[1]["values"]}, *batches[1:]], "contents of 'values' differ"),
    ],
    ids=["missing", "twice", "another record's content"],
)
def test_a_cold_epoch_that_does_not_serve_every_record_once_fails(
    bench: Callable[[str], ModuleType], tmp_path: Path, spoil: Callable[[list[Any]], list[Any]], message: str
) -> None:
    with pytest.raises(bench("consumer").WrongBatchesError, match=message):
        cold(bench, tmp_path, lambda source: spoil(halves(source)))


def row(bench: Callable[[str], ModuleType], peer: str, shuffle: str, epoch_s: float) -> dict[str, Any]:
    names = ("first_batch_s", "cpu_s", "sent_bytes", "rank_correlation", "neighbour_distance")
    figures = {name: {"min": 1.0, "median": 1.0, "max": 1.0} for name in names}
    fixed = {
        "benchmark": "cold",
        "peer": peer,
        "title": peer,
        "shuffle": shuffle,
        "form": "",
        "version": "",
        "note": "",
    }
    spread = {"min": epoch_s, "median": epoch_s, "max": epoch_s}
    workload = bench("workloads").COLD.as_json()
    return {**fixed, **figures, "epoch_s": spread, "workload": workload, **bench("rows").machine()}


def cells(text: str, peer: str) -> list[list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return [line for line in lines if line[0].startswith(peer)]


def test_the_report_compares_cold_epochs_of_the_same_kind_of_shuffle(bench: Callable[[str], ModuleType]) -> None:
    report = bench("peers.report")
    epochs = [
        ("tiercache", "none", 2.0),
        ("tiercache", "full", 5.0),
        ("tiercache", "default", 4.0),
        ("obstore_floor", "none", 1.0),
        ("s3fs_bulk", "none", 7.0),
        ("s3fs_bulk", "full", 10.0),
        ("wds", "default", 3.0),
        ("lit", "default", 8.0),
    ]
    text = report.markdown([row(bench, *epoch) for epoch in epochs])
    titles = list(report.COLD_TITLES)
    floor, ratio, required = (titles.index(title) for title in ("x floor", "tiercache : it", "required"))
    assert [line[floor] for line in cells(text, "tiercache")] == ["0.50", "0.25", "0.20"]
    assert [line[required] for line in cells(text, "s3fs_bulk")] == ["3 x: met", "3 x: NOT MET"]
    assert [line[ratio] for line in cells(text, "s3fs_bulk")] == ["3.50", "2.00"]
    assert [line[required] for peer in ("wds", "lit") for line in cells(text, peer)] == ["1 x: NOT MET", "1 x: met"]


def test_the_tables_of_cold_epochs_are_a_file_of_their_own(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, rows = bench("peers.report"), tmp_path / "peers.jsonl"
    rows.write_text(json.dumps(row(bench, "tiercache", "none", 2.0)) + "\n")
    monkeypatch.setattr("sys.argv", ["report", str(rows), "--into", str(tmp_path)])
    report.main()
    assert cells((tmp_path / "cold.md").read_text(), "tiercache")[0][1] == "2.00"
    assert not (tmp_path / "peers.md").exists()


def test_a_resumed_run_finds_a_cold_epoch_of_a_server_at_another_place(
    bench: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    compare = bench("peers.compare")
    places = {"source_folder": "", "folder": "", "library_folder": ""}
    job = bench("peers.job").Job(task="measure", peer="wds", workload=tiny(bench), **places)
    job = replace(job, url="s3://one/wds", cache_folder="one")
    moved = replace(job, url="s3://two/wds", cache_folder="two")
    assert compare._task(job, 0) == compare._task(moved, 0) != compare._task(moved, 1)
