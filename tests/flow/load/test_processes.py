"""Processes: Ctrl-C, a fork, and an interpreter that ends while batches are being prepared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings

import tiercache as tc
from tiercache import stats

PRELUDE = """
import sys, threading, time
import tiercache as tc
loader = tc.DataLoader(tc.Dataset(sys.argv[1]), batch_size=4, shuffle=True)
"""


def begin(code: str, path: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_an_interpreter_that_ends_in_mid_epoch_ends_in_silence(make_dataset):
    code = """
iterators = [iter(loader) for _ in range(3)]
batch = next(iterators[1])
threading.Thread(target=lambda: globals().update(iterator=iter(loader))).start()
for batch in loader: sys.exit(0)
"""
    process = begin(code, make_dataset(500))
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == 0


# dill, which torch imports where it is installed, refers to the main module. What that module's globals hold is then
# dropped after the globals of modules that were imported later have become None.
KEEP_MAIN = """
import __main__
sys.keeps_main = __main__
cache = tc.Cache(sys.argv[1] + "-cache", size="100MB")
"""


def test_finalizers_are_silent_where_module_globals_are_gone(make_dataset):
    code = """
ended = iter(loader)
for batch in ended: pass
left = iter(loader)
next(left)
sampled = iter(tc.DataLoader(loader.dataset, 4, sampler=range(100)))
cached = iter(tc.DataLoader(tc.Dataset(sys.argv[1], cache=cache), shuffle=True))
foreign = iter(tc.DataLoader(range(9), shuffle=True))
batches = [next(iterator) for iterator in (sampled, cached, foreign)]
other = tc.Dataset(sys.argv[1], cache=cache)
record, batch, records, arrow = other[7], other[[1, 2]], iter(other), other.to_arrow(16)
next(records), next(arrow)
view = other.select(range(0, 400, 3))
pickled = view.__reduce_ex__(2)
writer = tc.Writer(sys.argv[1] + "-written", schema={"x": "int64"}, shard_size="4KiB")
for x in range(4096): writer.write({"x": x})
"""
    process = begin(KEEP_MAIN + code, make_dataset(500, compression="zstd"))
    out, said = process.communicate(timeout=120)
    assert (out, said.count("\n")) == ("", 1)
    assert "-written: a Writer with 4,096 records was not closed, so nothing was committed" in said
    assert process.returncode == 0


def test_ctrl_c_in_a_wait_for_a_batch_is_heard_at_once(make_dataset):
    code = """
type(loader.dataset._source).load_blocks = lambda *args, **kwargs: (print("waiting", flush=True), time.sleep(1.5))
try:
    next(iter(loader))
except KeyboardInterrupt:
    print("stopped", threading.active_count(), flush=True)
"""
    process = begin(code, make_dataset(500))
    assert process.stdout is not None
    assert process.stdout.readline().startswith("waiting")  # several threads print at once
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "stopped" in out
    assert err == ""


def test_a_child_forked_while_another_thread_holds_a_lock_ends_all_the_same(make_dataset):
    loader = tc.DataLoader(tc.Dataset(make_dataset(500)), batch_size=4, shuffle=True)
    iterator = iter(loader)
    next(iterator)
    is_held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with stats._lock:
            is_held.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # "multi-threaded, use of fork()": that is what is tested
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            del iterator
            os._exit(0)
    release.set()
    holder.join()
    assert os.waitpid(child, 0)[1] == 0
    iterator.close()
