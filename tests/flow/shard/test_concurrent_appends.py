"""Two processes append to one data set at once: each commit is a version, and no record is lost or there twice."""

import json
import tempfile
from contextlib import ExitStack

import pytest
from tests.stress.appending import PART, SCHEMA

import tiercache as tc
from tiercache.waiting import wait_for


def append_at_once(warm_python, tmp_path, url, storage_options, n_commits):
    """Let two processes append, and check every version."""
    options = {"storage_options": storage_options}
    tc.Writer(url, schema=SCHEMA, **options).close()
    start = tmp_path / "start"
    with ExitStack() as stack:
        outs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
        arguments = ["-m", "tests.stress.appending", url, json.dumps(storage_options)]
        children = [
            warm_python.start([*arguments, str(i), str(n_commits), str(start)], out=out, errors=out, is_strict=True)
            for i, out in enumerate(outs)
        ]

        def texts():
            return [out.seek(0) or out.read() for out in outs]

        wait_for(lambda: all(texts()) or any(child.poll() is not None for child in children), 60)
        start.touch()
        assert ([child.wait(500) for child in children], texts()) == ([0, 0], ["ready\n", "ready\n"])

    versions = tc.Versions(url, **options).list()
    assert [v.number for v in versions] == list(range(1, 2 * n_commits + 2))
    assert [v.parent for v in versions] == [None, *range(1, 2 * n_commits + 1)]
    before = []
    n_committed = [0, 0]
    for version in versions[1:]:
        dataset = tc.Dataset(url, version=version.number, cache=None, **options)
        records = [record for batch in dataset.to_arrow() for record in batch.to_pylist()]
        dataset.close()
        part = records[len(before) :]
        writer = part[0]["writer"]
        expected = [{"writer": writer, "commit": n_committed[writer], "row": row} for row in range(PART)]
        assert (records[: len(before)], part) == (before, expected)
        assert (version.n_records, version.kind) == (len(records), "append")
        n_committed[writer] += 1
        before = records
    assert n_committed == [n_commits, n_commits]


@pytest.mark.parametrize("n_commits", [10, pytest.param(50, marks=pytest.mark.stress)])
def test_two_processes_append_to_a_folder(warm_python, tmp_path, n_commits):
    append_at_once(warm_python, tmp_path, str(tmp_path / "set"), {}, n_commits)


@pytest.mark.s3
@pytest.mark.parametrize("n_commits", [10, pytest.param(50, marks=pytest.mark.stress)])
def test_two_processes_append_to_a_bucket(warm_python, tmp_path, s3_server, n_commits):
    url = f"{s3_server.url}/appends-{n_commits}"
    append_at_once(warm_python, tmp_path, url, s3_server.storage_options, n_commits)
