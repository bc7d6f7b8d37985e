"""Stratified permutation of shards: each shard group takes its shards from the whole stored order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiercache.order.keys import permutation

if TYPE_CHECKING:
    from numpy.typing import NDArray


def stratified_permutation(key: bytes, strata_key: bytes, n: int, n_run: int) -> NDArray[np.int64]:
    """Return a permutation of [0, n) in which any n_run successive items are spread over all of [0, n).

    The items are cut into n_run consecutive strata of about n / n_run items. The permutation takes one item of each
    stratum, drawn by the key, in a drawn order of the strata; then the next item of each stratum in the same order, and
    so on. Therefore a group of 32 shards of data that is stored sorted by label has each label in its share, wherever
    the group begins; 32 shards drawn freely have three shares of one label and none of another.

    If n_run does not divide n, one round has too few items for all strata: the last round or, as drawn, the first. If
    it were always the last round, items of shorter strata would come earlier than others in all epochs (for n = 12,
    n_run = 8: at 4.98 and 6.53 on average instead of 5.5).

    Args:
        key: Key that draws the items of each stratum.
        strata_key: Key that draws the order of the strata.
        n: Number of items.
        n_run: Number of strata; n or more gives a permutation by `key` alone.

    Returns:
        int64[n].
    """
    drawn = permutation(key, n)
    if n_run >= n:
        return drawn
    turn = permutation(strata_key, n_run)
    # The key decides which strata are longer by one.
    ends = (np.arange(1, n_run + 1) * n + permutation(key, n_run)[0]) // n_run
    stratum = np.searchsorted(ends, np.arange(n), side="right")
    number = np.empty(n, np.int64)  # rank of each item in its stratum, as drawn
    number[np.lexsort((drawn, stratum))] = np.arange(n) - np.append(0, ends)[stratum]
    order = np.lexsort((turn[stratum], number))
    return order[::-1] if n % n_run and permutation(strata_key, 2)[0] else order
