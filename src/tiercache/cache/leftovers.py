"""The sweep of temporary files whose writers died before they renamed them."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from tiercache.catalog.files import maker_of, pid_namespace, start_time

if TYPE_CHECKING:
    from tiercache.cache.folder import Folder

# A small file is written in microseconds. An older temporary file has lost its writer, even if a process with that
# number runs again.
OLD_S = 600.0


def sweep_temp_files(folder: Folder) -> None:
    """Remove temporary files whose writers no longer run, or that are older than OLD_S. Raises OSError."""
    for below in ("", *folder.BELOW):
        with suppress(FileNotFoundError):
            for file in os.listdir(folder.root / below):  # noqa: PTH208 - names, thousands of them
                if file.startswith(".") and _is_left(folder, below, file):
                    folder.remove_file(below, file)


def _is_left(folder: Folder, below: str, file: str) -> bool:
    maker = maker_of(file)
    if maker is None:
        return False
    if maker[0] == pid_namespace() and start_time(maker[1]) is None:
        return True
    try:
        return abs(time.time() - (folder.root / below / file).lstat().st_mtime) > OLD_S
    except FileNotFoundError:
        return False
