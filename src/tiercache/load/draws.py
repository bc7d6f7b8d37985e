"""What an epoch's begin takes from torch's random numbers: as much as torch's own loader, at the same calls.

A model that draws from the same generator (dropout, augmentation, another loader) then sees the numbers that it would
see under torch: https://github.com/pytorch/pytorch `_BaseDataLoaderIter.__init__` draws a base seed at iter();
`RandomSampler.__iter__`, whose first index is asked for at the first next() (at iter() where there are workers, which
are sent indices ahead), draws a seed, or permutes with the generator that the loader was given; that permutes once more
when it is exhausted. Our order needs none of this but one seed a run, which is the sampler's first draw.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

# Passing the numbers of a permutation takes 2.7 ns a record here (permuting 27). A run of more records than this that
# was given a generator leaves it where it is: nobody shares one with a loader of torch's for so many.
MAX_PASSED = 1 << 28
_CHUNK = 1 << 16


@dataclass(slots=True)
class Draws:
    """What one epoch draws; each of the three calls draws at most once.

    Attributes:
        generator: the loader's; None: torch's own.
        shuffle: whether there is a random sampler.
        n_records: of the epoch.
        ends_short: whether its last batch is a short one, for which the sampler is asked until it is exhausted.
    """

    generator: torch.Generator | None
    shuffle: bool
    n_records: int
    ends_short: bool = False
    _sampled: bool = field(default=False, init=False)
    _exhausted: bool = field(default=False, init=False)

    def begin(self) -> None:
        """Draw what iter() draws: a base seed for workers, whether there are any or not."""
        _drawn(self.generator)

    def sample(self) -> None:
        """Draw what the sampler draws before its first index."""
        if self.shuffle and not self._sampled:
            self._sampled = True
            self._permute()

    def exhaust(self) -> None:
        """Draw what the sampler draws after its last index."""
        if self.shuffle and self.generator is not None and not self._exhausted:
            self._exhausted = True
            self._permute()

    def _permute(self) -> None:
        if self.generator is None:
            _drawn(None)
        elif self.n_records <= MAX_PASSED:
            _pass(self.generator, self.n_records - 1)


def next_seed(generator: torch.Generator | None, *, after_begin: bool) -> int:
    """The seed that a random sampler would draw next; nothing is drawn from the generator itself.

    Args:
        generator: the loader's; None: torch's own.
        after_begin: whether Draws.begin() was called for the epoch; else what it draws comes before.
    """
    copy = torch.Generator() if generator is None else torch.Generator(generator.device)
    copy.set_state(torch.get_rng_state() if generator is None else generator.get_state())
    if not after_begin:
        _drawn(copy)
    return int(_drawn(copy).item())


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
