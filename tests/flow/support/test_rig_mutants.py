"""The rig notices a cache that is broken: every mutant of tests/stress/mutants.py is found by its trial."""

import json
import shutil

import pytest
from tests.stress.mutants import CASES
from tests.support.errnos import build_shim, preload
from tests.support.warm_python import run_warm

HAS_COMPILER = shutil.which("cc") is not None


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """What each trial found, where the cache is broken and where it is whole."""
    folder = tmp_path_factory.mktemp("mutants")
    names = [name for name, case in CASES.items() if HAS_COMPILER or not case.needs_shim]
    more = preload(build_shim(folder)) if HAS_COMPILER else {}
    done = run_warm(["-m", "tests.stress.mutants", str(folder), "--only", *names], more=more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.stress  # it breaks the cache on purpose; the tests of the cache find each fault of the cache itself
@pytest.mark.timeout(180)
@pytest.mark.parametrize("mutant", CASES)
def test_a_broken_cache_is_detected_and_an_intact_one_is_not(problems, mutant):
    case = CASES[mutant]
    if case.needs_shim and not HAS_COMPILER:
        pytest.skip("there is no C compiler cc")
    assert any(case.says in problem for problem in problems[mutant]["broken"]), problems[mutant]["broken"]
    assert problems[mutant]["whole"] == []
