"""What an epoch's begin takes from torch's random numbers: as much as torch's own loader, at the same calls.

A model that draws from the same generator (dropout, augmentation, another loader) then sees the numbers that it would
see under torch: https://github.com/pytorch/pytorch `_BaseDataLoaderIter.__init__` draws a base seed at iter();
`RandomSampler.__iter__`, whose first index is asked for at the first next() (at iter() where there are workers, which
are sent indices ahead), draws a seed, or permutes with the generator that the loader was given; that permutes once more
when it is exhausted. Our order needs none of this but one seed an epoch, which is the sampler's first draw.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

# Passing the numbers of a permutation takes 2.7 ns a record here (permuting 27). For an epoch of more records than this
# a generator that the loader was given moves by one number: nobody shares one with a loader of torch's for so many.
MAX_PASSED = 1 << 28
# Foreseeing the next epoch's seed passes two permutations of a given generator's copy: 0.4 ms of iter() for so many.
MAX_FORESEEN = 1 << 16
_CHUNK = 1 << 16


@dataclass(slots=True)
class Draws:
    """What one epoch draws; each of the three calls draws at most once.

    Attributes:
        generator: the loader's; None: torch's own.
        shuffle: whether there is a random sampler.
        n_records: of the epoch.
        ends_short: whether its last batch is a short one, for which the sampler is asked until it is exhausted.
        is_sampled: whether the sampler was asked for its first index, by the run that goes on here too.
    """

    generator: torch.Generator | None
    shuffle: bool
    n_records: int
    ends_short: bool = False
    is_sampled: bool = False
    _exhausted: bool = field(default=False, init=False)

    def begin(self) -> None:
        """Draw what iter() draws: a base seed for workers, whether there are any or not."""
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
    """The seed that a random sampler would draw next; nothing is drawn from the generator itself.

    Args:
        generator: the loader's; None: torch's own.
        after_begin: whether Draws.begin() was called for the epoch; else what it draws comes before.
    """
    return _seed_of(_copy(generator), after_begin=after_begin)


def foreseen_seeds(generator: torch.Generator | None, n_records: int, *, begins: bool) -> tuple[int, int | None]:
    """The seed of an epoch after its Draws.begin(), and the seed of the epoch after it if nothing else draws.

    Args:
        generator: as of next_seed().
        n_records: of an epoch.
        begins: whether the epoch after it calls Draws.begin().

    Returns:
        None for the second where it would take long to find.
    """
    copy = _copy(generator)
    if generator is None:
        return int(_drawn(copy).item()), _seed_of(copy, after_begin=not begins)
    seed = next_seed(generator, after_begin=True)
    if n_records > MAX_FORESEEN:
        return seed, None
    for _ in range(2):  # at the begin and at the end of the epoch
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
    """Draw what RandomSampler draws for one permutation."""
    if generator is None or n_records > MAX_PASSED:
        _drawn(generator)
    else:
        _pass(generator, n_records - 1)


def _drawn(generator: torch.Generator | None) -> torch.Tensor:
    """One number, drawn. Few ask what it is, which took 15 us of an epoch's begin."""
    return torch.empty((), dtype=torch.int64).random_(generator=generator)


def _pass(generator: torch.Generator, n_left: int) -> None:
    """Draw so many numbers of 32 bits, as torch.randperm of one record more does."""
    numbers = torch.empty(_CHUNK, dtype=torch.int32)
    while n_left > 0:
        n = min(n_left, _CHUNK)
        numbers[:n].random_(generator=generator)
        n_left -= n
