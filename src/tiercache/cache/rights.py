"""Who may use a cache's folder, and with which rights its files are made.

The folder's own mode is the one truth about sharing: ?750 is shared with its group, all else is private. So one chmod
of the folder takes the sharing back, at once and for everybody.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiercache.catalog.files import is_folder, make_folder, open_file, open_folder, set_mode

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_SHARED_MODE = 0o750


@dataclass(frozen=True, slots=True)
class Rights:
    """Modes of folders, of files that change, and of finished copies."""

    folder: int
    file: int
    copy: int


PRIVATE = Rights(0o700, 0o600, 0o400)
GROUP = Rights(0o2750, 0o640, 0o440)


@dataclass(frozen=True, slots=True)
class Standing:
    """How this user stands to a cache's folder. owner: name of somebody else, who shares it; None: it is his own."""

    rights: Rights
    owner: str | None = None


def standing(root: Path, *, shared: str | None) -> Standing:
    """How this user stands to a folder that exists. Nothing is changed.

    root may be reached through a link, which is the caller's own word; no link below it is ever followed. shared:
    "group" lets the folder's group read it; of somebody else's folder it says that its contents are trusted.

    Raises:
        PermissionError: it is somebody else's, and not shared, or the caller does not say that it may be.
        OSError: it cannot be looked at.
    """
    status = root.stat()
    if _is_ours(root, status):
        was_shared = status.st_mode & 0o777 == _SHARED_MODE
        return Standing(GROUP if was_shared or shared == "group" else PRIVATE)
    if shared == "group" and os.access(root, os.R_OK | os.X_OK):
        return Standing(GROUP, user_name(status.st_uid))
    raise PermissionError(errno.EPERM, _foreign(root, status, shared), str(root))


def _is_ours(root: Path, status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() or _squashes(root, status)


def _squashes(root: Path, status: os.stat_result) -> bool:
    """Whether the file system gives what this user makes to the folder's owner: then he is that owner, as it sees it.

    NFS with all_squash, CIFS and 9p mounts do so; comparing numbers alone would refuse a folder that we have made.
    """
    probe = root / f".probe.0-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        fd = open_file(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except OSError:
        return False
    try:
        return os.fstat(fd).st_uid == status.st_uid
    finally:
        os.close(fd)
        with suppress(OSError):
            probe.unlink()


def _foreign(root: Path, status: os.stat_result, shared: str | None) -> str:
    owner, me = user_name(status.st_uid), user_name(os.geteuid())
    if shared == "group":
        mode, group = stat.S_IMODE(status.st_mode), group_name(status.st_gid)
        fix = (
            f"its mode is {mode:04o} and its group {group}: {owner} has to open it with shared='group' first, and {me} "
            f"has to be in that group (else {owner} gives it to another: chgrp -R)"
        )
    else:
        # A mount point of root's that is open to all has room for one; inside somebody's cache nothing can be made.
        own = root / me if status.st_mode & stat.S_IWOTH else f"{root}-{me}"
        fix = (
            f"choose a folder of your own, such as {own}; or, where {owner} shares it with your group on purpose "
            f"and you trust what {owner} put there, open it with shared='group'"
        )
    return f"this cache folder belongs to {owner} (uid {status.st_uid}), not to {me}; {fix}"


def user_name(uid: int) -> str:
    """A user's name, his number where he has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """A group's name, its number where it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def put_right(root: Path, names: Iterable[str], rights: Rights) -> None:
    """Make folders of these names in root where they are missing, and give root and all of them their rights.

    What is in a folder whose rights were others gets its own too: so a cache becomes shared that was not.

    Raises:
        NotADirectoryError: a link, or a file, stands where a folder should.
        OSError: they cannot be made.
    """
    is_changed = _set_folder(root.resolve(), rights)
    for name in names:
        folder = root / name
        if not make_folder(folder, rights.folder) and (_set_folder(folder, rights) or is_changed):
            _share_files(folder, rights, root.stat().st_gid)


def _set_folder(folder: Path, rights: Rights) -> bool:
    """Give a folder its rights; whether it had others."""
    mode = os.lstat(folder).st_mode
    if stat.S_IMODE(mode) == rights.folder or not is_folder(folder):
        return False
    fd = open_folder(folder)
    try:
        set_mode(fd, rights.folder)
        return stat.S_IMODE(os.fstat(fd).st_mode) != stat.S_IMODE(mode)
    finally:
        os.close(fd)


def _share_files(folder: Path, rights: Rights, gid: int) -> None:
    with os.scandir(folder) as entries:
        files = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    for name in files:
        with suppress(OSError):  # gone meanwhile, or left by another user: it is then not to be read
            fd = open_file(folder / name, os.O_RDONLY)
            try:
                if rights == GROUP:
                    os.fchown(fd, -1, gid)
                is_copy = folder.name == "copies" and "." not in name
                set_mode(fd, rights.copy if is_copy else rights.file)
            finally:
                os.close(fd)
