"""ColumnCodec: what `auto` keeps."""

import numpy as np
import pytest

from tiercache.shard.codec import ColumnCodec
from tiercache.shard.spec import Kind


@pytest.mark.parametrize(("n_letters", "kept"), [(26, False), (4, True)])  # zstd leaves 0.60 and 0.27 of them
def test_auto_keeps_zstd_where_it_saves_half(n_letters: int, kept: bool) -> None:
    codec = ColumnCodec("auto", Kind.BYTES)
    blocks = np.random.default_rng(5).integers(0, n_letters, (6, 1 << 16), np.uint8)
    assert [codec.encode(block) is not None for block in blocks] == [kept] * 6
