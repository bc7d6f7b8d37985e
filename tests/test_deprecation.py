"""Old public names work for one release and warn; both names at once are an error."""

import numpy as np
import pytest

import tiercache as tc


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deprecation") / "data"
    with tc.Writer(folder, schema={"text": "str?", "id": "int64"}) as writer:
        writer.write_batch({"text": [None if i % 3 == 0 else "x" * i for i in range(10)], "id": np.arange(10)})
    return folder


def test_old_arguments_of_a_data_set_give_the_same_batches(path):
    with pytest.warns(DeprecationWarning, match="forms= is now called layouts="):
        old = tc.Dataset(path, forms={"text": "buffer"})
    with pytest.warns(DeprecationWarning, match="nulls= is now called fill_nulls="):
        filled = tc.Dataset(path, nulls={"text": "none"})
    assert bytes(old[:]["text"].values) == bytes(tc.Dataset(path, layouts={"text": "buffer"})[:]["text"].values)
    assert filled[:]["text"] == tc.Dataset(path, fill_nulls={"text": "none"})[:]["text"]


def test_the_old_number_of_streams_is_read(path):
    with pytest.warns(DeprecationWarning, match="streams= is now called shuffle_streams="):
        options = tc.LoaderOptions(streams=3)
    assert options == tc.LoaderOptions(shuffle_streams=3)
    assert tc.DataLoader(tc.Dataset(path), shuffle=True, options=options).state_dict()["streams"] == 3


def test_the_old_name_of_an_error_s_location_gives_the_location():
    error = tc.CorruptShard("wrong", url="memory://x", location=(1, 2, 3))
    with pytest.warns(DeprecationWarning, match="place is now called location"):
        assert error.place == (1, 2, 3)


def test_both_names_at_once_are_an_error(path):
    with pytest.raises(TypeError, match="give layouts= alone"):
        tc.Dataset(path, layouts={}, forms={})
    with pytest.raises(TypeError, match="give shuffle_streams= alone"):
        tc.LoaderOptions(shuffle_streams=1, streams=1)
