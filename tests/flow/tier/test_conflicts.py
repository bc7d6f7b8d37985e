"""Different objects under one name in two tiers: no rule touches either, and the plan names both."""

import json
import shutil
from dataclasses import replace

import pytest
from tests.support.tier_folders import FILES, Folders, content
from typer.testing import CliRunner

from tiercache.cli.app import app
from tiercache.store import MemoryStore
from tiercache.store.contract import WrapperStore
from tiercache.tier.mover import DONE, catalog_path, run_once
from tiercache.tier.stores import Stores, put_hold

STEP = [f"run/step-1/{name}" for name in FILES]


@pytest.fixture
def folders(tmp_path):
    """Step 1 was moved to standard, and step 2 is the newest."""
    folders = Folders(tmp_path)
    folders.save(1, 2)
    assert folders.run().exit_code == DONE
    assert folders.lies(1) == ["standard"]
    return folders


def bytes_of(folders):
    return {
        (tier, key): (folders.root / tier / key).read_bytes()
        for key, tiers in folders.found().items()
        for tier in tiers
    }


def conflicts(report):
    return {refusal.path: refusal.reason for refusal in report.plan.refusals if refusal.reason.startswith("conflict")}


@pytest.mark.parametrize("version", ["again, and longer", ""], ids=["other bytes", "the same bytes by hand"])
def test_a_name_that_was_written_again_is_a_conflict_that_no_run_touches(folders, version):
    folders.save(1, version=version)
    before = bytes_of(folders)
    for _ in range(2):
        report = folders.run()
        assert bytes_of(folders) == before
        assert list(conflicts(report)) == ["run/step-1"]
    reason = conflicts(report)["run/step-1"]
    for part in ("B of ", "in hot", "in standard", "delete or rename the one that is not wanted"):
        assert part in reason


@pytest.mark.parametrize("tier", ["hot", "standard"])
def test_a_conflict_ends_when_a_person_has_deleted_one_side(folders, tier):
    folders.save(1, version="again, and longer")
    folders.run()
    shutil.rmtree(folders.root / tier / "run/step-1")
    report = folders.run()
    assert conflicts(report) == {}
    assert {tuple(tiers) for key, tiers in folders.found().items() if key in STEP} == {("standard",)}
    kept = (folders.root / "standard" / STEP[0]).read_bytes()
    assert kept == content(STEP[0], "again, and longer" if tier == "standard" else "")


def test_a_checkpoint_in_conflict_displaces_no_other_from_a_keep_list(folders):
    folders.save(3, 4, 5)
    folders.run()
    assert [folders.lies(step) for step in (2, 3, 4)] == [["standard"]] * 3
    folders.save(4, version="again, and longer")
    folders.save(6)
    folders.run()
    # The last four without step 4 are 2, 3, 5 and 6.
    assert [folders.lies(step) for step in (2, 3, 5, 6)] == [["standard"], ["standard"], ["standard"], ["hot"]]


def test_copies_that_a_lost_catalog_does_not_know_are_compared_and_are_no_conflict(folders):
    shutil.copytree(folders.root / "standard/run/step-1", folders.root / "hot/run/step-1")
    catalog_path(folders.file).unlink()
    report = folders.run()
    assert conflicts(report) == {}
    assert report.exit_code == DONE
    assert folders.lies(1) == ["standard"]


def test_what_another_machine_has_recalled_is_no_conflict_while_both_copies_stay(folders):
    folders.write_rules('[[rules]]\nmatch = "**"\nkeep_hot = { last = 9 }\nkeep_standard = { last = 9 }\n')
    shutil.copytree(folders.root / "standard/run/step-1", folders.root / "hot/run/step-1")
    with Stores(folders.file) as stores:
        put_hold(stores.store("standard"), ["run/step-1"], until_s=2.0, now_s=1.0, why="recalled elsewhere")
    for _ in range(3):
        assert conflicts(folders.run()) == {}
    assert folders.lies(1) == ["hot", "standard"]


class WithoutETags(WrapperStore):
    """A store that names no ETag."""

    def head(self, key):
        return replace(super().head(key), etag=None)

    def list(self, prefix=""):
        return (replace(info, etag=None) for info in super().list(prefix))

    def read_tail(self, key, n_bytes):
        data, info = super().read_tail(key, n_bytes)
        return data, replace(info, etag=None)

    def create(self, key, **options):
        upload = super().create(key, **options)
        complete = upload.complete

        def complete_without_etag(**conditions):
            info = complete(**conditions)
            return None if info is None else replace(info, etag=None)

        upload.complete = complete_without_etag
        return upload


def test_copies_in_a_store_without_etags_are_no_conflict(tmp_path):
    folders = Folders(tmp_path, rules='[[rules]]\nmatch = "**"\nafter = "1h"\nto = "archive"\n')
    folders.save(1, 2)
    file, archive = folders.file, MemoryStore(tmp_path.as_posix().strip("/").replace("/", "-"), "archive")
    with Stores(file, stores={"archive": WithoutETags(archive)}) as stores:
        for _ in range(3):
            report = run_once(file, stores=stores)
            assert conflicts(report) == {}
            assert report.exit_code == DONE, report.stopped
    # The newest checkpoint is only copied: it is dropped in a later run, when the copy is known to be verified.
    assert (folders.lies(1), folders.lies(2)) == ([], ["hot"])
    assert sorted(info.key for info in archive.list("run/")) == sorted(
        f"run/step-{step}/{name}" for step in (1, 2) for name in FILES
    )


def test_check_and_the_list_of_checkpoints_name_a_conflict(folders):
    folders.save(1, version="again, and longer")
    rules = ["--rules", str(folders.root / "tiercache.toml")]
    (note,) = [line for line in invoke("tier", "check", *rules).splitlines() if "in conflict" in line]
    assert "run/step-1" in note
    lines = [json.loads(line) for line in invoke("ckpt", "ls", "--json", *rules).splitlines()]
    (found,) = [one for one in lines if one.get("path") == "run/step-1"]
    assert found["problem"].startswith("conflict: two tiers have different objects")


def invoke(*words):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return done.stdout
