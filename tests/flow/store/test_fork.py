"""Processes: forked children of a parent that has used obstore or not, and secrets in representations."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys

import pytest

from tiercache.errors import StoreError

pytestmark = pytest.mark.s3


def _read(store, results):
    try:
        results.put(store.get("a"))
    except StoreError as error:
        results.put(str(error))
    store.close()


@pytest.fixture
def store(s3):
    store = s3.server.store(s3.prefix)
    yield store
    store.close()


@pytest.mark.parametrize("is_new", [False, True])
def test_a_forked_child_of_a_process_that_has_read_is_told_how_to_start_workers(s3, store, is_new):
    store.put("a", b"data")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    given = s3.server.store(s3.prefix) if is_new else store
    child = context.Process(target=_read, args=(given, results))
    child.start()
    assert 'multiprocessing_context="forkserver"' in results.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    results.close()
    results.join_thread()
    assert store.get("a") == b"data", "the parent goes on as before"


CHILD_OF_AN_UNUSED_PARENT = """
import os, pickle, sys
store = pickle.loads(bytes.fromhex(sys.argv[1]))
pid = os.fork()
if pid == 0:
    ok = store.get("a") == b"data" and type(store.client).__name__ == "ObstoreClient"
    os._exit(0 if ok else 1)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert store.get("a") == b"data"
sys.exit(code)
"""


def test_a_fork_of_a_process_that_has_not_used_obstore_uses_it(store):
    import pickle

    store.put("a", b"data")
    command = [sys.executable, "-W", "error", "-c", CHILD_OF_AN_UNUSED_PARENT, pickle.dumps(store).hex()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
