"""The application: all verbs, and the options of the command itself.

A verb is a function with the decorator `verb` in one of the other modules of this package. Its module is imported only
when the verb is called or its help is requested, so `tiercache --help` loads nothing but typer.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tiercache.distribution import __version__

_NAME = "tiercache"

# The module of each verb below tiercache, and the first line of the docstring of its function.
VERBS = {
    "pack": ("cli.data", "Convert images, tables, text or any files into a data set."),
    "info": ("cli.data", "Show a data set's version, size and columns, or list its shards."),
    "head": ("cli.data", "Show some records of a data set."),
    "export": ("cli.data", "Write a data set as Parquet, Arrow, WebDataset, MDS or JSON lines."),
    "versions": ("cli.versions", "List the versions of a data set, with their tags."),
    "tag": ("cli.versions", "Give a version of a data set a name, or remove a name."),
    "drop": ("cli.versions", "Make a version of a data set without some records or columns."),
    "gc": ("cli.versions", "Remove what no version of a data set needs: leftovers of killed writers, old versions."),
    "verify": ("cli.cache", "Check every byte of a data set, or of copies in the cache."),
    "warm": ("cli.warm", "Copy a data set, or a part of it, from its store into the cache."),
    "evict": ("cli.cache", "Delete cached copies, least recently used first."),
    "status": ("cli.cache", "Show what the cache holds, who uses it, and damage found in it."),
    "serve": ("cli.cache", "Serve this machine's cache to the other machines of a job."),
    "simulate": ("cli.warm", "Simulate caches of several sizes: hits and bytes."),
    "demo": ("demo.story", "Demonstrate tiercache on this machine in one to three minutes."),
    "tier check": ("cli.tier", "Check the rule file and its tiers, and print what rules match."),
    "tier plan": ("cli.tier", "Show what would be moved, why, and what it costs and saves."),
    "tier apply": ("cli.tier", "Make the moves of a stored plan, and no others."),
    "tier run": ("cli.tier", "Plan and make all moves that are due; for schedulers."),
    "tier ls": ("cli.tier", "List shards, checkpoints and files with their tiers and costs."),
    "tier get": ("cli.tier_get", "Bring shards, checkpoints and files back from any tier."),
    "tier init": ("cli.tier", "Write a first rule file with comments, with a folder or URL as its first tier."),
    "ckpt ls": (
        "cli.checkpoint",
        "List checkpoints with step, size, age, tiers and metrics, and what keeps them.",
    ),
    "ckpt verify": (
        "cli.checkpoint",
        "Read checkpoints completely, in every tier that has a copy, and compare the bytes with known checksums.",
    ),
    "ckpt rm": ("cli.checkpoint", "Delete checkpoints from all tiers, at once and for good."),
    "ckpt pin": (
        "cli.checkpoint",
        "Pin checkpoints of tc.Checkpoints, in their folders: no rule moves or deletes them, and `ckpt rm` refuses to.",
    ),
    "ckpt unpin": ("cli.checkpoint", "Remove the pins of checkpoints of tc.Checkpoints."),
}


class _Group(TyperGroup):
    """A group whose commands are only lines of its help, until the module of a verb is loaded to call it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        path = f"{name}" if ctx.parent is None else f"{ctx.info_name} {name}"
        if path not in VERBS:
            return name, command, rest
        return name, load_verb(path), rest


def load_verb(path: str) -> Any:
    """Import the module of a verb, e.g. "tier plan", and return the verb as click's command."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command()(getattr(import_module(f"tiercache.{VERBS[path][0]}"), path.split()[-1]))
    return typer.main.get_command(alone)


app = typer.Typer(
    name=_NAME,
    cls=_Group,
    help="Pack training data into shards, cache it on local disks, and move it between storage tiers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
_GROUPS = {
    "": app,
    "tier": typer.Typer(
        cls=_Group, help="Move shards, checkpoints and files between tiers, by rules.", no_args_is_help=True
    ),
    "ckpt": typer.Typer(
        cls=_Group, help="List, verify, pin and delete checkpoints of every layout.", no_args_is_help=True
    ),
}
for _path, (_, _line) in VERBS.items():
    _group, _, _verb = _path.rpartition(" ")
    _GROUPS[_group].command(_verb, help=_line)(lambda: None)
app.add_typer(_GROUPS["tier"], name="tier")
app.add_typer(_GROUPS["ckpt"], name="ckpt")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tiercache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command with this process's arguments, and exit."""
    app(prog_name=_NAME)


if __name__ == "__main__":  # python -m tiercache.cli.app, where the script is not on the PATH
    main()
