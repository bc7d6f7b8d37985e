"""The second reader of a cache folder: what it counts, and what it takes for wrong, by folders made by hand."""

import os

import pytest
from tests.support.folder_check import BLOCK_BYTES, Expected, FolderCheck, allocated_at_once, allocated_bytes

NAME = "a" * 40
DATA = b"x" * 10_000


@pytest.fixture
def copies(tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    return copies


def lay(copies, name, data=b"{}", mode=0o400):
    (copies / name).write_bytes(data)
    (copies / name).chmod(mode)


def look(copies, **options):
    return FolderCheck(copies.parent, Expected({NAME: DATA}, **options))


def test_a_partial_copy_that_was_just_completed_is_counted_once(copies):
    lay(copies, f"{NAME}.part", DATA)
    once = allocated_bytes(copies)
    os.link(copies / f"{NAME}.part", copies / NAME)
    assert allocated_bytes(copies) == allocated_at_once(copies) == once >= 3 * BLOCK_BYTES


def test_a_complete_copy_with_its_record_is_valid_at_any_time(copies):
    lay(copies, NAME, DATA)
    lay(copies, f"{NAME}.json")
    assert look(copies).crash_problems() == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda copies: (copies / f"{NAME}.json").unlink(), "no record"),
        (lambda copies: (copies / NAME).chmod(0o600), "can be written"),
        (lambda copies: lay(copies, NAME, DATA[:-1] + b"y"), "byte 9999"),
        (lambda copies: (copies / NAME).unlink(), "pinned copy aaaaaaaa is gone"),
    ],
)
def test_what_no_crash_may_leave_is_named(copies, change, says):
    lay(copies, NAME, DATA, mode=0o600)
    lay(copies, f"{NAME}.json")
    (copies / NAME).chmod(0o400)
    change(copies)
    assert any(says in problem for problem in look(copies, pins=[NAME]).crash_problems())


@pytest.mark.parametrize(("record", "is_wrong"), [(b'{"shard_id": "7"}', True), (b'{"etag": "e"}', False)])
def test_a_map_stays_beside_a_copy_only_where_no_footer_checks_it(copies, record, is_wrong):
    lay(copies, NAME, DATA)
    lay(copies, f"{NAME}.map")
    lay(copies, f"{NAME}.json", record)
    assert any("beside a finished copy" in problem for problem in look(copies).leftover_files()) == is_wrong
