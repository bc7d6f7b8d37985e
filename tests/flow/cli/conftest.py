"""The command, and a data set to use it on."""

import json
from dataclasses import dataclass

import pytest
from tests.packer.pictures import png
from typer.testing import CliRunner

from tiercache.cli.app import app
from tiercache.packer import pack


@dataclass
class Result:
    """exit_code, and the lines of both streams."""

    exit_code: int
    out: str
    err: str

    @property
    def events(self):
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def tiercache():
    """Runs the command in this process."""

    def run(*arguments, code=0, stdin=None):
        done = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == code, done.output
        return Result(done.exit_code, done.stdout, done.stderr)

    return run


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
    pack(photos, tmp_path / "set", shard_size=8000, block_size=3000)
    return tmp_path / "set"
