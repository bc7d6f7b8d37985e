"""Copies between tiers: the copy equals what was read, or there is no copy."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from tests.support.faults import Fault, FaultKind, FaultStore
from tests.support.stores import GateStore

from tiercache._native.checksum import crc32c
from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.prices import PART_BYTES
from tiercache.store import LocalFolder, MemoryStore
from tiercache.store.contract import WrapperStore
from tiercache.tier.journal import PlannedObject
from tiercache.tier.rules import RuleFile, Tier
from tiercache.tier.stores import Stores
from tiercache.tier.transfer import Transfer

OLD_NS = 1_500_000_000_123_456_789
SMALL = b"a small object"
LARGE = os.urandom(2 * PART_BYTES + 1234)
SIZES = pytest.mark.parametrize(
    "data", [b"", SMALL, LARGE[:PART_BYTES], LARGE], ids=["empty", "small", "part", "large"]
)


_numbers = count()


def memory():
    """An empty store."""
    return MemoryStore(f"transfer-{next(_numbers)}")


class Place:
    """Two tiers, `near` and `far`, and a transfer between them."""

    def __init__(self, near, far, *, archives=None, classes=None, **options):
        tiers = tuple(
            Tier(name=name, url=f"memory://{name}", storage_class=(classes or {}).get(name)) for name in ("near", "far")
        )
        self.near, self.far = near, far
        self.stores = Stores(
            RuleFile(path=Path("rules.toml"), sha256="", tiers=tiers),
            stores={"near": near, "far": far},
            s3_classes=archives,
        )
        self.transfer = Transfer(self.stores, **options)

    def planned(self, key="a", store=None, **changes):
        """Return an object as a plan has it."""
        info = (store or self.near).head(key)
        given = {"n_bytes": info.n_bytes, "etag": info.etag, "modified_s": info.modified_s, **changes}
        return PlannedObject(key, **given)

    def copy(self, **changes):
        return self.transfer.copy("near", "far", self.planned(**changes))


@pytest.fixture
def place():
    made = []

    def make(near=None, far=None, **options):
        made.append(Place(near or memory(), far or memory(), **options))
        return made[-1]

    yield make
    for one in made:
        one.transfer.close()
        one.stores.close()
        for store in (one.near, one.far):
            store.delete([info.key for info in store.list()])


class WrongWrites(WrapperStore):
    """A store that keeps other bytes of the same length; `turn` says which."""

    def __init__(self, inner, turn: Callable[[bytes], bytes]):
        super().__init__(inner)
        self.turn = turn

    def create(self, key):
        upload, turn = self.inner.create(key), self.turn
        put_part = upload.put_part
        upload.put_part = lambda number, data: put_part(number, turn(bytes(data)))
        return upload


# -- copies ---------------------------------------------------------------------------------------------------------


@SIZES
def test_a_copy_has_the_bytes_and_their_checksum(place, data):
    here = place()
    here.near.put("a", data)
    copied = here.copy()
    assert here.far.get("a") == data
    assert (copied.n_bytes, copied.crc32c, copied.etag) == (len(data), crc32c(data), here.far.head("a").etag)


@SIZES
def test_a_copy_between_folders_keeps_the_mode_and_the_dates_of_file_and_folder(place, tmp_path, data):
    here = place(LocalFolder(tmp_path / "near"), LocalFolder(tmp_path / "far"))
    here.near.put("deep/a", data)
    source, copy = tmp_path / "near" / "deep", tmp_path / "far" / "deep"
    (source / "a").chmod(0o600)
    source.chmod(0o700)
    for path in (source / "a", source):
        os.utime(path, ns=(OLD_NS, OLD_NS))
    copied = here.transfer.copy("near", "far", here.planned("deep/a"))
    assert copied.etag == here.far.head("deep/a").etag
    for path in (copy / "a", copy):
        assert path.stat().st_mtime_ns == OLD_NS
    assert ((copy / "a").stat().st_mode & 0o777, copy.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize("written_s", [None, OLD_NS / 1e9])
@SIZES
def test_a_copy_from_a_store_into_a_folder_has_the_date_of_the_object(place, tmp_path, data, written_s):
    here = place(far=LocalFolder(tmp_path / "far"))
    here.near.put("deep/a", data)
    planned = here.planned("deep/a")
    copied = here.transfer.copy("near", "far", planned, written_s=written_s)
    assert copied.etag == here.far.head("deep/a").etag
    expected_s = planned.modified_s if written_s is None else written_s
    for path in (tmp_path / "far" / "deep" / "a", tmp_path / "far" / "deep"):
        assert path.stat().st_mtime == expected_s


# -- what is not what was planned -------------------------------------------------------------------------------------


def test_a_missing_source_is_not_found(place):
    here = place()
    with pytest.raises(NotFound):
        here.transfer.copy("near", "far", PlannedObject("a", 1))


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_source_that_changes_during_the_copy_leaves_the_destination_unchanged(place, data):
    near = FaultStore(memory(), [Fault("read_into", kind=FaultKind.REPLACED)])
    here = place(near)
    near.inner.put("a", data)
    here.far.put("a", b"older")
    one = here.planned()
    near.inner.put("a", data[::-1])
    with pytest.raises(ObjectChanged):
        here.transfer.copy("near", "far", one)
    assert here.far.get("a") == b"older"


def test_two_tiers_of_one_location_are_not_copied_onto_themselves(tmp_path):
    tiers = tuple(Tier(name=name, url=str(tmp_path)) for name in ("hot", "archive"))
    stores = Stores(RuleFile(path=Path("rules.toml"), sha256="", tiers=tiers))
    with stores, Transfer(stores) as transfer, pytest.raises(ValueError, match="have one URL"):
        transfer.copy("hot", "archive", PlannedObject("a", 1))


# -- what does not arrive ---------------------------------------------------------------------------------------------


def faulty(verb, **how):
    return lambda: FaultStore(memory(), [Fault(verb, **how)])


def writing(turn):
    return lambda: WrongWrites(memory(), turn)


def flipped(part):
    return part[:-1] + bytes([part[-1] ^ 1])


FLIP, WRONG = FaultKind.BIT_FLIP, "the copy is not what it should be"
NO_COPY = {  # bytes, both stores, what is planned otherwise, the error
    "another size": (SMALL, memory, memory, {"n_bytes": 1}, "what was planned"),
    "another ETag": (SMALL, memory, memory, {"etag": '"other"'}, "what was planned"),
    "another date": (SMALL, memory, memory, {"etag": None, "modified_s": 1.0}, "what was planned"),
    "a bit of the source flips": (
        LARGE, faulty("read_into", nth=2, kind=FLIP), memory, {"crc32c": crc32c(LARGE)}, "the source is not what it",
    ),
    **{f"part {n} of the source fails": (LARGE, faulty("read_into", nth=n), memory, {}, "scripted") for n in (1, 2, 3)},
    "it arrives wrong, small": (SMALL, memory, writing(flipped), {}, WRONG),
    "it arrives wrong, large": (LARGE, memory, writing(flipped), {}, WRONG),
    "it arrives short": (SMALL, memory, writing(lambda part: part[:-1]), {}, "expected 14 bytes, found 13 bytes"),
    "a bit flips when a small copy is read back": (SMALL, memory, faulty("read_tail", kind=FLIP), {}, WRONG),
    "a bit flips when a large copy is read back": (LARGE, memory, faulty("read_into", kind=FLIP), {}, WRONG),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_COPY)
def test_what_is_not_the_planned_object_or_does_not_arrive_as_it_is_an_error_and_no_copy(place, name):
    data, near, far, changes, said = NO_COPY[name]
    here = place(near(), far())
    here.near.put("a", data)
    with pytest.raises(StoreError, match=said) as caught:
        here.copy(**changes)
    assert list(here.far.list()) == []
    assert said != WRONG or caught.value.details["wrong"]


def test_an_object_that_another_writer_put_meanwhile_is_not_removed(place):
    far = GateStore(memory())
    here, caught = place(far=far), []
    here.near.put("a", SMALL)

    def copy():
        with pytest.raises(ObjectChanged, match="somebody else") as error:
            here.copy()
        caught.append(error.value)

    with far.stop_at("after_complete") as gate:
        thread = threading.Thread(target=copy)
        thread.start()
        gate.wait_reached()
        far.inner.put("a", b"theirs")
    thread.join()
    assert (len(caught), far.inner.get("a")) == (1, b"theirs")


VERBS = ("create", "put_part", "complete")
CASES = [(SMALL, verb) for verb in (*VERBS, "read_tail")] + [(LARGE, verb) for verb in (*VERBS, "head", "read_into")]


@pytest.mark.parametrize(("data", "verb"), CASES)
def test_a_failing_destination_is_an_error_and_the_next_attempt_succeeds(place, data, verb):
    far = FaultStore(memory(), [Fault(verb)])
    here = place(far=far)
    here.near.put("a", data)
    with pytest.raises(StoreError, match="scripted fault"):
        here.copy()
    assert far.faulted_calls == [(verb, "a")]
    here.copy()
    assert far.inner.get("a") == data


# -- pace, cancelling, memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_cancelled_copy_leaves_nothing(place, data):
    cancel = threading.Event()
    near = GateStore(memory())
    here, caught = place(near, cancel=cancel), []
    near.put("a", data)

    def copy():
        with pytest.raises(StoreError, match="cancelled") as error:
            here.copy()
        caught.append(error.value.details["cancelled"])

    verb = "read_into" if data is LARGE else "read_tail"
    with near.stop_at(f"before_{verb}") as gate:
        thread = threading.Thread(target=copy)
        thread.start()
        gate.wait_reached()
        cancel.set()
    thread.join()
    assert (caught, list(here.far.list())) == ([True], [])
