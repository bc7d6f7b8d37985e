"""What the tests of inventories share: tiers whose listings a test sets."""

import pytest
from tests.support.scripted_tiers import scripted


@pytest.fixture
def tiers(tmp_path, request):
    found = scripted(tmp_path, request.node.name)
    yield found
    found.clear()
