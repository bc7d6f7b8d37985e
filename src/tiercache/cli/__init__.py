"""The command ``tiercache``: each verb parses its arguments, calls the library and prints the result."""

from __future__ import annotations

from tiercache.cli.app import app, main

__all__ = ["app", "main"]
