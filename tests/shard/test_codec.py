"""ColumnCodec: what `auto` keeps."""

import numpy as np
import pytest

from tiercache.shard.codec import ColumnCodec
from tiercache.shard.spec import Kind


@pytest.mark.parametrize(("n_letters", "kept"), [(100, False), (26, True)])  # zstd leaves 0.84 and 0.60 of them
def test_auto_keeps_zstd_where_it_saves_a_quarter(n_letters: int, kept: bool) -> None:
    codec = ColumnCodec("auto", Kind.BYTES)
    blocks = np.random.default_rng(5).integers(0, n_letters, (6, 1 << 16), np.uint8)
    assert [codec.encode(block) is not None for block in blocks] == [kept] * 6
