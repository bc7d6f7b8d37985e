"""Fixtures of the tests of peers."""

from tests.cache.conftest import world  # noqa: F401 - a fixture
from tests.store.test_certificates import certificate  # noqa: F401 - a fixture
