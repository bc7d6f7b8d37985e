"""Processes: forked children of a parent that has used obstore, spawned ones, and pickled stores."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import warnings

import pytest

from tiercache.model import ByteRange
from tiercache.store.fsspec import S3fsClient
from tiercache.store.obstore import ObstoreClient

pytestmark = pytest.mark.s3


def _read_all(store, results):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        buffer = bytearray(100_000)
        store.read_into("a", [(ByteRange(0, 100_000), memoryview(buffer))])
        tail, info = store.read_tail("a", 10)
        listed = [found.key for found in store.list()]
        fresh = store.put_if_absent("child", b"x"), store.put_if_absent("child", b"y")
        store.get("a")
    messages = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    client = type(store.client).__name__
    results.put((bytes(buffer), tail, info.n_bytes, listed, fresh, client, messages))
    store.close()


def _run(context, store):
    results = context.Queue()
    child = context.Process(target=_read_all, args=(store, results))
    child.start()
    answer = results.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
    results.close()
    results.join_thread()
    return answer


@pytest.fixture
def store(s3):
    store = s3.server.store(s3.prefix)
    yield store
    store.close()


def test_a_forked_child_reads_s3_through_s3fs_and_warns_once(store):
    data = os.urandom(100_000)
    store.put("a", data)
    buffer = bytearray(100_000)
    store.read_into("a", [(ByteRange(0, 100_000), memoryview(buffer))], deadline_s=30)
    assert isinstance(store.client, ObstoreClient)
    answer = _run(multiprocessing.get_context("fork"), store)
    assert answer[:6] == (data, data[-10:], 100_000, ["a"], (True, False), S3fsClient.__name__)
    assert len(answer[6]) == 1
    assert "forkserver or spawn" in answer[6][0]
    assert store.get("a") == data, "the parent goes on as before"


def test_a_store_first_used_in_a_forked_child_uses_s3fs(s3, store):
    store.put("a", bytes(100_000))
    other = s3.server.store(s3.prefix)  # not used before the fork
    assert _run(multiprocessing.get_context("fork"), other)[5] == S3fsClient.__name__


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


def test_no_repr_of_a_store_contains_its_secret(s3, store):
    secret = s3.server.secret_access_key
    store.put("a", b"x")
    shown = [repr(store), store.url, repr(store.client), repr(store.options), repr(store.folder)]
    assert not any(secret in text for text in shown)
