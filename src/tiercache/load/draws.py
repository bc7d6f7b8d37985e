"""The random numbers that an epoch draws from torch: as many as torch's own loader, at the same calls.

A model that draws from the same generator (dropout, augmentation, another loader) then sees the same numbers as under
torch. torch draws as follows (https://github.com/pytorch/pytorch): `_BaseDataLoaderIter.__init__` draws a base seed at
iter(). `RandomSampler.__iter__` draws at its first index, i.e. at the first next(), or at iter() if there are workers,
which are sent indices ahead. It draws a seed, or permutes with the generator that the loader was given; it permutes
once more when it is exhausted. tiercache's order needs one seed per epoch, which is the sampler's first draw.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

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
    """Return the seed that a random sampler would draw next, without drawing from the generator.

    Args:
        generator: The loader's generator; None: torch's own.
        after_begin: Whether Draws.begin() was called for the epoch; if not, its draw is skipped first.
    """
    return _seed_of(_copy(generator), after_begin=after_begin)


def predict_seeds(generator: torch.Generator | None, n_records: int, *, begins: bool) -> tuple[int, int | None]:
    """Return the seed of an epoch after its Draws.begin(), and the predicted seed of the next epoch.

    The prediction holds if no other code draws until then.

    Args:
        generator: The loader's generator; None: torch's own.
        n_records: Number of records of an epoch.
        begins: Whether the next epoch calls Draws.begin().

    Returns:
        Both seeds; None for the second if the prediction would take long.
    """
    copy = _copy(generator)
    if generator is None:
        return int(_drawn(copy).item()), _seed_of(copy, after_begin=not begins)
    seed = next_seed(generator, after_begin=True)
    if n_records > MAX_FORESEEN:
        return seed, None
    for _ in range(2):  # at the start and at the end of the epoch
        _permute(copy, n_records)
    return seed, _seed_of(copy, after_begin=not begins)


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
