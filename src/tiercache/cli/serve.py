"""The verb serve: other machines of a job read the cache of this one."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import FrameType

import typer

from tiercache import config
from tiercache.cache import Cache
from tiercache.cli.common import FAILED, Output, count
from tiercache.cli.data import open_data_set_store
from tiercache.peers.server import PeerService, ServerOptions, run_service, serve, server_block, wait_until_stopped


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """Arguments of the verb `serve`."""

    urls: Sequence[str]
    address: str
    port: int
    token: str | None
    tls_cert: Path | None
    tls_key: Path | None
    socket: Path | None
    storage_options: Sequence[str] | None
    cache_dir: str | None
    cache_size: str | None


def print_config(output: Output, request: ServeRequest) -> None:
    """Print nginx's `server` block. Raises ValueError without a socket, whose path is part of the block."""
    if request.socket is None:
        raise ValueError("--print-config needs --socket PATH: `tiercache serve --socket PATH` then runs beside nginx")
    with Cache.default(path=request.cache_dir, size=request.cache_size, peers=False) as one:
        text = server_block(_server_options(one, request, request.socket))
    if output.as_json:
        output.event("config", {"nginx": text})
    else:
        typer.echo(text, nl=False)


def run(output: Output, request: ServeRequest) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        typer.Exit: With FAILED if nginx ends.
    """
    if not request.urls:
        raise ValueError("serve needs at least one DATASET: only what is named is fetched for other machines")
    size = request.cache_size
    with ExitStack() as stack, _stopped_by_sigterm() as stop:
        cache = stack.enter_context(Cache.default(path=request.cache_dir, size=size, peers=False))
        reading = stack.enter_context(Cache.default(path=request.cache_dir, size=size))
        stores = [stack.enter_context(open_data_set_store(url, request.storage_options)) for url in request.urls]
        service = PeerService(list(map(cache.store, stores)), list(map(reading.store, stores)))
        facts = {"urls": [store.url for store in stores], "cache": str(cache.path), "data_sets": len(stores)}
        what = f"{count(len(stores), 'data set')} from the cache in {cache.path}"
        if request.socket is not None:
            with run_service(cache, service, request.socket.absolute()):
                output.event("serving", facts | {"socket": str(request.socket)}, f"serving {what} at {request.socket}")
                wait_until_stopped(None, stop)
            return
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tiercache-socket-"))
        options = _server_options(cache, request, Path(folder) / "service")
        with serve(cache, service, options) as process:
            where = f"{request.address}:{request.port}"
            output.event("serving", facts | {"address": where}, f"serving {what} on {where}")
            if not wait_until_stopped(process, stop):
                typer.echo(f"tiercache: nginx ended with status {process.returncode}", err=True)
                raise typer.Exit(FAILED)


def _server_options(cache: Cache, request: ServeRequest, socket: Path) -> ServerOptions:
    token = config.load().peers_token if request.token is None else request.token
    cert, key = (None if path is None else path.absolute() for path in (request.tls_cert, request.tls_key))
    return ServerOptions(
        cache.path, socket.absolute(), cache.folder_id, request.address, request.port, token, tls_cert=cert, tls_key=key
    )


@contextmanager
def _stopped_by_sigterm() -> Iterator[Event]:
    stop = Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
