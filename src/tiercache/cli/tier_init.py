"""The verb `tiercache tier init`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

from tiercache import config
from tiercache.cli.common import Output, argument, option, verb
from tiercache.tier.rules import load_rule_file

_TEXT = """\
# Rules of tiercache: docs/guide/tiers.md explains them. A line that begins with '#' has no effect. Nothing is moved
# before you run a command: `tiercache tier check` shows what each rule matches, `tiercache tier plan` what would be
# moved, and `tiercache tier run --once` moves it; a scheduler such as cron repeats that command.

{tiers}
[[rules]]
name = "checkpoints"
match = "checkpoints/**"            # below the URL of each tier
# checkpoint = "model_{{step}}.pt"    # describes names of your own
{keep_hot}# A keep list is a union: each of its keys keeps some. best = "val_loss:2" keeps the best two by a metric.
{no_standard}keep_standard = {{ last = 10, every_steps = 5000 }}
{no_archive}then = "archive"                    # where the others go,
{no_archive}after = "14d"                       # once they were written that long ago
# delete_after = "365d"             # deletes last copies of what no keep list names

{no_archive}[[rules]]
{no_archive}name = "data sets"
{no_archive}match = "datasets/**"
{no_archive}idle = "30d"                        # not used for this time, tracked from the first `tier run --once` on
{no_archive}to = "archive"

# [[pins]]                          # checkpoints that no rule may touch
# match = "checkpoints/run7/step-5000"
# why = "the figures of the paper"
"""


@verb(after_ctrl_c="nothing was changed; run the same command again")
def init(
    output: Output,
    folder: Annotated[str, argument("FOLDER", "Folder or URL: the first tier of the rule file.")],
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
    """Write a first rule file with comments, with a folder or URL as its first tier.

    Nothing is moved, and no existing file is overwritten. Read the file, change it, and run `tiercache tier check`.
    """
    target = (Path(config.FILE_NAME) if out is None else out).absolute()
    is_local = "://" not in folder
    if standard is not None and not is_local:
        raise ValueError(f"--standard: {folder} is the standard tier, as it is not a local folder: give --archive only")
    first = _tier("hot" if is_local else "standard", folder)
    others = [_tier("standard", standard)] if is_local else []
    no_standard = "# " if is_local and standard is None else ""
    text = _TEXT.format(
        tiers="\n".join([first, *others, _tier("archive", archive)]),
        keep_hot="keep_hot = { last = 2 }             # to resume from; the others move to the next tier\n"
        if is_local
        else "",
        no_standard=no_standard,
        no_archive="# " if archive is None or no_standard else "",
    )
    with target.open("x", encoding="utf-8") as file:
        file.write(text)
    load_rule_file(target)
    output.summary({"file": str(target)}, f"{target}: read it, change it, then run `tiercache tier check`")


def _tier(name: str, url: str | None) -> str:
    """Return the table of a tier; without a URL, as a comment."""
    known = url or {"standard": "s3://BUCKET/train", "archive": "s3://BUCKET-cold/train"}[name]
    lines = [f"[tiers.{name}]"]
    if "://" in known:
        storage_class = {"standard": "STANDARD", "archive": "GLACIER_IR"}[name]
        lines.append(f"url = {json.dumps(known, ensure_ascii=False)}")
        if known.startswith("s3://"):
            lines += ['storage_class = "GLACIER_IR"'] if name == "archive" else []
            lines.append(f'prices = "aws:us-east-1:{storage_class}"   # see `tiercache tier check --prices`')
    else:
        path = os.path.abspath(Path(known).expanduser())  # noqa: PTH100 - keeps the user's links
        lines.append(f"url = {json.dumps(path, ensure_ascii=False)}")
        lines += (
            ['# capacity = "80%"   # above 90 % of it, the least recently used moves down'] if name == "hot" else []
        )
    return "".join(f"{'' if url else '# '}{line}\n" for line in lines)
