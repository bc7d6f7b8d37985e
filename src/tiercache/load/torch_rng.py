"""torch's random numbers: what an epoch draws from them, and the replay of samplers without a state.

An epoch draws as many numbers as torch's own loader, at the same calls, so a model that shares the generator sees the
same numbers as under torch. A sampler without a state is asked again from its start after its generators were
restored; a checksum of its indices shows whether it gives the same order.
"""

from __future__ import annotations

import base64
import marshal
import random
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.utils import data as torch_data
from torchdata.stateful_dataloader import Stateful

from tiercache.load.options import LoaderOptions
from tiercache.load.ranks import find_rank

# Skipping the numbers of a permutation takes 2.7 ns per record here (permuting 27). For larger epochs a given generator
# advances by one number only: no user shares a generator with torch's loader over so many records.
MAX_PASSED = 1 << 28
# Predicting the next epoch's seed skips two permutations in a copy of a given generator: 0.4 ms of iter() for this many
# records.
MAX_FORESEEN = 1 << 16
_CHUNK = 1 << 16


@dataclass(slots=True)
class TorchDraws:
    """The draws of one epoch. Each of its methods draws at most once.

    Attributes:
        generator: The loader's generator; None: torch's own.
        shuffle: Whether there is a random sampler.
        n_records: Number of records of the epoch.
        ends_short: Whether the last batch is short; torch then asks its sampler until it is exhausted.
        is_sampled: Whether the sampler's first index was drawn, possibly before the run was resumed.
    """

    generator: torch.Generator | None
    shuffle: bool
    n_records: int
    ends_short: bool = False
    is_sampled: bool = False
    _exhausted: bool = field(default=False, init=False)

    def begin(self) -> None:
        """Draw the base seed for workers, which iter() draws even if there are no workers."""
        _drawn(self.generator)

    def sample(self) -> None:
        """Draw what the sampler draws before its first index."""
        if self.shuffle and not self.is_sampled:
            self.is_sampled = True
            self._permute()

    def exhaust(self) -> None:
        """Draw what the sampler draws after its last index."""
        if self.shuffle and self.generator is not None and not self._exhausted:
            self._exhausted = True
            self._permute()

    def _permute(self) -> None:
        _permute(self.generator, self.n_records)


def next_seed(generator: torch.Generator | None, *, after_begin: bool) -> int:
    """Return the seed that a random sampler would draw next, without drawing from the generator."""
    return _seed_of(_copy(generator), after_begin=after_begin)


def predict_seed(generator: torch.Generator | None, n_records: int, *, draws_base_seed: bool) -> int | None:
    """Return the seed that the next epoch will draw if no other code draws until then; None: that would take long.

    It is called after the current epoch's TorchDraws.begin(). draws_base_seed: whether the next epoch calls that too.
    """
    copy = _copy(generator)
    if generator is None:
        _drawn(copy)
    elif n_records > MAX_FORESEEN:
        return None
    else:
        for _ in range(2):  # at the start and at the end of the epoch
            _permute(copy, n_records)
    return _seed_of(copy, after_begin=not draws_base_seed)


def _copy(generator: torch.Generator | None) -> torch.Generator:
    copy = torch.Generator() if generator is None else torch.Generator(generator.device)
    return copy.set_state(torch.get_rng_state() if generator is None else generator.get_state())


def _seed_of(copy: torch.Generator, *, after_begin: bool) -> int:
    if not after_begin:
        _drawn(copy)
    return int(_drawn(copy).item())


def _permute(generator: torch.Generator | None, n_records: int) -> None:
    """Draw as many numbers as RandomSampler draws for one permutation."""
    if generator is None or n_records > MAX_PASSED:
        _drawn(generator)
    else:
        _pass(generator, n_records - 1)


def _drawn(generator: torch.Generator | None) -> torch.Tensor:
    """Draw one number and return it as a tensor. Converting it to int took 15 us and is rarely needed."""
    return torch.empty((), dtype=torch.int64).random_(generator=generator)


