"""The command: one verb a job. Parses, calls, prints."""

from __future__ import annotations

from tiercache.cli.app import app, main

__all__ = ["app", "main"]
