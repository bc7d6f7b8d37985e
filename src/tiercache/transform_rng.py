"""Random numbers inside transforms: a function of the run's seed, the epoch and a position, and of nothing else.

The loader enters a key with use_key() around each call of a user's function. rng() returns the random numbers of the
key that this thread has entered. Keys are cheap, and generators are made on first use. In a worker process the loader
also seeds the global generators, from which other libraries draw, for each batch.
"""

from __future__ import annotations

import hashlib
import random
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

_PERSON = b"tiercache rng"
_entered = threading.local()  # .key: the innermost key that the thread has entered


class TransformRNG:
    """Random numbers of one call of a transform: a seed, and generators that begin with it.

    It belongs to one call: do not keep it, and do not use it in another thread.

    Attributes:
        seed: Integer of 64 bits, 0 <= seed < 2**64, for libraries that have generators of their own.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @cached_property
    def numpy(self) -> np.random.Generator:
        """NumPy generator that was seeded with `seed`."""
        library = import_module("numpy").random
        generator: np.random.Generator = library.Generator(library.PCG64(self.seed))
        return generator

    @cached_property
    def torch(self) -> Any:
        """torch.Generator of the CPU that was seeded with `seed`. Raises ModuleNotFoundError without torch."""
        return import_module("torch").Generator().manual_seed(self.seed)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seed={self.seed})"


@lru_cache(maxsize=16)
def _hash_of_epoch(kind: str, seed: int, epoch: int) -> Any:
    return hashlib.blake2b(f"{kind}:{seed}:{epoch}:".encode(), digest_size=16, person=_PERSON)


def _seeds_of(kind: str, seed: int, epoch: int, position: int) -> tuple[int, int]:
    """Return two seeds of 64 bits: BLAKE2b-128 of the text "kind:seed:epoch:position".

    A run is repeatable only if they never change.
    """
    hashed = _hash_of_epoch(kind, seed, epoch).copy()
    hashed.update(b"%d" % position)
    digest = hashed.digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class Key:
    """Key of the random numbers of one call of a user's function, and the context in which they are valid.

    parts: Kind, seed of the run, epoch, and position. None: the numbers are new ones, drawn when they are first asked
    for.
    """

    __slots__ = ("_outer", "_parts", "_rng")

    def __init__(self, parts: tuple[str, int, int, int] | None) -> None:
        self._parts = parts
        self._rng: TransformRNG | None = None
        self._outer: Key | None = None

    def __enter__(self) -> Key:
        self._outer, _entered.key = getattr(_entered, "key", None), self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _entered.key, self._outer = self._outer, None

    @property
    def rng(self) -> TransformRNG:
        """The random numbers of the key, the same object each time."""
        if self._rng is None:
            self._rng = TransformRNG(_draw_seed() if self._parts is None else _seeds_of(*self._parts)[0])
        return self._rng


def _draw_seed() -> int:
    """Return a seed from torch's generator if torch is imported, else from NumPy's global one."""
    torch = sys.modules.get("torch")
    if torch is None:
        return int(import_module("numpy").random.randint(0, 2**63 - 1))
    return int(torch.randint(0, 2**63 - 1, ()))


def use_key(seed: int, epoch: int, position: int, kind: Literal["record", "batch"] = "record") -> Key:
    """Return a context in which rng() returns the random numbers of a key, in this thread.

    position: That of the record, or of the first record of the batch, in the epoch's order. A batch and its first
    record have the same position and different numbers.
    """
    return Key((kind, seed, epoch, position))


def use_fresh_key() -> AbstractContextManager[Any]:
    """Return a context in which rng() returns new random numbers, unless this thread has entered a key already."""
    return Key(None) if getattr(_entered, "key", None) is None else nullcontext()


def seed_global_generators(seed: int, epoch: int, position: int) -> None:
    """Seed the global generators of torch (on the CPU), NumPy and Python with the key of a batch, in a worker."""
    of_batch = _seeds_of("batch", seed, epoch, position)[1]
    import_module("torch").default_generator.manual_seed(of_batch)
    import_module("numpy").random.seed(of_batch & 0xFFFFFFFF)
    random.seed(of_batch)


def worker_seed(seed: int, number: int) -> int:
    """Return the seed of a worker process, of 63 bits, which holds until its first batch. seed: Seed of the run."""
    return _seeds_of("worker", seed, 0, number)[0] >> 1


def rng() -> TransformRNG:
    """Return the random numbers of this call of a transform.

    In a transform that `tiercache.NumpyLoader` runs, or `tiercache.DataLoader` on its native path, the numbers are a
    function of the loader's seed, the epoch, and the record's position in the epoch's order. A resumed run therefore
    draws the same numbers, on any number of ranks and workers; so does a run that begins on another number of ranks, if
    its order has as many streams (`LoaderOptions.shuffle_streams`). In a `batch_transform` or `collate_fn` the position
    is that of the batch's first record. `dataset[i]` and loaders on torch's path draw new numbers from torch's
    generator; `dataset[i]` draws them from NumPy's global generator if torch is not imported.

    Returns:
        Object with `seed`, an integer of 64 bits; `numpy`, a `numpy.random.Generator`; and `torch`, a `torch.Generator`
        of the CPU. The generators are made on first use. All calls during one call of the transform return the same
        object.

    Raises:
        RuntimeError: No transform runs in this thread.
    """
    key: Key | None = getattr(_entered, "key", None)
    if key is None:
        raise RuntimeError(
            "tiercache.rng() was called outside of a transform: it has random numbers only while a loader or a data "
            "set calls the function of transform=, batch_transform= or collate_fn=, in the thread of that call"
        )
    return key.rng
