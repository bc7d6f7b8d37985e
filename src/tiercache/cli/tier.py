"""The verbs below `tiercache tier`."""

from __future__ import annotations

from collections.abc import Callable

import typer

from tiercache.cli.failures import report_errors
from tiercache.cli.tier_apply import apply
from tiercache.cli.tier_check import check
from tiercache.cli.tier_ls import ls
from tiercache.cli.tier_plan import plan
from tiercache.cli.tier_run import run

tier = typer.Typer(help="Move shards, checkpoints and files between tiers, by rules.", no_args_is_help=True)

_AGAIN = "nothing was changed; run the same command again"
_GOES_ON = "finished moves stay, nothing was lost; the same command continues from there"
# Each verb, and the advice that follows Ctrl-C.
_VERBS: tuple[tuple[Callable[..., None], str], ...] = (
    (check, _AGAIN),
    (plan, _AGAIN),
    (apply, _GOES_ON),
    (run, _GOES_ON),
    (ls, _AGAIN),
)
for _verb, _how_to_go_on in _VERBS:
    tier.command()(report_errors(_verb, how_to_go_on=_how_to_go_on))
