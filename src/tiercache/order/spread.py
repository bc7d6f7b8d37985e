"""The reading order of shards: permuted so that each group takes its shards from all over the stored order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.order.keys import permutation

if TYPE_CHECKING:
    from numpy.typing import NDArray


def spread(key: bytes, strata_key: bytes, n: int, n_run: int) -> NDArray[np.int64]:
    """A permutation of [0, n) of which any n_run in succession are spread over all of [0, n).

    The items are cut into n_run strata of about n / n_run that follow each other. The permutation takes one of each
    stratum, drawn by the key, in an order of the strata that is drawn too; then the next of each in the same order of
    the strata, and so on. So a group of 32 shards of data that is stored sorted by label has the labels in their
    shares, wherever it begins and ends, where 32 drawn freely have three shares of one label and none of another.

    Where n / n_run is no whole number, one round has too few for all strata: the last one or, drawn, the first. Were it
    always the last, items of shorter strata came earlier than others in all epochs (of 12, n_run 8: at 4.98 and 6.53 on
    average instead of 5.5).

    Args:
        key: of what is drawn of each stratum.
        strata_key: of the order of the strata.
        n: items.
        n_run: n or more: a permutation by key alone.

    Returns:
        int64[n].
    """
    drawn = permutation(key, n)
    if n_run >= n:
        return drawn
    turn = permutation(strata_key, n_run)
    # The strata that are longer by one are others with each key.
    ends = (np.arange(1, n_run + 1) * n + permutation(key, n_run)[0]) // n_run
    stratum = np.searchsorted(ends, np.arange(n), side="right")
    number = np.empty(n, np.int64)  # of each item in its stratum, as drawn
    number[np.lexsort((drawn, stratum))] = np.arange(n) - np.append(0, ends)[stratum]
    order = np.lexsort((turn[stratum], number))
    return order[::-1] if n % n_run and permutation(strata_key, 2)[0] else order
