"""The verb serve: other machines of a job read the cache of this one."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Annotated

import typer

from tiercache import config
from tiercache.cache import Cache
from tiercache.cli.common import (
    FAILED,
    CacheDir,
    CacheSize,
    Output,
    StorageOptions,
    argument,
    count,
    flag,
    option,
    verb,
)
from tiercache.cli.data import open_data_set_store
from tiercache.peers import server
from tiercache.peers.server import PeerService, ServerOptions


@verb(after_ctrl_c="the copies stay in the cache, and readers go to the stores until the command runs again")
def serve(
    output: Output,
    urls: Annotated[
        list[str] | None,
        argument("DATASET...", "Data sets that other machines may read: URLs as the job's machines open them."),
    ] = None,
    address: Annotated[
        str, option("--address", "ADDRESS", "Address to listen on, e.g. that of the cluster's private network.")
    ] = "0.0.0.0",  # noqa: S104 - other machines are to reach it
    port: Annotated[int, option("--port", "N", "Port to listen on.", min=1, max=65535)] = 9740,
    token: Annotated[
        str | None,
        option(
            "--token",
            "TOKEN",
            "Token that requests must have; default: peers_token (TIERCACHE_PEERS_TOKEN), which no list of processes "
            "shows.",
        ),
    ] = None,
    tls_cert: Annotated[Path | None, option("--tls-cert", "FILE", "Certificate of the server, for TLS (PEM).")] = None,
    tls_key: Annotated[Path | None, option("--tls-key", "FILE", "Key of the certificate (PEM).")] = None,
    print_config: Annotated[
        bool, flag("--print-config", "Print a server block for the cluster's own nginx, and do nothing else.")
    ] = False,
    socket: Annotated[
        Path | None,
        option("--socket", "PATH", "Run no nginx, but only the service on this Unix socket, beside another nginx."),
    ] = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
) -> None:
    """Serve this machine's cache to the other machines of a job.

    nginx serves complete copies. A copy that the cache lacks is fetched from the data set's store once, for all
    machines that request it. Runs until SIGTERM or Ctrl-C. See docs/guide/peers.md.
    """
    if print_config and socket is None:
        raise ValueError("--print-config needs --socket PATH: `tiercache serve --socket PATH` then runs beside nginx")
    if not print_config and not urls:
        raise ValueError("serve needs at least one DATASET: only what is named is fetched for other machines")
    token = config.load().peers_token if token is None else token
    cert, key = (None if path is None else path.absolute() for path in (tls_cert, tls_key))
    with ExitStack() as stack, _stopped_by_sigterm() as stop:
        cache = stack.enter_context(Cache.default(path=cache_dir, size=cache_size, peers=False))
        path = socket
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tiercache-socket-")), "service")
        options = ServerOptions(
            cache.path, path.absolute(), cache.folder_id, address, port, token, tls_cert=cert, tls_key=key
        )
        if print_config:
            text = server.server_block(options)
            if output.as_json:
                output.event("config", {"nginx": text})
            else:
                typer.echo(text, nl=False)
            return
        reading = stack.enter_context(Cache.default(path=cache_dir, size=cache_size))
        stores = [stack.enter_context(open_data_set_store(url, storage_option)) for url in urls or ()]
        service = PeerService(list(map(cache.store, stores)), list(map(reading.store, stores)))
        facts = {"urls": [store.url for store in stores], "cache": str(cache.path), "data_sets": len(stores)}
        what = f"{count(len(stores), 'data set')} from the cache in {cache.path}"
        if socket is not None:
            with server.run_service(cache, service, path.absolute()):
                output.event("serving", facts | {"socket": str(socket)}, f"serving {what} at {socket}")
                server.wait_until_stopped(None, stop)
            return
        with server.serve(cache, service, options) as process:
            where = f"{address}:{port}"
            output.event("serving", facts | {"address": where}, f"serving {what} on {where}")
            if not server.wait_until_stopped(process, stop):
                typer.echo(f"tiercache: nginx ended with status {process.returncode}", err=True)
                raise typer.Exit(FAILED)


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