def _pass(generator: torch.Generator, n_left: int) -> None:
    """Draw n_left numbers of 32 bits, as torch.randperm of n_left + 1 records does."""
    numbers = torch.empty(_CHUNK, dtype=torch.int32)
    while n_left > 0:
        n = min(n_left, _CHUNK)
        numbers[:n].random_(generator=generator)
        n_left -= n


REPLAY = "_tiercache_replay"  # the key, beside torchdata's, in the state of a sampler's iterator
YIELDED = "yielded"  # number of items of an index sampler that is not torchdata's BatchSampler
_GIVEN, _ASKED = "given", "asked"  # numbers of items: up to the state, and in total (a list of one number)
SHARED = ("torch", "numpy", "python")  # names of the generators that other code shares


class ReplayState:
    """The part of the loader's state about a sampler without a state.

    Attributes:
        moved: By step ("iter": the call of iter(); "first": the call for the first item) and generator name, the state
            before the step of each generator that the step advanced.
        checksum: Checksum of the indices that the sampler returned. None: it is not compared.
        rank: Rank to which the indices were given.
    """

    def __init__(self, moved: dict[str, Any], checksum: int | None, rank: int) -> None:
        self.moved = moved
        self.checksum = checksum
        self.rank = rank

    @classmethod
    def fresh(cls) -> ReplayState:
        """Return the state of a pass that begins in this process."""
        return cls({}, 0, find_rank(LoaderOptions()).rank)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> ReplayState:
        """Return the state that to_dict() saved."""
        return cls(dict(state["random"]), state.get("checksum"), state["rank"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; they are shared between calls, so the caller must not write to them."""
        return {"random": self.moved, "checksum": self.checksum, "rank": self.rank}

    def add(self, items: Any) -> None:
        """Add an index, or indices, to the checksum."""
        self.checksum = add_checksum(self.checksum or 0, items)

    @contextmanager
    def recording(self, randomness: RandomGenerators, step: str) -> Iterator[None]:
        """Record which generators a step of the sampler advances."""
        before = randomness.states()
        yield
        self.moved = {**self.moved, step: randomness.moved_since(before)}

    def restore(self, randomness: RandomGenerators, step: str) -> None:
        """Set the generators to their states before a step."""
        randomness.restore(self.moved.get(step, {}))

    def check(self, sampler: Any, saved: ReplayState) -> None:
        """Raise ValueError if a sampler returned other indices in this pass than before `saved` was taken.

        Ranks often load the state that one of them saved, and each rank's sampler returns a share of its own. So only
        the rank that saved the state compares.
        """
        if saved.checksum in (None, self.checksum) or saved.rank != self.rank:
            return
        raise ValueError(
            f"the sampler, a {type(sampler).__name__}, has no state. Asked again for the records that were served "
            "before the loader's state was saved, it returns other records: the resumed run would serve some records "
            "twice, and others not at all. Give the sampler state_dict() and load_state_dict(), or derive its order "
            "from a seed and an epoch that the resumed run sets again, or use shuffle=True, whose order is part of the "
            "loader's state"
        )


class Replay:
    """One pass over a sampler that has no state."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._randomness = RandomGenerators(sampler)
        self._state = ReplayState.fresh()
        self._is_begun = False
        self._n_given = 0  # items
        self._n_asked = [0]  # a list that all saved states share: DataLoader.state_dict() copies the current number
        with self._state.recording(self._randomness, "iter"):
            self.iterator: Iterator[Any] = iter(sampler)

    def take(self, n: int) -> list[Any]:
        """Return the next n items, which are indices; fewer at the end."""
        items: list[Any] = self._recorded(lambda: list(islice(self.iterator, n)))
        self._count(len(items))
        return items

    def take_one(self) -> Any:
        """Return the next item, an index or a batch of indices. Raises StopIteration at the end."""
        item = self._recorded(lambda: next(self.iterator))
        self._count(1)
        return item

    def state(self) -> dict[str, Any]:
        """Return plain values that are shared between calls, so the caller must not write to them.

        The state is complete only after settled() copied it.
        """
        return {**self._state.to_dict(), _GIVEN: self._n_given, _ASKED: self._n_asked}

    def resume(self, state: Mapping[str, Any] | None, skip: Callable[[], object]) -> None:
        """Ask the sampler again for the items that it returned before a state was taken.

        Raises:
            ValueError: The sampler returns other indices now, or drew numbers ahead that it cannot draw again.
        """
        saved = None if state is None else ReplayState.from_dict(state)
        with self._randomness.replaying():
            if saved is not None:
                saved.restore(self._randomness, "iter")
            self.iterator = iter(self._sampler)
            if saved is not None:
                saved.restore(self._randomness, "first")
            skip()
            if saved is not None:
                self._state.moved = saved.moved
                self._state.check(self._sampler, saved)
            if state is not None and saved is not None and saved.checksum is not None and state.get(_GIVEN):
                self._ask_ahead(state[_ASKED][0] - state[_GIVEN])

    def _ask_ahead(self, n: int) -> None:
        """Ask for the n items that had been asked ahead. Raises ValueError if that draws from a shared generator."""
        before = self._randomness.states()
        items = list(islice(self.iterator, n))
        self.iterator = chain(items, self.iterator)
        drawn = [name for name in self._randomness.moved_since(before) if name in SHARED]
        if drawn:
            raise ValueError(
                f"the sampler, a {type(self._sampler).__name__}, has no state and draws from {drawn[0]}'s shared "
                "random numbers while it is read. When the loader's state was saved, the sampler had been asked ahead "
                "(because of num_workers=), and those numbers cannot be drawn again: the rest of the epoch would "
                "differ. Give the sampler state_dict() and load_state_dict(), or let it draw from a generator that is "
                "an attribute of it, or draw all its indices when it begins. A state saved at an epoch's end loads"
            )

    def _count(self, n: int) -> None:
        self._n_given += n
        self._n_asked[0] = self._n_given

    def _recorded(self, ask: Callable[[], Any]) -> Any:
        if self._is_begun:
            items = ask()
        else:
            with self._state.recording(self._randomness, "first"):
                items = ask()
            self._is_begun = True
        self._state.add(items)
        return items


class ReplayedSampler:
    """Wraps an index sampler without a state, so that torchdata's iterators get iterators with a state."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        replay = Replay(self._sampler)
        return replay.iterator if isinstance(replay.iterator, Stateful) else ReplayedIterator(replay)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_sampler":  # a copy is being made
            raise AttributeError(name)
        return getattr(self._sampler, name)


class ReplayedIterator(Iterator[Any]):
    """The items of an index sampler, with a state that torchdata's iterators save."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._n_yielded = 0

    def __next__(self) -> Any:
        item = self._replay.take_one()
        self._n_yielded += 1
        return item

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the items returned so far."""
        return {YIELDED: self._n_yielded, REPLAY: self._replay.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the items before the state. Raises ValueError as Replay.resume."""
        self._n_yielded = 0

        def skip() -> None:
            for _ in islice(self, state[YIELDED]):
                pass

        self._replay.resume(state.get(REPLAY), skip)
        self._n_yielded = state[YIELDED]


def settled(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a loader's state that later calls of the sampler do not change."""
    return _with_replay(state, lambda replay: {**replay, _ASKED: [*replay[_ASKED]]} if _ASKED in replay else replay)


def _with_replay(state: Mapping[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Return a loader's state with its ReplayState changed, if it has one."""
    snapshot = state.get("_snapshot")
    if snapshot is not None:  # the loader has worker processes
        return {**state, "_snapshot": {**snapshot, "_main_snapshot": _with_replay(snapshot["_main_snapshot"], change)}}
    of_iterator = state.get("_sampler_iter_state")
    if not isinstance(of_iterator, Mapping) or REPLAY not in of_iterator:
        return dict(state)
    return {**state, "_sampler_iter_state": {**of_iterator, REPLAY: change(of_iterator[REPLAY])}}


def loadable(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a state of this loader or of torchdata's to the form that the iterators here load.

    If no iterator had a state, the number of the index sampler's items is added. At the end of an epoch the checksum is
    removed: the next epoch begins, whatever its order is.
    """
    if state.get("_iterator_finished"):
        state = _with_replay(state, lambda replay: {**replay, "checksum": None})
    snapshot = state.get("_snapshot")
    if snapshot is not None:  # the loader has worker processes
        return {**state, "_snapshot": {**snapshot, "_main_snapshot": _with_count(snapshot["_main_snapshot"])}}
    return _with_count(state) if "_sampler_iter_state" in state else dict(state)


def _with_count(state: Mapping[str, Any]) -> dict[str, Any]:
    of_iterator = state["_sampler_iter_state"]
    return {
        **state,
        "_sampler_iter_state": {YIELDED: state["_sampler_iter_yielded"]} if of_iterator is None else of_iterator,
    }


def add_checksum(checksum: int, items: Any) -> int:
    """Add an index or indices to a checksum. Equal indices give equal checksums, whatever their batches and types."""
    if isinstance(items, np.ndarray) and items.ndim == 1 and items.dtype == np.int64:
        return zlib.crc32(np.ascontiguousarray(items).data, checksum)
    try:
        data: Any = array("q", items if hasattr(items, "__iter__") else (items,))
    except (TypeError, ValueError, OverflowError):  # keys of a data set that is not indexed by integers
        try:
            data = marshal.dumps(items, 0)
        except ValueError:  # an object that another process could not compare
            return checksum
    return zlib.crc32(data, checksum)


class RandomGenerators:
    """The generators that a sampler may draw from: those of torch, NumPy and Python, and those that it holds.

    Their states are plain values by the generator's name.
    """

    def __init__(self, sampler: Any) -> None:
        shared = (torch.default_generator, np.random.mtrand._rand, _PYTHON)  # noqa: SLF001 -- the generator of numpy.random's functions
        self._generators: dict[str, Any] = dict(zip(SHARED, shared, strict=True))
        self._find("", sampler, set())

    def states(self) -> dict[str, Any]:
        """Return the states of all generators, for comparison."""
        return {name: _get(generator) for name, generator in self._generators.items()}

    def moved_since(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return, as plain values, the states in `before` that have changed."""
        return {name: _plain(before[name]) for name, now in self.states().items() if not _equal(before[name], now)}

    def restore(self, states: Mapping[str, Any]) -> None:
        """Set those of the generators that exist here."""
        for name, state in states.items():
            if name in self._generators:
                _set(self._generators[name], state)

    @contextmanager
    def replaying(self, *, with_own: bool = False) -> Iterator[None]:
        """Let a sampler draw again; afterwards the shared generators are as before.

        with_own: whether the generators that the sampler holds are restored too.
        """
        restored = {name: generator for name, generator in self._generators.items() if with_own or name in SHARED}
        before = {name: _plain(_get(generator)) for name, generator in restored.items()}
        try:
            yield
        finally:
            self.restore(before)

    def _find(self, path: str, sampler: Any, seen: set[int]) -> None:
        seen.add(id(sampler))
        for name, value in getattr(sampler, "__dict__", {}).items():
            if id(value) in seen:
                continue
            if isinstance(value, _KINDS) and not isinstance(value, random.SystemRandom):
                seen.add(id(value))
                self._generators[f"{path}.{name}"] = value
            elif isinstance(value, torch_data.Sampler):
                self._find(f"{path}.{name}", value, seen)


class _Python:
    """Python's own generator, for which the random module has only functions."""

    getstate = staticmethod(random.getstate)
    setstate = staticmethod(random.setstate)


_PYTHON = _Python()
_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _get(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
        return {**state, "state": {name: _listed(value) for name, value in state["state"].items()}}
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.getstate()


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _set(generator: Any, state: Any) -> None:
    """Set a generator to a state that _plain() returned, perhaps after a conversion to JSON and back."""
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        name, key, *rest = state
        generator.set_state((name, np.frombuffer(base64.b64decode(key), np.uint32), *rest))
    else:
        version, numbers, gauss = state
        generator.setstate((version, tuple(numbers), gauss))


def _plain(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return base64.b64encode(state.numpy().tobytes()).decode()
    if isinstance(state, tuple) and isinstance(state[1], np.ndarray):
        return [state[0], base64.b64encode(state[1].tobytes()).decode(), *state[2:]]
    return [state[0], list(state[1]), state[2]] if isinstance(state, tuple) else state


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(a[1], np.ndarray):
        return np.array_equal(a[1], b[1]) and a[2:] == b[2:]
    return bool(a == b)
