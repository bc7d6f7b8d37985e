"""The two files of a partial copy."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.cache_world import write_units

from tiercache._native.checksum import crc32c
from tiercache.cache import copy_file
from tiercache.cache.copy_file import charge_of, continue_part, create_part, map_bytes, open_part
from tiercache.cache.folder import Folder
from tiercache.model import ByteRange

UNIT = copy_file.UNIT_BYTES
MIB = 1 << 20
NAME = "a" * 40


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "cache")


def noise(n_bytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n_bytes, np.uint8)


def forget_boot(monkeypatch):
    monkeypatch.setattr(copy_file, "boot_id", lambda: "another-boot")


def test_written_units_are_visible_to_handles(folder):
    data = noise(10 * UNIT + 5)
    part = create_part(folder, NAME, len(data))
    held = part.hold()
    assert not held.covers([ByteRange(0, 1)])
    write_units(part, 2 * UNIT, data[2 * UNIT : 4 * UNIT])
    write_units(part, 10 * UNIT, data[10 * UNIT :])
    assert held.covers([ByteRange(2 * UNIT, 4 * UNIT), ByteRange(10 * UNIT + 1, len(data))])
    assert not held.covers([ByteRange(4 * UNIT - 1, 4 * UNIT + 1)])
    assert os.pread(held.fd, UNIT, 3 * UNIT) == data[3 * UNIT : 4 * UNIT].tobytes()
    other = open_part(folder, NAME, len(data))
    assert set(np.flatnonzero(other.mask()).tolist()) == {2, 3, 10}
    for open_file in (other, held, part):
        open_file.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 6 * UNIT + 10),
    st.lists(st.integers(1, 3 * UNIT), max_size=12),
    st.booleans(),
)
def test_a_range_that_arrives_in_pieces_of_any_size_is_written_as_if_at_once(folder, n_bytes, piece_bytes, repeats):
    data = noise(n_bytes)
    part = create_part(folder, NAME, n_bytes)
    offset = 0
    if repeats:  # the object was moved in the middle of the read
        part.write(0, memoryview(bytes(min(n_bytes, 100))))
    for size in [*piece_bytes, n_bytes]:
        piece = data[offset : offset + size]
        if len(piece):
            part.write(offset, piece.data)
        offset += len(piece)
    part.mark_present(ByteRange(0, n_bytes))
    assert part.checksum() == crc32c(data)
    assert os.pread(part.fd, n_bytes + 1, 0) == data.tobytes()
    held = part.hold()
    assert part.present.all()
    assert held.wrong_units() == []
    held.close()
    part.close()
    folder.remove_part(NAME)


def test_a_partial_copy_is_not_larger_on_disk_than_its_charge(folder):
    n_bytes = 4 * MIB
    part = create_part(folder, NAME, n_bytes)
    for unit in range(0, 512, 2):
        write_units(part, unit * UNIT, noise(UNIT))
    os.fsync(part.fd)
    on_disk = sum((folder.copies / f"{NAME}{kind}").stat().st_blocks * 512 for kind in (".part", ".map"))
    assert on_disk <= charge_of(part.present, n_bytes) - UNIT
    part.close()


@pytest.mark.parametrize("damage", ["nothing", "data lost", "sums lost", "cut"])
def test_a_partial_copy_of_an_earlier_boot_is_verified(folder, monkeypatch, damage):
    data = noise(5 * UNIT)
    part = create_part(folder, NAME, len(data))
    write_units(part, UNIT, data[UNIT : 3 * UNIT])
    part.close()
    path, map_path = (folder.copies / f"{NAME}{kind}" for kind in (".part", ".map"))
    if damage == "data lost":
        with path.open("r+b") as file:
            file.seek(2 * UNIT)
            file.write(b"\0" * UNIT)
    elif damage == "sums lost":
        os.truncate(map_path, 72)
        os.truncate(map_path, map_bytes(len(data)))
    elif damage == "cut":
        os.truncate(path, 2 * UNIT)
        os.truncate(path, len(data))
    forget_boot(monkeypatch)
    assert open_part(folder, NAME, len(data)) is None, "nobody is served before it was read back"
    again = continue_part(folder, NAME, len(data))
    if damage == "nothing":
        assert np.flatnonzero(again.present).tolist() == [1, 2]
        held = open_part(folder, NAME, len(data))
        held.close()
        again.close()
    else:
        assert again is None
        assert list(folder.copies.iterdir()) == []


@pytest.mark.parametrize("damage", ["no map", "no part", "torn map", "short map", "another part", "another size"])
def test_an_invalid_partial_copy_is_removed(folder, damage):
    part = create_part(folder, NAME, 5 * UNIT)
    write_units(part, 0, noise(UNIT))
    part.close()
    path, map_path = (folder.copies / f"{NAME}{kind}" for kind in (".part", ".map"))
    if damage == "no map":
        map_path.unlink()
    elif damage == "no part":
        path.unlink()
    elif damage == "torn map":
        map_path.write_bytes(b"\0" * map_bytes(5 * UNIT))
    elif damage == "short map":
        os.truncate(map_path, 70)
    elif damage == "another part":
        path.rename(path.with_suffix(".kept"))
        path.write_bytes(b"\0" * 5 * UNIT)
    n_bytes = 6 * UNIT if damage == "another size" else 5 * UNIT
    assert open_part(folder, NAME, n_bytes) is None
    assert continue_part(folder, NAME, n_bytes) is None
    assert [p.suffix for p in folder.copies.iterdir()] == ([".kept"] if damage == "another part" else [])


def test_a_read_only_partial_copy_can_be_continued(folder):
    part = create_part(folder, NAME, 2 * UNIT)
    write_units(part, 0, noise(UNIT))
    os.fchmod(part.fd, 0o400)
    part.close()
    part = continue_part(folder, NAME, 2 * UNIT)
    write_units(part, UNIT, noise(UNIT))
    assert part.present.all()
    part.close()
