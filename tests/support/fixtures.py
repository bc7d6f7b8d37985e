"""Fixtures of several areas: the root conftest.py makes this module a plugin. Their names are global.

What only some tests need is imported by its fixture: every environment of `make integration` reads this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.records import append_records

import tiercache as tc


@pytest.fixture(scope="session")
def warm_python() -> Iterator[Any]:
    """What runs Python programs without the 2 s that the import of torch takes; see tests/support/warm_python.py."""
    from tests.support.warm_python import WarmPython

    with WarmPython() as python:
        yield python


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    """A real S3 server; every test uses a folder of its own, server.store(prefix), and is marked `s3`."""
    from tests.support.s3_server import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture(scope="session")
def moto_server() -> Iterator[Any]:
    """Moto's server of S3, which knows archives and restores."""
    from tests.support.s3_server import S3Server

    with S3Server(kind="moto") as server:
        yield server


@dataclass
class Result:
    """exit_code, and the lines of both streams."""

    exit_code: int
    out: str
    err: str

    @property
    def events(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def tiercache() -> Callable[..., Result]:
    """Runs the command in this process."""
    from typer.testing import CliRunner

    from tiercache.cli.app import app

    def run(*arguments: object, code: int = 0, stdin: str | None = None) -> Result:
        done = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == code, done.output
        return Result(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that packs n records, in shards of some 100 and blocks of some 13, and gives the folder."""

    def make(n: int, name: str | None = None) -> Path:
        path = tmp_path_factory.mktemp("packed") / (name or f"of-{n}")
        schema = {"id": "int64", "values": tc.Tensor("float32", (17,))}
        with tc.Writer(path, schema=schema, shard_size="8KiB", block_size="1KiB") as writer:
            append_records(writer, 0, n)
        return path

    return make
