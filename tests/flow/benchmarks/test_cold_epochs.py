"""Cold epochs of the comparison: each begins without local copies, serves every record once, and has a row."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.flow.benchmarks.conftest import BENCHMARKS
from tests.support.s3_server import S3Server
from tests.support.warm_python import WarmPython


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
    installed_here = replace(peers["s3fs_bulk"], requirements=(), shuffles=("none",))
    monkeypatch.setitem(peers, "s3fs_bulk", installed_here)
    plan = compare.Plan(
        folder=tmp_path,
        environments=tmp_path / "envs",
        peers=("tiercache", "s3fs_bulk"),
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
    assert [*loads] == [("tiercache", "none"), ("tiercache", "full"), ("s3fs_bulk", "none")]
    for (_, shuffle), row in loads.items():
        assert 0 < row["first_batch_s"]["min"] <= row["epoch_s"]["min"]
        assert row["sent_bytes"]["min"] >= workload.n_records * workload.record_bytes
        assert (row["rank_correlation"]["min"] == 1) == (shuffle == "none")
    text = bench("peers.report").markdown([{**row, **bench("rows").machine()} for row in rows])
    assert "In the stored order:" in text
    assert "Shuffled:" in text
    assert text.count("| s3fs, in bulk") == 2  # and in the table of packing
