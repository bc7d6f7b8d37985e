"""The signatures, options and help texts of `tiercache tier`; see commands.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tiercache.cli.common import DryRun, Output, Rules, Yes, argument, flag, option, verb

Rows = Annotated[int, option("--rows -n", "N", "Number of moves and of refusals to show; 0: all.", min=0)]


@verb(after_ctrl_c="nothing was changed; run the same command again")
def check(
    output: Output,
    rules: Rules = None,
    prices: Annotated[bool, flag("--prices", "Print only the built-in price table.")] = False,
    offline: Annotated[bool, flag("--offline", "Only check the rule file, without reaching any tier.")] = False,
) -> None:
    """Check the rule file and its tiers, and print what rules match.

    Nothing is changed. The exit code is 1 if a tier cannot be reached or its copies cannot be seen (e.g. a disk that is
    not mounted). It is 3 if an object is lost: a data set version, the placement or this machine's catalog names it,
    but no tier has it.
    """
    from tiercache.cli import tier_verbs

    if prices:
        tier_verbs.print_prices(output)
    elif offline:
        tier_verbs.check_file(output, rules)
    else:
        tier_verbs.check_tiers(output, rules)


@verb(after_ctrl_c="nothing was changed; run the same command again")
def plan(
    output: Output,
    out: Annotated[
        Path | None,
        option("--out", "FILE", "Write the plan to FILE, for `tiercache tier apply FILE`."),
    ] = None,
    rows: Rows = 20,
    rules: Rules = None,
) -> None:
    """Show what would be moved, why, and what it costs and saves.

    Nothing is moved. Moves that are refused are shown too. With --json, all moves and refusals are printed, whatever
    --rows says.
    """
    from tiercache.cli import tier_verbs

    tier_verbs.plan(output, rules, out, rows)


@verb(after_ctrl_c="finished moves stay, nothing was lost; the same command continues from there")
def apply(
    output: Output,
    plan: Annotated[Path, argument("PLAN", "Plan file that `tiercache tier plan --out` wrote.")],
    rows: Rows = 20,
    rules: Rules = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Make the moves of a stored plan, and no others.

    A move whose objects or tiers have changed since is stopped. Without --yes, a plan that deletes more than a rule may
    (max_delete) ends with exit code 7 before anything is done. Data sets whose shards the plan moves or refuses are
    tracked from then on: machines report which shards they use. The sources of the moves are deleted later, by
    `tiercache tier run --once` after the grace period. Without --rules, the rule file is the one that the plan was made
    with.
    """
    from tiercache.cli import tier_verbs

    tier_verbs.apply(output, plan, rules, rows, yes=yes, dry_run=dry_run)


@verb(after_ctrl_c="finished moves stay, nothing was lost; the same command continues from there")
def run(
    output: Output,
    once: Annotated[bool, flag("--once", "Required: run once, and do not stay resident.")] = False,
    rows: Rows = 20,
    rules: Rules = None,
    yes: Annotated[
        bool, flag("--yes -y", "Make the deletions of this run also if a rule deletes more than its max_delete.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Plan and make all moves that are due; for schedulers.

    It finishes interrupted moves, plans, moves, and deletes sources after the grace period. It is for cron, Airflow or
    Kubernetes, and asks no questions. With --json, the last line is the summary. Exit codes: 0 done; 1 failed; 3 some
    moves were stopped (the others are done), an object is lost, or a tier cannot be seen (e.g. a disk that is not
    mounted); 5 restores are in progress; 7 nothing of the plan was done (with --dry-run: would be done), because a rule
    would delete more for good than its max_delete (half of the bytes that it matches): look at `tier plan`, and give
    --yes if it is right.
    """
    from tiercache.cli import tier_verbs

    if not once:
        raise ValueError("give --once: tiercache does not stay resident, a scheduler such as cron repeats the command")
    tier_verbs.run(output, rules, rows, yes=yes, dry_run=dry_run)


@verb(after_ctrl_c="nothing was changed; run the same command again")
def ls(
    output: Output,
    path: Annotated[
        str | None,
        argument("[PATH]", "Folder below the tiers' URLs, URL in a tier, or glob; default: all."),
    ] = None,
    rules: Rules = None,
) -> None:
    """List shards, checkpoints and files with their tiers and costs.

    Each line shows the states of the copies, the last use and the dollars per month.
    """
    from tiercache.cli import tier_verbs

    tier_verbs.ls(output, rules, path)


@verb(after_ctrl_c="requested restores go on, finished copies stay; the same command continues from there")
def get(
    output: Output,
    what: Annotated[
        list[str],
        argument(
            "PATTERN...",
            "Shards, checkpoints and files to bring back: paths below the tiers' URLs, URLs or local paths in a tier "
            "(with everything below), or globs.",
        ),
    ],
    to: Annotated[
        str | None,
        option("--to", "TIER", "Tier, or role, to copy to; default: the first tier, for shards the home tier."),
    ] = None,
    hold: Annotated[
        str | None,
        option(
            "--hold", "TIME", "How long no run moves or deletes them, e.g. 30d; default: `hold` of the rule file, 7d."
        ),
    ] = None,
    wait: Annotated[bool, flag("--wait", "Wait until archived objects are restored, then copy them.")] = False,
    speed: Annotated[str, option("--speed", "SPEED", "Speed of restores: expedited, standard or bulk.")] = "standard",
    rows: Rows = 20,
    rules: Rules = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Bring shards, checkpoints and files back from any tier.

    The command shows what would be copied and restored, with cost and time, and asks. It restores what an archive
    must restore, copies, verifies, and holds what it brought back: until the hold ends, no run of the mover moves or
    deletes it. The colder copy stays. Exit codes: 0 done; 3 some groups were refused or stopped; 5 restores are in
    progress: the same command continues.
    """
    from tiercache.cli import tier_recall

    options = tier_recall.GetOptions(to, hold, wait, speed, rows, yes, dry_run)
    tier_recall.get(output, what, rules, options)


@verb(after_ctrl_c="nothing was changed; run the same command again")
def init(
    output: Output,
    folder: Annotated[str, argument("FOLDER", "Folder or URL that is scanned: the first tier of the rule file.")],
    standard: Annotated[
        str | None, option("--standard", "URL", "Tier to which checkpoints move from FOLDER, e.g. s3://bucket/train.")
    ] = None,
    archive: Annotated[
        str | None, option("--archive", "URL", "Tier for what is rarely read, e.g. s3://bucket-cold/train.")
    ] = None,
    out: Annotated[
        Path | None, option("--out", "FILE", "File to write; default: tiercache.toml in this folder.")
    ] = None,
) -> None:
    """Scan a folder, and write a rule file with comments for what is in it.

    Nothing is moved, and no existing file is overwritten. Read the file, change it, and run `tiercache tier check`.
    """
    from tiercache.cli import tier_init

    tier_init.init(output, folder, standard, archive, out)
