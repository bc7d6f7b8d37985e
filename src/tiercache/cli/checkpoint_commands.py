"""The signatures, options and help texts of `tiercache ckpt`; see commands.py."""

from __future__ import annotations

from typing import Annotated

from tiercache.cli.common import DryRun, Output, Rules, Yes, argument, flag, option, verb

_WHICH = "RUN/latest, RUN/best:METRIC[:max] and RUN/STEP select one of a run."
Paths = Annotated[
    list[str],
    argument(
        "PATH...", f"Checkpoints: paths below a tier (hot/runs/7/step-100), local paths, URLs, or globs. {_WHICH}"
    ),
]
Path = Annotated[
    str,
    argument("PATH", f"Checkpoint: a path below a tier (hot/runs/7/step-100), a local path, or a URL. {_WHICH}"),
]


@verb(after_ctrl_c="nothing was changed; run the same command again")
def ls(
    output: Output,
    paths: Annotated[
        list[str] | None,
        argument("[PATH...]", f"Runs or globs: below a tier, local, or URLs; default: all tiers. {_WHICH}"),
    ] = None,
    metrics: Annotated[bool, flag("--metrics", "Read the metrics of all listed checkpoints from their files.")] = False,
    rules: Rules = None,
) -> None:
    """List checkpoints with step, size, age, tiers and metrics, and what keeps them.

    Every layout that tiers recognise is listed. Without a rule file, PATH is a local folder or a URL.
    """
    from tiercache.cli import checkpoint_verbs

    checkpoint_verbs.ls(output, rules, paths or [], read_metrics=metrics)


@verb(after_ctrl_c="nothing was changed; run the same command again")
def show(
    output: Output,
    path: Path,
    which: Annotated[
        str | None, argument("[WHICH]", "Checkpoint of the run PATH: latest, best:METRIC[:max], a step or a name.")
    ] = None,
    rules: Rules = None,
) -> None:
    """Show one checkpoint: its copies and files, its metrics, what keeps it, and what the next plan does with it."""
    from tiercache.cli import checkpoint_verbs

    checkpoint_verbs.show(output, rules, path, which)


@verb(after_ctrl_c="nothing was changed; run the same command again")
def verify(output: Output, paths: Paths, rules: Rules = None) -> None:
    """Read checkpoints completely, in every tier that has a copy, and compare the bytes with known checksums.

    Checksums are those of checkpoint.json, of the store, of this machine's catalog, or of another copy. The exit code
    is 4 if a copy is corrupt, and 3 if a copy is incomplete or cannot be read (for example, because it is archived).
    """
    from tiercache.cli import checkpoint_verify

    checkpoint_verify.verify(output, rules, paths)


@verb(after_ctrl_c="deleted checkpoints are gone; the same command deletes the rest")
def rm(output: Output, paths: Paths, rules: Rules = None, yes: Yes = False, dry_run: DryRun = False) -> None:
    """Delete checkpoints from all tiers, at once and for good.

    Pinned and held checkpoints are refused; the exit code is then 3 (`ckpt unpin` removes a pin). The checkpoint of a
    run that was written last is deleted too if it is named, and so is one that a job reads now: reads of checkpoints
    are not known.
    """
    from tiercache.cli import checkpoint_verbs

    checkpoint_verbs.rm(output, rules, paths, yes=yes, dry_run=dry_run)


@verb(after_ctrl_c="nothing was changed; run the same command again")
def pin(
    output: Output,
    paths: Paths,
    until: Annotated[str | None, option("--until", "DATE", "Last day of the pin; default: no end.")] = None,
    why: Annotated[str, option("--why", "TEXT", "Reason, which `ckpt ls` shows.")] = "",
    rules: Rules = None,
) -> None:
    """Pin checkpoints: no rule moves or deletes them, and `ckpt rm` refuses to.

    Pins of checkpoints of tc.Checkpoints are in their folders; all others are [[pins]] tables of the rule file.
    """
    from tiercache.cli import checkpoint_verbs

    checkpoint_verbs.pin(output, rules, paths, until=until, why=why)


@verb(after_ctrl_c="nothing was changed; run the same command again")
def unpin(output: Output, paths: Paths, rules: Rules = None) -> None:
    """Remove the pins of checkpoints.

    Of a [[pins]] table of the rule file, only one that names exactly the path of the checkpoint is removed.
    """
    from tiercache.cli import checkpoint_verbs

    checkpoint_verbs.unpin(output, rules, paths)
