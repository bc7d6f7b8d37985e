"""An object of a store is read as a file."""

import io

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiercache.errors import ObjectChanged
from tiercache.store import LocalFolder, MemoryStore, StoreFile

DATA = bytes(range(250))
STEPS = st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(-300, 300), st.integers(-1, 300)), max_size=10)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(STEPS)
def test_a_store_file_reads_like_a_file_of_the_same_bytes(tmp_path, steps):
    store = MemoryStore(tmp_path.name, "steps")
    store.put("a", DATA)
    file, expected = StoreFile(store, "a", len(DATA)), io.BytesIO(DATA)
    for whence, offset, n_bytes in steps:
        if expected.tell() * (whence == 1) + len(DATA) * (whence == 2) + offset < 0:
            with pytest.raises(ValueError, match="negative"):
                file.seek(offset, whence)
            continue
        assert file.seek(offset, whence) == expected.seek(offset, whence)
        assert file.read(n_bytes) == expected.read(n_bytes)
        assert file.tell() == expected.tell()


def test_a_store_file_of_a_replaced_object_is_an_error(tmp_path):
    store = LocalFolder(tmp_path)
    file = StoreFile(store, "a", len(DATA), store.put("a", DATA).etag)
    store.put("a", DATA[::-1])
    with pytest.raises(ObjectChanged):
        file.read(10)
