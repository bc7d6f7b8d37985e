"""Global random generators while transforms run: what a transform draws from them is a function of its key, too.

In a worker process the global generators of torch, NumPy and Python belong to the transforms, and are seeded for each
record. In a thread of the training process they belong to the training loop: there torch's random functions get a
generator of the thread, and a warning names draws from Python's global generator. Draws from NumPy's global generator
cannot be seen: its functions are no calls for a profiler, and its state is shared with the training loop.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own convention
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from types import FrameType

    from tiercache.rng import Key

_Tensor = torch.Tensor
# torch's random functions that take generator=.
_TAKE_GENERATOR: frozenset[Any] = frozenset(
    {
        *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal),
        *(torch.bernoulli, torch.multinomial, torch.poisson, torch.binomial),
        *(torch._sample_dirichlet, torch._standard_gamma),  # noqa: SLF001 -- torch.distributions call them
        *(_Tensor.bernoulli, _Tensor.multinomial),
        *(_Tensor.bernoulli_, _Tensor.cauchy_, _Tensor.exponential_, _Tensor.geometric_, _Tensor.log_normal_),
        *(_Tensor.normal_, _Tensor.random_, _Tensor.uniform_),
    }
)


def _rand_like(generator: torch.Generator, like: torch.Tensor, **how: Any) -> torch.Tensor:
    return torch.empty_like(like, **how).uniform_(generator=generator)


def _randn_like(generator: torch.Generator, like: torch.Tensor, **how: Any) -> torch.Tensor:
    return torch.empty_like(like, **how).normal_(generator=generator)


def _randint_like(
    generator: torch.Generator, like: torch.Tensor, low: int = 0, high: int | None = None, **how: Any
) -> torch.Tensor:
    first, end = (0, low) if high is None else (low, high)
    return torch.empty_like(like, **how).random_(first, end, generator=generator)


# Random functions that take no generator=, and what they do, with one.
_WITH_GENERATOR: Mapping[Any, Callable[..., torch.Tensor]] = {
    torch.rand_like: _rand_like,
    torch.randn_like: _randn_like,
    torch.randint_like: _randint_like,
}
# Random functions that take no generator= either, and are not repeated here: no data pipeline should need them.
_WITHOUT_GENERATOR: frozenset[Any] = frozenset(
    {
        *(torch.dropout, torch.dropout_, torch.alpha_dropout, torch.feature_dropout),
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
        F.gumbel_softmax,
    }
)
_RANDOM = _TAKE_GENERATOR | _WITHOUT_GENERATOR | frozenset(_WITH_GENERATOR)
# Calls at the start of an epoch in which draws from Python's global generator are looked for. Looking makes Python code
# several times as slow.
CALLS_WATCHED = 4
# Calls in a worker process after which a generator is no longer seeded if none of them has drawn from it.
CALLS_BEFORE_REST = 32


class _ThreadMode(TorchFunctionMode):
    """Gives the generator of the current key to the random functions of torch that this thread calls."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator()
        self._seed: int | None = None  # with which the generator must still be seeded
        self.found: set[str] = set()  # random functions that were called and cannot be given a generator

    def begin(self, key: Key) -> None:
        """Let random functions draw the numbers of this key from now on."""
        self._seed = key.seeds[1]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _RANDOM:  # a transform of torchvision calls a hundred others
            return func(*args) if kwargs is None else func(*args, **kwargs)
        kwargs = kwargs or {}
        if func in _TAKE_GENERATOR:
            if kwargs.get("generator") is None and _is_on_cpu(args, kwargs):
                kwargs = {**kwargs, "generator": self._of_key()}
        elif func in _WITH_GENERATOR and args and _is_on_cpu(args, kwargs):
            return _WITH_GENERATOR[func](self._of_key(), *args, **kwargs)
        elif func in _WITHOUT_GENERATOR and _is_training(args, kwargs):
            self.found.add(f"torch's {func.__name__}()")
        return func(*args, **kwargs)

    def _of_key(self) -> torch.Generator:
        if self._seed is not None:
            self._generator.manual_seed(self._seed)
            self._seed = None
        return self._generator


