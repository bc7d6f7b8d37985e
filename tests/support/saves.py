"""What tests of saves share: a state, checkpoints whose threads end with the test, and a store that waits."""

import math
import threading
from contextlib import contextmanager

import numpy as np
import torch

from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.store.contract import WrapperStore

WAIT_S = 60.0


def a_state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"w": torch.randn(300, 70, generator=generator), "b": torch.randn(7, generator=generator)},
        "half": torch.randn(33, generator=generator).to(torch.bfloat16),
        "counts": np.arange(seed, seed + 5),
        "epoch": seed,
        "best": math.inf,
    }


class GateStore(WrapperStore):
    """A store whose calls of one verb wait until the gate opens. arrived: set when a call waits."""

    def __init__(self, inner, verb="put_part"):
        super().__init__(inner)
        self.verb, self.gate, self.arrived = verb, threading.Event(), threading.Event()

    def around(self, method, key, call):
        if method == self.verb:
            self.arrived.set()
            assert self.gate.wait(WAIT_S)
        return call()


@contextmanager
def opened(*args, **options):
    """Checkpoints whose threads have ended afterwards, whatever failed."""
    checkpoints = Checkpoints(*args, **options)
    try:
        yield checkpoints
    finally:
        for store in (checkpoints.remote_store, getattr(checkpoints._local, "store", None)):
            if isinstance(store, GateStore):
                store.gate.set()
        checkpoints.join()
