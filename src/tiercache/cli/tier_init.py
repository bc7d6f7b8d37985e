"""The verb `tiercache tier init`; tier_commands.py has its options."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing, suppress
from pathlib import Path

from tiercache import config
from tiercache.cli.output import Output, count, printable
from tiercache.errors import NotFound
from tiercache.store import open_store
from tiercache.store.options import ParsedUrl
from tiercache.tier.rule_writer import rule_text, scan_folder
from tiercache.tier.rules import load_rule_file


def init(output: Output, folder: str, standard: str | None, archive: str | None, out: Path | None) -> None:
    """Scan a folder and write a rule file. Raises FileExistsError if there is one already."""
    target = (Path(config.FILE_NAME) if out is None else out).absolute()
    if target.exists():
        raise FileExistsError(f"{target} exists: it is not overwritten; name another file with --out")
    place = ParsedUrl.parse(folder)
    is_local = not place.scheme or place.scheme == "file"
    url = str(Path(place.path).expanduser().absolute()) if is_local else place.full.rstrip("/")
    if is_local and not Path(url).is_dir():
        raise NotFound("there is no such folder", url=url)
    if standard is not None and not is_local:
        raise ValueError(
            f"--standard: {url} is the standard tier, because it is not a local folder; give --archive only"
        )
    with closing(open_store(url)) as store:
        scan = scan_folder(store)
    disk_bytes = shutil.disk_usage(url).total if is_local else None
    given = {
        name: None if one is None else _absolute(one) for name, one in (("standard", standard), ("archive", archive))
    }
    text = rule_text(url, scan, is_local=is_local, **given, made_s=time.time(), disk_bytes=disk_bytes)
    _write(target, text)
    facts = {
        "file": str(target),
        "checkpoints": scan.n_checkpoints,
        "runs": sum(map(len, scan.runs.values())),
        "data_sets": len(scan.data_sets),
        "patterns": sorted({one for some in scan.patterns.values() for one in some}),
        "files": scan.n_files,
    }
    found = (
        f"{count(scan.n_checkpoints, 'checkpoint')}, {count(len(scan.data_sets), 'data set')}, "
        f"{count(scan.n_files, 'other file')}"
    )
    output.summary(facts, printable(f"{target}: rules for {found}; read it, then run `tiercache tier check`"))


def _absolute(url: str) -> str:
    return url if "://" in url else os.path.abspath(Path(url).expanduser())  # noqa: PTH100 - keeps the user's links


def _write(target: Path, text: str) -> None:
    """Write the file if it does not exist. A text that is not a valid rule file is a bug, and is not left behind."""
    with target.open("x", encoding="utf-8") as file:
        file.write(text)
    try:
        load_rule_file(target)
    except ValueError:
        with suppress(OSError):
            target.unlink()
        raise
