"""The rig notices a cache that is broken: every mutant of tests/stress/mutants.py is found by its trial."""

import json

import pytest
from tests.stress.mutants import CASES
from tests.support.warm_python import run_warm


@pytest.mark.stress  # it breaks the cache on purpose; the tests of the cache find each fault of the cache itself
@pytest.mark.timeout(180)
def test_a_broken_cache_is_detected_and_an_intact_one_is_not(tmp_path):
    done = run_warm(["-m", "tests.stress.mutants", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, case in CASES.items():
        assert any(case.says in problem for problem in found[name]["broken"]), (name, found[name]["broken"])
        assert found[name]["whole"] == [], name
