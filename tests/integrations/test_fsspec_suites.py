"""fsspec's own abstract suites, over three targets."""

from __future__ import annotations

import uuid

import fsspec
import pytest
from fsspec.tests.abstract import (
    AbstractCopyTests,
    AbstractFixtures,
    AbstractGetTests,
    AbstractOpenTests,
    AbstractPipeTests,
    AbstractPutTests,
)

import tiercache as tc


class _Suites(AbstractCopyTests, AbstractGetTests, AbstractOpenTests, AbstractPipeTests, AbstractPutTests):
    """All of them."""


class TestMemory(_Suites, AbstractFixtures):
    @pytest.fixture
    def fs(self, make):
        memory = fsspec.filesystem("memory")
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]
        yield make("memory")
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]

    @pytest.fixture
    def fs_join(self):
        return lambda *parts: "/".join(parts)

    @pytest.fixture
    def fs_path(self):
        return ""


class TestLocal(_Suites, AbstractFixtures):
    @pytest.fixture
    def fs(self, make):
        return make("file", target_options={"auto_mkdir": True})

    @pytest.fixture
    def fs_path(self, tmp_path_factory):
        return str(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def connected(moto_server, s3_of, tmp_path_factory):
    """One for all tests: a client of S3 takes 0.2 s."""
    with tc.Cache(tmp_path_factory.mktemp("s3") / "cache", size="64MiB", min_free="0") as cache:
        options = {"target_protocol": "s3", "target_options": s3_of(moto_server), "cache": cache}
        fs = fsspec.filesystem("tiercache", skip_instance_cache=True, **options)
        yield fs
        fs.close()


@pytest.mark.s3
@pytest.mark.stress  # slow; TestMemory covers our methods, and test_any_url_s3.py covers s3fs
class TestS3(_Suites, AbstractFixtures):
    """Over moto: SeaweedFS keeps a folder whose last object went, so that 13 of these fail there by s3fs alone too."""

    @pytest.fixture
    def fs(self, connected):
        yield connected
        connected.invalidate_cache()
        for store in connected._stores.values():
            store.inner._pool.drop()  # its threads, but not its connections

    @pytest.fixture
    def fs_join(self):
        return lambda *parts: "/".join(parts)

    @pytest.fixture
    def fs_path(self, moto_server):
        return f"{moto_server.bucket}/test-{uuid.uuid4().hex[:8]}"

    @pytest.fixture
    def supports_empty_directories(self):
        return False

    def test_open_exclusive(self, fs, fs_target):
        """In place of fsspec's, which wants the error from open(): s3fs asks S3 when the file is closed."""
        fs.pipe_file(fs_target, b"data")
        file = fs.open(fs_target, "xb")
        file.write(b"other")
        with pytest.raises(FileExistsError):
            file.close()
        assert fs.cat_file(fs_target) == b"data"
