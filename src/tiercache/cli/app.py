"""Puts the verbs together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from tiercache.cli.demo import demo
from tiercache.cli.evict import evict, unpin
from tiercache.cli.export import export
from tiercache.cli.failures import reports_failures
from tiercache.cli.head import head
from tiercache.cli.listing import info, ls
from tiercache.cli.pack import pack
from tiercache.cli.restore import restore
from tiercache.cli.simulate import simulate
from tiercache.cli.status import status
from tiercache.cli.tier import tier
from tiercache.cli.verify import verify
from tiercache.cli.warm import pin, warm
from tiercache.version import __version__

app = typer.Typer(
    name="tiercache",
    help="Shards, a local cache and a DataLoader for training data that lives in object stores.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Each verb, and what to do after Ctrl-C.
_AGAIN = "nothing was changed; run the same command again"
_VERBS: tuple[tuple[Callable[..., None], str], ...] = (
    (pack, "nothing was committed and nothing needs to be cleaned up; run the same command again"),
    (ls, _AGAIN),
    (info, _AGAIN),
    (head, _AGAIN),
    (verify, "what was repaired is repaired, nothing else was changed; run the same command again"),
    (warm, "what was fetched stays in the cache; the same command goes on from there"),
    (evict, "what was evicted is gone from the cache, nothing else; the same command goes on from there"),
    (pin, "what was pinned stays pinned; the same command goes on from there"),
    (unpin, "what was unpinned stays so; the same command goes on from there"),
    (status, _AGAIN),
    (restore, "what was asked for is on its way, what was copied is copied; the same command goes on from there"),
    (simulate, _AGAIN),
    (demo, "everything it made is gone; run it again"),
    (export, "a file that is not whole is not left behind; run the same command again with --overwrite"),
)
for _verb, _how_to_go_on in _VERBS:
    app.command()(reports_failures(_verb, how_to_go_on=_how_to_go_on))
app.add_typer(tier, name="tier")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tiercache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command with the arguments of this process, and exit."""
    app(prog_name="tiercache")
