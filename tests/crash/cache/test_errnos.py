"""The n-th system call of each kind fails: data is right, no reader sees an error, the next run is clean."""

import json
import shutil

import pytest
from tests.support.errnos import KINDS, build_shim, preload
from tests.support.warm_python import run_warm

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler cc")

# Kinds that a cache's life makes no use of now; should it once, the rounds meet them.
UNUSED = {"access", "sync", "fallocate", "chown", "utime"}


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return build_shim(tmp_path_factory.mktemp("shim"))


def rounds(shim, folder, *arguments, timeout_s=170):
    command = ["-m", "tests.stress.errno_rounds", str(folder), *arguments]
    done = run_warm(command, timeout_s=timeout_s, more=preload(shim))
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def check(report):
    assert report["problems"] == []
    assert set().union(*report["calls"].values()) >= KINDS.keys() - UNUSED


def test_a_failing_system_call_never_gives_wrong_data(shim, tmp_path):
    report = rounds(shim, tmp_path, "--chapters", "tight_lru", "--stride", "4999")
    check(report)
    assert report["n_struck"] > 5


def test_a_corrupt_copy_that_cannot_be_removed_is_not_served_again(shim, tmp_path):
    report = rounds(shim, tmp_path, "--chapters", "damaged", "--kinds", "unlink", "--for-ever", "--stride", "13")
    assert report["problems"] == []
    assert report["n_struck"] > 1


@pytest.mark.stress
@pytest.mark.timeout(5400)
def test_each_system_call_may_fail_once_with_each_error(shim, tmp_path, capsys):
    report = rounds(shim, tmp_path, "--each-error", timeout_s=5000)
    tell(report, "each call once, with each error", capsys)
    check(report)


@pytest.mark.stress
@pytest.mark.timeout(5400)
def test_each_system_call_and_all_later_ones_may_fail(shim, tmp_path, capsys):
    report = rounds(shim, tmp_path, "--for-ever", timeout_s=5000)
    tell(report, "each call and all after it", capsys)
    check(report)


def tell(report, what, capsys):
    with capsys.disabled():
        print(
            f"\nerrnos, {what}: {report['n_struck']} positions struck in {report['seconds']:.0f} s, of a life's calls "
            f"{report['calls']}; {len(report['problems'])} problems"
        )
