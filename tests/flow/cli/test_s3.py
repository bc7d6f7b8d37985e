"""The whole way through the command, against a real S3 server."""

import subprocess
import sys

import pytest


@pytest.mark.s3
def test_pack_verify_warm_head_and_export_through_s3(tiercache, photos, s3_server, tmp_path):
    url = f"{s3_server.url}/cli/photos"
    options = [f for key, value in s3_server.storage_options.items() for f in ("--storage-option", f"{key}={value}")]
    command = [sys.executable, "-m", "tiercache.cli.app", "pack", photos, url, "-w", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert tiercache("verify", url, *options, "--json").events[-1]["damaged"] == 0
    cache = ["--cache", tmp_path / "cache", "--cache-size", "100MB"]
    assert tiercache("warm", url, *options, *cache, "--json").events[-1]["fetched"] == 2
    assert tiercache("status", *cache, "--json").events[0]["url"] == url
    assert tiercache("head", url, *options, "--start", "19", "--json").events[0]["record"]["path"] == "dog/9.png"
    target = f"{s3_server.url}/cli/out.parquet"
    to = ["--target-option" if f == "--storage-option" else f for f in options]
    tiercache("export", url, target, *options, *to)
    from_s3 = ["--source-option" if f == "--storage-option" else f for f in options]
    tiercache("pack", target, tmp_path / "again", *from_s3)
    assert tiercache("info", tmp_path / "again", "--json").events[0]["records"] == 20
    assert tiercache("evict", url, *options, *cache, "-y", "--json").events[-1]["left"] == 0
