"""The command."""

from tests.flow.cli.conftest import tiercache

__all__ = ["tiercache"]
