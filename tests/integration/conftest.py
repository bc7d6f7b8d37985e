"""The distributed tests' data sets."""

from tests.distributed.conftest import packed

__all__ = ["packed"]
