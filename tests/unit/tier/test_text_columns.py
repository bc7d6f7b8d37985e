"""Columns of strings: operations on parts and slices give the same results as on the strings one by one."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.tier import text_columns
from tiercache.tier.text_columns import split_keys

keys = st.lists(st.text("ab/é\n/", max_size=8), max_size=12)


@pytest.mark.parametrize("n_rows", [1, 3, 1 << 16])
def test_keys_are_split_at_their_last_slash(monkeypatch, n_rows):
    monkeypatch.setattr(text_columns, "ROWS_AT_A_TIME", n_rows)

    @given(keys, st.integers(0, 3))
    def check(texts, skipped):
        folders, folder, names = split_keys(pa.array(texts, pa.large_string()).slice(skipped))
        expected = [text.rpartition("/") for text in texts[skipped:]]
        assert [folders[number].as_py() for number in folder.tolist()] == [before + sep for before, sep, _ in expected]
        assert names.to_pylist() == [name for _, _, name in expected]
        assert len(set(folders.to_pylist())) == len(folders)
        names.validate(full=True)

    check()
