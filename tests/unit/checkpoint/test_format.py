"""Names and manifests of checkpoints."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache._native.checksum import crc32c
from tiercache.checkpoint.format import (
    FORMAT,
    Manifest,
    StoredFile,
    TensorEntry,
    checkpoint_name,
    checkpoint_objects,
    encode_manifest,
    list_names,
    manifest_key,
    parse_manifest,
    parse_name,
    written_order,
)
from tiercache.errors import CorruptCheckpoint, UnsupportedFormat
from tiercache.store import LocalFolder

CREATED_S = 1_795_980_804.123


def a_manifest(**changes):
    files = (StoredFile("tensors-00001-of-00001.safetensors", 5000, 7), StoredFile("state.json", 20, 9))
    tensors = {
        "model.weight": TensorEntry(files[0].path, 4096, 24, "F32", (2, 3)),
        "scalar": TensorEntry(files[0].path, 4120, 8, "I64", ()),
    }
    name = checkpoint_name(100, CREATED_S, "7f3a9c")
    metrics = {"loss": 1.25, "acc": 3, "bad": math.inf, "worse": -math.inf}
    return replace(Manifest(name, 100, CREATED_S, files, tensors, metrics, {"why": ["test", None]}), **changes)


@given(st.integers(0, 10**18 - 1), st.integers(0, 253_402_300_799_999))
def test_a_name_tells_its_step_and_time(step, created_ms):
    assert parse_name(checkpoint_name(step, created_ms / 1000, "00ff00")) == (step, created_ms / 1000)


def test_another_name_is_no_checkpoint():
    for name in [
        "",
        "step-100",
        "checkpoint-100",
        "step-000000000100.20261329T193324123Z-7f3a9c",
        "step-000000000100.20261129T193324123Z-7f3a9c.tmp",
        "xstep-000000000100.20261129T193324123Z-7f3a9c",
        "step-000000000100.20261129T193324123Z-7f3a9c\n",
    ]:
        assert parse_name(name) is None
        with pytest.raises(ValueError, match="not the name of a checkpoint"):
            written_order(name)


def test_a_manifest_reads_back_as_it_was_written():
    manifest = a_manifest()
    assert manifest.name == "step-000000000100.20261129T193324123Z-7f3a9c"
    assert parse_manifest(encode_manifest(manifest), "u") == manifest
    nan = parse_manifest(encode_manifest(a_manifest(metrics={"loss": math.nan})), "u")
    assert math.isnan(nan.metrics["loss"])


def test_equal_manifests_have_equal_texts():
    first, second = a_manifest(), a_manifest(tensors=dict(reversed(a_manifest().tensors.items())))
    assert encode_manifest(first) == encode_manifest(second)


@given(st.data())
def test_a_changed_byte_of_a_manifest_is_noticed(data):
    text = bytearray(encode_manifest(a_manifest()))
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptCheckpoint):
        parse_manifest(bytes(text), "u")


def test_a_text_that_is_no_manifest_is_corrupt():
    for text in [b"", b"[]\n", b"{}\n", b"{", b"\xff", b"null\n", b"[" * 100_000]:
        with pytest.raises(CorruptCheckpoint) as caught:
            parse_manifest(text, "s3://b/run/x/checkpoint.json")
        assert caught.value.exit_code == 4
        assert "s3://b/run/x/checkpoint.json" in str(caught.value)


def written_otherwise(**changes):
    """The text of a manifest with other values under a right checksum: as a faulty writer would leave it."""
    body = json.loads(encode_manifest(a_manifest())) | changes
    del body["crc32c"]

    def canonical(value):
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    return canonical(body | {"crc32c": crc32c(canonical(body))}) + b"\n"


A_FILE = {"path": "x.safetensors", "bytes": 5000, "crc32c": 7}
A_TENSOR = {"file": "x.safetensors", "offset": 4096, "bytes": 24, "dtype": "F32", "shape": [2, 3]}


def test_a_manifest_with_impossible_values_is_corrupt():
    for changes in [
        {"step": 101},
        {"created_ms": 0},
        {"name": "latest"},
        {"files": [A_FILE | {"path": "../other/x.safetensors"}], "tensors": {}},
        {"files": [A_FILE | {"path": "/etc/passwd"}], "tensors": {}},
        {"files": [A_FILE, A_FILE], "tensors": {}},
        {"files": [A_FILE | {"bytes": -1}], "tensors": {}},
        {"files": [A_FILE | {"bytes": True}], "tensors": {}},
        {"files": [], "tensors": {"w": A_TENSOR}},
        {"files": [A_FILE], "tensors": {"w": A_TENSOR | {"offset": 4990}}},
        {"files": [A_FILE], "tensors": {"w": A_TENSOR | {"shape": [-1]}}},
        {"metrics": {"loss": "high"}},
        {"metrics": {"loss": True}},
        {"metrics": []},
        {"tensors": []},
    ]:
        with pytest.raises(CorruptCheckpoint):
            parse_manifest(written_otherwise(**changes), "u")


def test_what_a_later_release_wrote_is_ignored_or_asks_for_an_upgrade():
    assert parse_manifest(written_otherwise(added=[1]), "u") == a_manifest()
    with pytest.raises(UnsupportedFormat, match="upgrade tiercache"):
        parse_manifest(written_otherwise(format=FORMAT + 1, anything="new"), "u")
    with pytest.raises(UnsupportedFormat, match="needs encryption: upgrade tiercache"):
        parse_manifest(written_otherwise(needs_to_read=["encryption"]), "u")


def test_only_folders_with_a_manifest_are_checkpoints_and_the_one_written_last_comes_last(tmp_path):
    store = LocalFolder(tmp_path)
    later_lower = checkpoint_name(5, CREATED_S + 10, "000001")
    earlier_higher = checkpoint_name(900, CREATED_S, "ffffff")
    unfinished = checkpoint_name(950, CREATED_S + 20, "000002")
    for name in (later_lower, earlier_higher):
        store.put(manifest_key(name), b"x")
    for key in (f"{unfinished}/state.json", "other/checkpoint.json", "notes.txt"):
        store.put(key, b"x")
    assert list_names(store) == [earlier_higher, later_lower]
    assert list(checkpoint_objects(store.list())) == [earlier_higher, later_lower, unfinished]
