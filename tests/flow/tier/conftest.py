"""What the tiers' tests share: a clock that jumps, and three tiers in memory."""

import pytest
from tests.support.clock import JumpingClock
from tests.support.tier_moves import World


@pytest.fixture
def clock():
    with JumpingClock() as clock:
        yield clock


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "world")
