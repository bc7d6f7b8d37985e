"""The command as a process: streams, signals, exit codes."""

import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from tests.support.http_server import HttpFault, HttpFaultServer

import tiercache as tc

COMMAND = [sys.executable, "-m", "tiercache.cli.app"]


def run(*arguments, **options):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60, **options)


def test_results_go_to_standard_output_and_errors_to_standard_error(data_set, tmp_path):
    done = run("info", data_set, "--shards", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[-1])["records"] == 20
    done = run("info", tmp_path / "gone")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        f"tiercache: error: {tmp_path}/gone: no data set here: it is empty, or does not exist"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_stops_cleanly_and_the_same_command_continues(tmp_path, workers):
    for part in range(20):
        lines = (f'{{"x": {i}}}\n' for i in range(part * 20_000, (part + 1) * 20_000))
        (tmp_path / f"{part:02}.jsonl").write_text("".join(lines))
    command = ["pack", f"{tmp_path}/*.jsonl", tmp_path / "out", "--workers", workers, "--shard-size", "100KB"]
    process = subprocess.Popen(
        [*COMMAND, *map(str, command)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (finished := list((tmp_path / "out").glob("_tiercache/packing/*/*/*.json"))):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ("tiercache: interrupted: the same command continues, and keeps what is finished\n")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shards/*.tcs")}
    assert len(kept) >= len(finished)
    assert "a packing into it has begun, and is not finished" in run("info", tmp_path / "out").stderr
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert re.match(r"continues: \d+ of \d+ tasks are finished\n", done.stdout)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shards/*.tcs") if p in kept} == kept
    dataset = tc.Dataset(tmp_path / "out")
    assert dataset[:]["x"].tolist() == list(range(400_000))
    dataset.close()
    assert {p.parent.name for p in (tmp_path / "out").rglob("*") if p.is_file()} == {
        "_tiercache",
        "segments",
        "shards",
        "versions",
    }


def test_an_interrupted_warm_says_how_to_go_on_and_continues_from_there(data_set, tmp_path):
    objects = {p.relative_to(data_set).as_posix(): p.read_bytes() for p in data_set.rglob("*") if p.is_file()}
    shards = sorted(name for name in objects if name.endswith(".tcs"))
    cache = ["--cache", str(tmp_path / "cache"), "--cache-size", "100MB"]
    with HttpFaultServer(objects) as server:
        server.when(lambda _method, path: HttpFault("stall") if path.endswith(shards[-1]) else None)
        command = [*COMMAND, "warm", server.url, *cache, "-j", "1"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        while not any(seen.path.endswith(shards[-2]) for seen in server.log):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors == (
            "tiercache: interrupted: fetched shards stay in the cache; the same command continues from there\n"
        )
        server.when(lambda _method, _path: None)
        server.release()
        before = len(server.log)
        done = run("warm", server.url, *cache, "--json")
        again = {seen.path.lstrip("/") for seen in server.log[before:]} & set(shards)
    assert done.returncode == 0, done.stderr
    assert again <= set(shards[-2:])
    assert json.loads(done.stdout.splitlines()[-1])["fetched"] == len(again)


def test_a_closed_pipe_is_no_error(data_set):
    process = subprocess.Popen(
        [*COMMAND, "info", data_set, "--shards", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in (0, 1)
    assert errors == b""


def test_a_terminal_gets_a_progress_bar_and_is_asked_before_evicting(tiercache, data_set, tmp_path):
    cache = ["--cache", str(tmp_path / "cache"), "--cache-size", "100MB"]
    shown = on_terminal(["warm", str(data_set), *cache])
    assert "warming" in shown
    assert tiercache("status", *cache).out.count(str(data_set)) == 1
    shown = on_terminal(["evict", "--all", *cache], answer=b"n\n")
    assert "Evict 4 copies" in shown
    assert "nothing was evicted" in shown
    assert "evicted 4 copies" in on_terminal(["evict", "--all", *cache], answer=b"y\n")
    assert str(data_set) not in tiercache("status", *cache).out


def test_the_question_before_a_deletion_names_each_checkpoint_with_its_step_and_its_metrics(tmp_path):
    run = tmp_path / "run"
    with tc.Checkpoints(run) as checkpoints:
        for step, loss in ((1000, 0.5), (2000, 0.25), (3000, 0.75)):
            checkpoints.save(step, {"step": step}, metrics={"loss": loss, "lr": 0.1}).wait()
        checkpoints.pin(2000)
        first, pinned, last = checkpoints.list()
    shown = on_terminal(["ckpt", "rm", str(run)], answer=b"n\n")
    assert f"{first.name}: step 1,000, loss = 0.5, lr = 0.1" in shown
    assert f"{last.name}: step 3,000, loss = 0.75, lr = 0.1, a run is resumed from it" in shown
    assert f"{pinned.name}: step" not in shown
    assert "Delete 2 checkpoints" in shown
    assert "nothing was deleted" in shown


def on_terminal(arguments, answer=b""):
    """What the command shows on a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([*COMMAND, *arguments], stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.write(ours, answer)
        shown = b""
        try:
            while data := os.read(ours, 65536):
                shown += data
        except OSError:  # Linux says EIO when the last writer is gone
            pass
        process.wait(60)
    os.close(ours)
    return shown.decode()
