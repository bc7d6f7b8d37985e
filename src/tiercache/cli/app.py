"""The application: all verbs, the options of the command itself, and shell completion."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from importlib import import_module
from typing import Annotated

import typer

from tiercache.cli import checkpoint_commands, commands, tier_commands
from tiercache.cli.output import command
from tiercache.distribution import __version__

_NAME = "tiercache"
_COMPLETE = "_TIERCACHE_COMPLETE"  # environment variable with which a shell's completion script requests completions

app = typer.Typer(
    name=_NAME,
    help="Pack training data into shards, cache it on local disks, and move it between storage tiers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # Typer's own completion options guess the shell from the parent process. They fail if it is sh (make, containers).
    add_completion=False,
)

tier = typer.Typer(help="Move shards, checkpoints and files between tiers, by rules.", no_args_is_help=True)
app.add_typer(tier, name="tier")
ckpt = typer.Typer(help="List, verify, pin, compare and delete checkpoints of every layout.", no_args_is_help=True)
app.add_typer(ckpt, name="ckpt")


# Each verb, and the advice that follows Ctrl-C.
_AGAIN = "nothing was changed; run the same command again"
_GOES_ON = "finished moves stay, nothing was lost; the same command continues from there"
_VERBS: tuple[tuple[typer.Typer, Callable[..., None], str], ...] = (
    (app, commands.pack, "nothing was committed and nothing needs to be cleaned up; run the same command again"),
    (app, commands.ls, _AGAIN),
    (app, commands.info, _AGAIN),
    (app, commands.head, _AGAIN),
    (app, commands.verify, "repaired copies stay repaired, nothing else was changed; run the same command again"),
    (app, commands.warm, "fetched shards stay in the cache; the same command continues from there"),
    (
        app,
        commands.evict,
        "evicted copies are gone from the cache, nothing else changed; the same command continues from there",
    ),
    (app, commands.pin, "pinned copies stay pinned; the same command continues from there"),
    (app, commands.unpin, "unpinned copies stay unpinned; the same command continues from there"),
    (app, commands.status, _AGAIN),
    (app, commands.serve, "the copies stay in the cache, and readers go to the stores until the command runs again"),
    (
        app,
        commands.restore,
        "requested restores go on, finished copies stay; the same command continues from there",
    ),
    (app, commands.simulate, _AGAIN),
    (app, commands.demo, "the demo removed everything that it created; run it again"),
    (app, commands.export, "no incomplete file was left behind; run the same command again with --overwrite"),
    (tier, tier_commands.check, _AGAIN),
    (tier, tier_commands.plan, _AGAIN),
    (tier, tier_commands.apply, _GOES_ON),
    (tier, tier_commands.run, _GOES_ON),
    (tier, tier_commands.ls, _AGAIN),
    (tier, tier_commands.get, "requested restores go on, finished copies stay; the same command continues from there"),
    (tier, tier_commands.init, _AGAIN),
    (ckpt, checkpoint_commands.ls, _AGAIN),
    (ckpt, checkpoint_commands.show, _AGAIN),
    (ckpt, checkpoint_commands.verify, _AGAIN),
    (ckpt, checkpoint_commands.rm, "deleted checkpoints are gone; the same command deletes the rest"),
    (ckpt, checkpoint_commands.pin, _AGAIN),
    (ckpt, checkpoint_commands.unpin, _AGAIN),
    (ckpt, checkpoint_commands.diff, _AGAIN),
)
for _group, _verb, _how_to_go_on in _VERBS:
    _group.command()(command(_verb, how_to_go_on=_how_to_go_on))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tiercache {__version__}")
        raise typer.Exit


# Typer's functions for completion are not public. They are looked up on use, so that a typer release that moves them
# breaks only completion.


class _Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def _show_completion(shell: _Shell | None) -> None:
    if shell is not None:
        script = import_module("typer._completion_shared").get_completion_script
        typer.echo(script(prog_name=_NAME, complete_var=_COMPLETE, shell=shell.value))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    show_completion: Annotated[
        _Shell | None,
        typer.Option(
            "--show-completion",
            callback=_show_completion,
            is_eager=True,
            help="Print the completion script for a shell, and exit.",
        ),
    ] = None,
) -> None:
    pass


def main() -> None:
    """Run the command with this process's arguments, and exit. Prints completions if a shell requests them."""
    with suppress(ImportError, AttributeError):
        import_module("typer._completion_classes").completion_init()
    app(prog_name=_NAME)


if __name__ == "__main__":  # python -m tiercache.cli.app, where the script is not on the PATH
    main()
