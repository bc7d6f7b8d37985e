"""Plain HTTP ranges from a real nginx."""

from __future__ import annotations

import pytest
from tests.support.local_servers import nginx_over
from tests.support.store_suite import ReadSuite

from tiercache.store import CloudStore, open_store


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder, and the URL under which nginx serves it."""
    root = tmp_path_factory.mktemp("served")
    with nginx_over(root, tmp_path_factory.mktemp("nginx")) as url:
        yield root, url


@pytest.mark.stress
class TestHttpOnNginx(ReadSuite):
    @pytest.fixture
    def store(self, served, request):
        self.folder = served[0] / f"{abs(hash(request.node.name))}"
        store = open_store(f"{served[1]}/{self.folder.name}")
        assert isinstance(store, CloudStore)
        yield store
        store.close()

    def raw_put(self, store, key, data):
        (self.folder / key).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / key).write_bytes(data)
