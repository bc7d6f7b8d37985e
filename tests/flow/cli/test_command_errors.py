"""What a verb says when Ctrl-C strikes it."""

import logging
from pathlib import Path

import pytest
import typer
from tests.support.http_server import HttpFault, HttpFaultServer

import tiercache as tc
from tiercache.cli.common import INTERRUPTED, name_flags, verb
from tiercache.errors import StoreError
from tiercache.store import remote


def test_ctrl_c_prints_how_to_go_on(capsys):
    @verb(after_ctrl_c="nothing was committed")
    def run(output):
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended:
        run()
    assert (ended.value.exit_code, capsys.readouterr().err) == (
        INTERRUPTED,
        "tiercache: interrupted: nothing was committed\n",
    )


@pytest.fixture
def nobody(monkeypatch):
    """The URL of a server that is gone; a call that pauses before another attempt fails the test."""

    def paused(*_args):
        raise AssertionError("the command must not try again")

    monkeypatch.setattr(remote, "pause", paused)
    with HttpFaultServer() as server:
        return server.url


@pytest.mark.parametrize("verb", ["info", "verify", "warm"])
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_verb_fails_at_once_and_names_the_endpoint_if_no_server_listens(tiercache, nobody, tmp_path, verb, scheme):
    url = "s3://bucket/set" if scheme == "s3" else f"{nobody}/set"
    options = [f"endpoint={nobody}", "anon=true"] if scheme == "s3" else []
    more = ["--cache", tmp_path / "cache"] if verb == "warm" else []
    given = [word for option in options for word in ("--storage-option", option)]
    assert f"cannot connect to {nobody}" in tiercache(verb, url, *given, *more, code=1).err


def test_a_server_that_answers_every_request_ends_the_command_and_a_data_set(tiercache):
    with HttpFaultServer() as server:
        server.when(lambda method, path: HttpFault("status", 200, body=b"<html>log in</html>"))
        assert "the server answers every request alike" in tiercache("info", server.url, code=1).err
        with pytest.raises(StoreError, match="the server answers every request alike"):
            tc.Dataset(server.url, cache=False)


def test_tier_ls_fails_at_once_if_no_server_listens(tiercache, nobody, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", nobody)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("TIERCACHE_STATE_DIR", str(tmp_path / "state"))
    rules = tmp_path / "tiercache.toml"
    rules.write_text('[tiers.hot]\nurl = "s3://bucket/hot"\n[tiers.standard]\nurl = "s3://bucket/cold"\n')
    assert nobody in tiercache("tier", "ls", "--rules", rules, code=1).err


def test_log_warnings_are_printed_on_standard_error(capsys):
    @verb(after_ctrl_c="")
    def run(output):
        logging.getLogger("tiercache").warning("s3://bucket: has waited %d s", 2)

    run()
    assert capsys.readouterr().err == "tiercache: warning: s3://bucket: has waited 2 s\n"
    assert not logging.getLogger("tiercache").handlers


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ('write with mode="append", or exclude=', "write with --mode append, or --exclude"),
        ("leave it out with exclude=['a b']", "leave it out with --exclude 'a b'"),
        ("give schema={'x': 'str?'} or overwrite=True", "give --column 'x=str?' or --overwrite"),
        ("mode must be 'create', got mode=3", "--mode must be 'create', got --mode 3"),
        ("a mode of x.mode=3 and schema={\"it's\": 'str'}", "a mode of x.mode=3 and schema={\"it's\": 'str'}"),
    ],
)
def test_arguments_that_a_message_names_become_flags(said, shown):
    flags = {"mode": "--mode", "exclude": "--exclude", "schema": "--column", "overwrite": "--overwrite"}
    assert name_flags(said, flags) == shown


def test_a_missing_file_is_named_without_the_number_of_the_error(capsys):
    @verb(after_ctrl_c="")
    def run(output):
        (Path("no") / "file").read_bytes()

    with pytest.raises(typer.Exit):
        run()
    assert capsys.readouterr().err == "tiercache: error: no/file: No such file or directory\n"
