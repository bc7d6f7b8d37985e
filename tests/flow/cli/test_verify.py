"""verify: damage is found and said."""

import pytest
from tests.support.later_release import resum_tail

from tiercache.shard.verify import verify_dataset
from tiercache.store import open_store


def flip(path, offset=-1):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.fixture
def shards(data_set):
    return sorted((data_set / "shards").iterdir())


def test_an_intact_data_set_has_no_findings(tiercache, data_set, shards):
    done = tiercache("verify", data_set, "-j", "2")
    assert done.out.startswith(f"checked {len(shards)} shards, ")
    assert done.out.endswith(": nothing is corrupt\n")
    summary = tiercache("verify", data_set, "--json").events[-1]
    assert (summary["damaged"], summary["findings"], summary["shards"]) == (0, 0, len(shards))
    assert summary["bytes"] == sum(s.stat().st_size for s in shards)
    assert list(verify_dataset(open_store(data_set))) == []


def test_each_damaged_shard_is_named_and_the_exit_code_is_4(tiercache, data_set, shards):
    flip(shards[0], 70)
    flip(shards[1], 0)
    shards[2].unlink()
    *findings, summary = tiercache("verify", data_set, "--json", code=4).events
    found = {f["url"]: f for f in findings}
    assert len(findings) == 3
    assert set(found) == {str(s) for s in shards[:3]}
    assert (found[str(shards[0])]["part"], found[str(shards[0])]["column"]) == ("chunk", "image")
    assert found[str(shards[2])]["message"] == "it is missing"
    assert summary["damaged"] == 3
    text = tiercache("verify", data_set, code=4).out
    assert f"{shards[2]}: file: it is missing\n" in text
    assert text.endswith(": 3 corrupt\n")
    assert len(list(verify_dataset(open_store(data_set)))) == len(findings)


def test_a_missing_segment_is_a_finding(tiercache, data_set):
    segment = next((data_set / "_tiercache" / "segments").iterdir())
    segment.unlink()
    finding, summary = tiercache("verify", data_set, "--json", code=4).events
    assert (finding["url"], finding["part"], finding["message"]) == (str(segment), "segment", "it is missing")
    assert {"version", "shards", "of", "bytes", "damaged", "unread", "findings"} <= summary.keys()
    assert [f.part for f in verify_dataset(open_store(data_set))] == ["segment"]


@pytest.mark.parametrize("folder", ["_tiercache/versions", "_tiercache/segments"])
def test_a_damaged_version_or_segment_is_a_finding(tiercache, data_set, folder):
    flip(next((data_set / folder).iterdir()), 50)
    events = tiercache("verify", data_set, "--json", code=4).events
    assert [e["event"] for e in events] == ["finding", "summary"]
    assert tiercache("info", data_set, code=4).err.startswith("tiercache: error: ")


def test_a_sample_verifies_a_fraction_of_the_shards(tiercache, data_set, shards):
    summary = tiercache("verify", data_set, "--sample", "30%", "--json").events[-1]
    assert summary["shards"] == round(0.3 * len(shards))
    assert summary["of"] == len(shards)
    assert tiercache("verify", data_set, "--sample", "0%", "--json").events[-1]["shards"] == 1
    assert "checked 1 shard of " in tiercache("verify", data_set, "--include", "*-000000.tcs").out


def test_a_shard_of_a_later_format_is_not_damaged_but_the_exit_code_is_3(tiercache, data_set, shards):
    data = bytearray(shards[0].read_bytes())
    data[-64 + 28] = 2
    shards[0].write_bytes(data[:-64] + resum_tail(data[-64:]))
    done = tiercache("verify", data_set, code=3)
    assert f"{shards[0]}: the shard has format 2, which tiercache 0.1 and later know" in done.out
    assert done.out.endswith(": nothing is corrupt, 1 could not be read\n")


def test_an_unreadable_shard_is_not_damaged_but_the_exit_code_is_3(tiercache, data_set, shards, monkeypatch):
    from tiercache.errors import StoreError
    from tiercache.shard import verify

    def refuse(_store, key, *_rest):
        raise StoreError("the network is down", url=key, retryable=True)

    monkeypatch.setattr(verify, "verify_shard", refuse)
    done = tiercache("verify", data_set, code=3)
    assert done.out.endswith(f": nothing is corrupt, {len(shards)} could not be read\n")
    with pytest.raises(StoreError, match="the network is down"):
        list(verify_dataset(open_store(data_set)))
