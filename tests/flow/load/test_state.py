"""The state: small plain values, checked when they come back, and the data that it names."""

from __future__ import annotations

import json

import pytest
from tests.support.records import ids_of, make_columns

import tiercache as tc
from tiercache.errors import UnsupportedFormat
from tiercache.load.epoch import STATE_FORMAT, RunState, reopen
from tiercache.model import SourcePart


def state_of(**changes):
    values = {
        "parts": (SourcePart("a", 1, "f" * 64),),
        "seed": 7,
        "epoch": 1,
        "offset": 30,
        "shuffle": True,
        "drop_last": False,
        "streams": 4,
        "placement": "global",
        "group_bytes": None,
        "window_bytes": 1 << 28,
    }
    return RunState(**{**values, **changes})


class Data:
    """A source as far as a state needs one: parts, by versions."""

    url = "memory://data"

    def __init__(self, *parts):
        self.parts = parts

    def at_versions(self, versions):
        parts = [SourcePart(p.dataset_id, v, f"of {v}", p.selection) for p, v in zip(self.parts, versions, strict=True)]
        return Data(*parts)


@pytest.mark.parametrize(
    "state",
    [
        state_of(),
        state_of(seed=-(2**70), parts=(SourcePart("a", 1, "f", "hash"), SourcePart("b", 3, "g"))),
        state_of(mixture={"weights": [2, 1], "stop": "first"}),
    ],
)
def test_a_state_comes_back_from_json_as_it_was(state):
    text = json.dumps(state.to_dict())
    assert RunState.from_dict(json.loads(text)) == state
    assert RunState.from_dict(state.to_dict()) == state


def test_options_that_are_none_are_refused(make_dataset):
    with pytest.raises(TypeError, match=r"takes a tiercache.LoaderOptions\(...\), got {'seed': 1}"):
        tc.DataLoader(tc.Dataset(make_dataset(10)), options={"seed": 1})


def test_states_of_other_releases_are_told_from_what_is_no_state(make_dataset):
    loader = tc.DataLoader(tc.Dataset(make_dataset(10)), batch_size=4)
    with pytest.raises(UnsupportedFormat, match="update tiercache"):
        loader.load_state_dict({"format": STATE_FORMAT + 1})
    with pytest.raises(UnsupportedFormat, match="the release that saved it"):
        loader.load_state_dict({"format": 1, "dataset_id": "a"})
    state = loader.state_dict()
    del state["seed"]
    with pytest.raises(ValueError, match=r"\['seed'\] differ"):
        loader.load_state_dict(state)


def test_the_versions_that_a_state_names_are_opened(make_dataset):
    source = Data(SourcePart("a", 5, "of 5"), SourcePart("b", 2, "of 2", "some"))
    state = state_of(parts=(SourcePart("a", 4, "of 4"), SourcePart("b", 2, "of 2", "some")))
    assert reopen(source, state).parts == state.parts
    assert reopen(source, state_of(parts=source.parts)) is source


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ([SourcePart("b", 5, "of 5")], "another data set"),
        ([SourcePart("a", 5, "of 5"), SourcePart("a", 5, "of 5")], "another data set"),
        ([SourcePart("a", 5, "else")], "version 5 is not the one"),
        ([SourcePart("a", 4, "else")], "version 4 is not the one"),
        ([SourcePart("a", 5, "of 5", "some")], "another selection"),
    ],
)
def test_a_state_of_changed_data_is_refused(parts, match):
    with pytest.raises(tc.ObjectChanged, match=match):
        reopen(Data(SourcePart("a", 5, "of 5")), state_of(parts=tuple(parts)))


def test_resuming_at_an_older_version_does_not_change_the_users_data_set(make_dataset):
    path = make_dataset(60)
    state = tc.DataLoader(tc.Dataset(path), batch_size=16).state_dict()
    with tc.Writer(path, mode="append") as writer:
        writer.write_batch(make_columns(20, 60))
    dataset = tc.Dataset(path)
    loader = tc.DataLoader(dataset, batch_size=16)
    assert len(loader) == 5
    loader.load_state_dict(state)
    assert (len(loader), len(dataset)) == (4, 80)
    assert sum(map(len, ids_of(loader))) == 60