def _is_training(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a dropout function, whose third argument says so, is to draw."""
    given = args[2] if len(args) > 2 else True
    return bool(kwargs.get("training", kwargs.get("train", given)))


def _is_on_cpu(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is None and args and isinstance(args[0], torch.Tensor):
        device = args[0].device
    return device is None or torch.device(device).type == "cpu"


class ThreadRandomness:
    """Random numbers of transforms in a thread of the training process. One thread uses an object.

    Args:
        warned: Keys of the warnings that the run has given.
    """

    def __init__(self, warned: set[str]) -> None:
        self._mode = _ThreadMode()
        self._warned = warned
        self._n_watched = 0

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Context of the calls for one batch."""
        with self._mode:
            yield
        if self._mode.found:
            self._warn(self._mode.found)
            self._mode.found = set()

    def begin(self, key: Key) -> None:
        """Let the global random functions draw the numbers of this key from now on."""
        self._mode.begin(key)

    def call(self, function: Callable[[Any], Any], value: Any) -> Any:
        """Return function(value). The first calls are watched for draws that no key can decide."""
        if self._n_watched >= CALLS_WATCHED or sys.getprofile() is not None:
            return function(value)
        self._n_watched += 1
        found: set[str] = set()
        sys.setprofile(_watcher(found))
        try:
            return function(value)
        finally:
            sys.setprofile(None)
            if found:
                self._warn(found)

    def _warn(self, found: set[str]) -> None:
        if "global random numbers" in self._warned:
            return
        self._warned.add("global random numbers")
        warnings.warn(
            f"a transform that runs in a thread of this process calls {', '.join(sorted(found))}: these random numbers "
            "are those of the training loop, so a resumed run does not see the same augmentations. Draw from "
            "tiercache.rng() instead, or give the loader num_workers=1 or more (docs/guide/transforms.md)",
            RuntimeWarning,
            stacklevel=2,
        )


_GLOBAL = random.random.__self__  # type: ignore[attr-defined]  # the generator of the random module's functions


def _watcher(found: set[str]) -> Callable[[FrameType, str, Any], None]:
    """Return a profile function that notes calls of Python's global generator.

    It sees the generator itself, so it is never mistaken about which generator draws.
    """

    def watch(_: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__self__", None) is _GLOBAL:
            found.add("functions of Python's random module")

    return watch


class UnseededDrawError(Exception):
    """A batch was made with random numbers of a generator that had not been seeded for it. It must be made again."""


@dataclass(frozen=True, slots=True)
class _Global:
    """A global generator: how it is seeded with an integer of 64 bits, and its state, to be compared."""

    seed: Callable[[int], Any]
    state: Callable[[], Any]


def _numpy_state() -> tuple[Any, ...]:
    _, words, *rest = np.random.get_state()
    return np.asarray(words).tobytes(), *rest


_GLOBALS = (
    _Global(torch.default_generator.manual_seed, lambda: torch.default_generator.get_state().numpy().tobytes()),
    _Global(lambda seed: np.random.seed(seed & 0xFFFFFFFF), _numpy_state),
    _Global(random.seed, random.getstate),
)


class ProcessRandomness:
    """Random numbers of transforms in a worker process: its global generators are seeded for each key.

    Seeding all three takes 11 us for each record, three times as much as a small transform. So a generator from which
    none of the first calls draws is not seeded any more, but looked at after each batch: if a function has drawn from
    it after all, the batch is made again, and the generator is seeded from then on. The random numbers are the same in
    any case.
    """

    def __init__(self) -> None:
        self._seeded, self._resting = list(_GLOBALS), list[_Global]()
        self._drawn: set[_Global] = set()  # from which one of the first calls has drawn
        self._n_calls = 0

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Context of the calls for one batch. Raises UnseededDrawError: the batch must be made again."""
        if self._n_calls >= CALLS_BEFORE_REST:
            self._resting += [one for one in self._seeded if one not in self._drawn]
            self._seeded = [one for one in self._seeded if one in self._drawn]
        before = [one.state() for one in self._resting]
        yield
        drawn = [one for one, state in zip(self._resting, before, strict=True) if one.state() != state]
        if drawn:
            self._drawn |= set(drawn)
            self._seeded += drawn
            self._resting = [one for one in self._resting if one not in drawn]
            raise UnseededDrawError

    def begin(self, key: Key) -> None:
        """Seed the global generators with this key."""
        if self._seeded:
            seed = key.seeds[1]
            for one in self._seeded:
                one.seed(seed)

    def call(self, function: Callable[[Any], Any], value: Any) -> Any:
        """Return function(value)."""
        if self._n_calls >= CALLS_BEFORE_REST:
            return function(value)
        self._n_calls += 1
        watched = [(one, one.state()) for one in self._seeded if one not in self._drawn]
        result = function(value)
        self._drawn |= {one for one, state in watched if one.state() != state}
        return result
