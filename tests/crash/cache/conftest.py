"""The world of the cache's tests."""

from tests.support.cache_world import world  # noqa: F401 - a fixture
