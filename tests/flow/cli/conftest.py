"""A data set to use the command on, and a cache."""

import pytest
from tests.support.image_files import png

from tiercache.packer.pack import pack


@pytest.fixture
def photos(tmp_path):
    """A folder of 20 pictures in two classes."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(png(bytes([i]) * 1000))
    return tmp_path / "photos"


@pytest.fixture
def data_set(photos, tmp_path):
    """The pictures, packed into some shards."""
    pack(photos, tmp_path / "set", shard_size=6000, block_size=3000)
    return tmp_path / "set"


@pytest.fixture
def cache(tmp_path):
    """Flags of a cache that is large enough."""
    return "--cache", str(tmp_path / "cache"), "--cache-size", "100MB"
