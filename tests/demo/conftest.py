"""The command."""

from tests.cli.conftest import tiercache

__all__ = ["tiercache"]
