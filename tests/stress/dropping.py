"""A drop to be killed: `python -m tests.stress.dropping FOLDER N` drops label 1 until its N-th change."""

import os
import signal
import sys
from itertools import count

import pyarrow.compute as pc

from tiercache.data.drop import drop
from tiercache.store import open_store
from tiercache.store.contract import WrapperStore


class FatalStore(WrapperStore):
    """A store that kills the process before its N-th call that may change something."""

    def __init__(self, inner, n_changes):
        super().__init__(inner)
        self.n_changes, self.changes = n_changes, count(1)

    def around(self, verb, key, call):
        if verb not in ("get", "head", "list", "read_into") and next(self.changes) == self.n_changes:
            os.kill(os.getpid(), signal.SIGKILL)
        return call()


if __name__ == "__main__":
    drop(FatalStore(open_store(sys.argv[1]), int(sys.argv[2])), pc.field("label") == 1, jobs=1)
