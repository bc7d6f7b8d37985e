"""Fixtures of the tests of peers."""

from tests.support.cache_world import world  # noqa: F401 - a fixture
