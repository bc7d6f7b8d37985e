"""SIGKILL at random instants of writing: a version is there whole or not at all, and the next run just goes on."""

from pathlib import Path

import numpy as np
import pytest
from tests.stress.kills import KillLoop
from tests.stress.writing import N_RECORDS, records
from tests.support.warm_python import WarmPython

import tiercache as tc
from tiercache.shard.verify import verify_dataset
from tiercache.store import open_store


def check(url: Path) -> None:
    """Every version is whole versions of records, in order, and every stored byte is right."""
    try:
        dataset = tc.Dataset(url)
    except tc.NotFound:
        return  # no version was committed yet
    assert len(dataset) == dataset.version * N_RECORDS
    found = dataset[:]
    expected = [records(start) for start in range(0, len(dataset), N_RECORDS)]
    assert np.array_equal(found["id"], np.arange(len(dataset)))
    assert np.array_equal(found["values"], np.concatenate([batch["values"] for batch in expected]))
    assert found["text"] == [text for batch in expected for text in batch["text"]]
    assert list(verify_dataset(open_store(url))) == []
    dataset.close()


def run(python: WarmPython, root: Path, n_kills: int, seed: int) -> KillLoop:
    url = root / "data"
    loop = KillLoop(python, "tests.stress.writing", root / "progress", [str(url)], work_s=0.12, seed=seed)
    loop.run(n_kills, lambda: check(url))
    return loop


@pytest.mark.timeout(120)
def test_a_killed_writer_needs_no_clean_up(tmp_path, warm_python):
    assert run(warm_python, tmp_path, 3, seed=1).n_struck == 3


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_fifty_kills_of_writing_leave_no_wrong_record(tmp_path, warm_python, capsys):
    loop = run(warm_python, tmp_path, 50, seed=2)
    with capsys.disabled():
        print(f"\nwriting: {loop.n_struck} kills struck inside the work")
    assert loop.n_struck == 50
