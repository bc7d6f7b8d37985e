"""SIGKILL while a source is packed: the same command goes on, and each record is there once, in order."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.stress.kills import KillLoop, points_where
from tests.stress.packing import OPTIONS, SCHEMA, SHARES, Target, write_source

import tiercache as tc
from tiercache.shard.packings import list_packings
from tiercache.shard.verify import verify_dataset
from tiercache.store import open_store
from tiercache.waiting import SYSTEM_CLOCK, wait_for


def shards(url: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in url.glob("shards/*.tcs")}


def test_a_packing_killed_at_any_point_continues_and_keeps_what_is_finished(tmp_path, warm_python):
    target = Target(tmp_path)
    points = points_where(lambda name: name.startswith("packing."))
    assert len(points) == 5
    for point in points:
        for nth in ("1", "2", "3") if point in ("packing.shards_written", "packing.task_recorded") else ("1",):
            before = shards(target.url)
            loop = KillLoop(
                warm_python, "tests.stress.packing", tmp_path / "progress",
                [str(target.source), str(target.url), point, nth], work_s=0, seed=0,
            )  # fmt: skip
            code, errors = loop._run(None)
            assert code == -signal.SIGKILL, (point, errors)
            target.check(finished=False)
            (packing,) = list_packings(open_store(target.url))
            kept = {Path(info.name).name for _, info in packing.shards}
            assert len(kept) or point == "packing.tasks_removed" or nth == "1"
            written = shards(target.url)
            loop._command = loop._command[:-2]
            loop.finish()
            target.check(finished=True)
            now = shards(target.url)
            assert {name: now[name] for name in kept} == {name: written[name] for name in kept}
            n_new, orphans = len(now.keys() - before.keys()), written.keys() - before.keys() - kept
            if point not in ("packing.committed", "packing.tasks_removed"):
                assert n_new - len(orphans) >= len(kept)


@pytest.mark.timeout(300)
def test_a_split_killed_at_any_point_is_finished_with_each_record_in_one_part_once(tmp_path, warm_python):
    source = tmp_path / "source"
    records = write_source(source)
    split_of = {}
    for point in points_where(lambda name: name.startswith("packing.")):
        for nth in ("1", "2"):
            if point in ("packing.tasks_finished", "packing.tasks_removed") and nth == "2":
                continue
            url = tmp_path / f"{point}-{nth}"
            for part in SHARES:
                tc.Writer(url / part, schema=SCHEMA).close()
            arguments = [str(source), str(url), point, nth, "split"]
            loop = KillLoop(warm_python, "tests.stress.packing", tmp_path / "progress", arguments, work_s=0, seed=0)
            code, errors = loop._run(None)
            assert code == -signal.SIGKILL, (point, errors)
            if (point, nth) == ("packing.committed", "1"):
                assert [len(tc.Dataset(url / part)) > 0 for part in SHARES] == [True, False]
            loop._command[-3:] = ["", "1", "split"]
            loop.finish()
            found = {part: tc.Dataset(url / part)[:]["x"].tolist() for part in SHARES}
            assert sorted(found["train"] + found["val"]) == [record["x"] for record in records]
            assert found == (split_of or found)
            split_of = found
            assert list(list_packings(open_store(url))) == []
            assert all(list(verify_dataset(open_store(url / part))) == [] for part in SHARES)


@pytest.mark.timeout(600)
def test_passes_killed_at_any_point_leave_the_records_that_a_run_without_kills_writes(tmp_path, warm_python):
    source = tmp_path / "source"
    records = write_source(source)

    def loop_of(name: str, *point: str) -> KillLoop:
        for part in SHARES:
            tc.Writer(tmp_path / name / part, schema=SCHEMA).close()
        arguments = [str(source), str(tmp_path / name), *(point or ("", "1")), "sorted"]
        return KillLoop(warm_python, "tests.stress.packing", tmp_path / "progress", arguments, work_s=0, seed=0)

    def found(name: str) -> dict[str, list[int]]:
        return {part: tc.Dataset(tmp_path / name / part)[:]["x"].tolist() for part in SHARES}

    loop_of("whole").finish()
    texts = {number: record["text"] for number, record in enumerate(records)}
    first = {text: number for number, text in reversed(texts.items())}
    expected = found("whole")
    assert sorted(expected["train"] + expected["val"]) == sorted(first.values())
    for numbers in expected.values():
        assert [texts[i] for i in numbers] == sorted(texts[i] for i in numbers)
    # Tasks of the hashes, of the duplicates, of the runs, and of the last pass: in this order.
    hits = {"packing.shards_written": ("2", "14"), "packing.task_recorded": ("22",), "packing.committed": ("1", "2")}
    for point in points_where(lambda name: name.startswith("packing.")):
        for nth in hits.get(point, ("1",)):
            name = f"{point}-{nth}"
            loop = loop_of(name, point, nth)
            code, errors = loop._run(None)
            assert code == -signal.SIGKILL, (point, nth, errors)
            loop._command[-3:] = ["", "1", "sorted"]
            loop.finish()
            assert found(name) == expected
            assert list(list_packings(open_store(tmp_path / name))) == []


def kill_group(command: list[str], url: Path, after_s: float) -> int:
    """Run the command, and kill its process group so long after the packing has begun. Returns the exit code."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    assert wait_for(lambda: list(url.glob("_tiercache/packing/*/*")) or process.poll() is not None, 60)
    SYSTEM_CLOCK.sleep(after_s)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


def kill_groups(target: Target, n_kills: int, seed: int, work_s: float) -> None:
    """Kill the command and its worker processes, at once, at random moments; each time the next run continues."""
    rng = random.Random(seed)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    arguments += [f"--column={name}={kind}" for name, kind in SCHEMA.items()]
    n_struck = 0
    while n_struck < n_kills:
        workers = rng.choice([1, 2])
        command = [sys.executable, "-m", "tiercache.cli.app", "pack", target.source, target.url, "--workers", workers]
        code = kill_group([*map(str, command), *arguments], target.url, rng.uniform(0, work_s * workers))
        n_struck += code == -signal.SIGKILL
        target.check(finished=code == 0)
    done = subprocess.run([*map(str, command), *arguments], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    target.check(finished=True)


@pytest.mark.timeout(300)
def test_a_killed_group_of_processes_continues(tmp_path):
    kill_groups(Target(tmp_path), 3, seed=5, work_s=0.6)


@pytest.mark.stress
@pytest.mark.timeout(3600)
def test_a_hundred_kills_of_packings_lose_no_record_and_write_none_twice(tmp_path, warm_python):
    target = Target(tmp_path)
    loop = KillLoop(
        warm_python, "tests.stress.packing", tmp_path / "progress", [str(target.source), str(target.url)],
        work_s=0.15, seed=7,
    )  # fmt: skip
    while loop.n_struck < 60:
        if loop.kill_once():
            target.check(finished=False)
        else:
            target.check(finished=loop.lines()[-1:] == ["end"])
    loop.finish()
    target.check(finished=True)
    kill_groups(target, 40, seed=8, work_s=0.6)
