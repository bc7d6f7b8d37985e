"""Keys: stable for ever, and different for every different use."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.order.epoch_order import derive_key

PARTS = st.lists(st.one_of(st.integers(), st.text(max_size=8), st.binary(max_size=8)), max_size=4)


@pytest.mark.parametrize(
    ("seed", "parts", "expected"),
    [
        (0, (), "b95c4c4360466cf86a8d7ea0e5dcd03c"),
        (7, ("rows", 3, 0, 12345), "fb778a131e9de1c6227a7406ffe2eca2"),
        (7, ("split",), "6da819277c8ebcdb2efc855a7f50fc84"),
        (7, ("split", 3), "23cac0401b3f0f875812f7596a8c2c37"),
        (7, ("shards", 3, 2), "03116a2207140e02fe57cb4fbd3bdbbb"),
        (7, ("blocks", 3, 2, 1), "917ccc6d7f8c9f4f218175f4076f17a8"),
        (7, ("rows", 3, 2, 12345), "62f80d582b7d23d1bfd78c48af553ac7"),
        (-1, (b"x", 2**70), "519521fd64bfe6221aec83a760f67a35"),
    ],
)
def test_keys_equal_the_stored_golden_values(seed: int, parts: tuple[int | str | bytes, ...], expected: str) -> None:
    assert derive_key(seed, *parts).hex() == expected


@given(st.integers(), PARTS, st.integers(), PARTS)
def test_different_uses_have_different_keys(
    seed: int, parts: list[int | str | bytes], other_seed: int, other_parts: list[int | str | bytes]
) -> None:
    same = (seed, parts) == (other_seed, other_parts)
    assert (derive_key(seed, *parts) == derive_key(other_seed, *other_parts)) == same


def test_values_that_are_divided_otherwise_give_another_key_and_of_other_kinds_none() -> None:
    keys = {derive_key(1, "ab", "c"), derive_key(1, "a", "bc"), derive_key(1, "abc"), derive_key(1, b"ab", "c")}
    assert len(keys) == 4
    assert derive_key(np.int64(5), np.uint8(3)) == derive_key(5, 3)
    for part in (True, np.True_, 1.5):
        with pytest.raises(TypeError):
            derive_key(1, part)
