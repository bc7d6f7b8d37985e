"""Who may use the folder of a cache, and the permissions of its files.

The mode of the folder itself decides about sharing: ?750 is shared with its group, every other mode is private. One
chmod of the folder therefore ends the sharing at once, for everybody.
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
class Permissions:
    """Modes of folders, of files that change, and of complete copies."""

    folder: int
    file: int
    copy: int


PRIVATE = Permissions(0o700, 0o600, 0o400)
GROUP = Permissions(0o2750, 0o640, 0o440)


@dataclass(frozen=True, slots=True)
class FolderAccess:
    """How this user may use the folder of a cache.

    Attributes:
        rights: Permissions of new files.
        owner: Name of the other user who owns and shares the folder; None if it is this user's.
    """

    rights: Permissions
    owner: str | None = None


def folder_access(root: Path, *, shared: str | None) -> FolderAccess:
    """Return how this user may use an existing folder. Nothing is changed.

    Args:
        root: The folder. It may be a symbolic link, because the caller named it; no link below it is ever followed.
        shared: "group" lets the folder's group read it; for a folder of another user, it says that the contents are
            trusted.

    Raises:
        PermissionError: The folder belongs to another user and is not shared, or the caller did not allow a shared
            folder.
        OSError: The folder cannot be examined.
    """
    status = root.stat()
    if _is_ours(root, status):
        was_shared = status.st_mode & 0o777 == _SHARED_MODE
        return FolderAccess(GROUP if was_shared or shared == "group" else PRIVATE)
    if shared == "group" and os.access(root, os.R_OK | os.X_OK):
        return FolderAccess(GROUP, user_name(status.st_uid))
    raise PermissionError(errno.EPERM, _foreign(root, status, shared), str(root))


def _is_ours(root: Path, status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() or _squashes(root, status)


def _squashes(root: Path, status: os.stat_result) -> bool:
    """Return whether the file system assigns this user's files to the owner of the folder: then both are one user.

    NFS with all_squash, CIFS and 9p do so; a comparison of user ids alone would refuse a folder that this user created.
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
            f"has to be in that group (or {owner} changes the group with chgrp -R)"
        )
    else:
        # A mount point of root that everyone may write to has space for one; nothing can be created inside another
        # user's cache.
        own = root / me if status.st_mode & stat.S_IWOTH else f"{root}-{me}"
        fix = (
            f"choose a folder of your own, such as {own}; or, where {owner} shares it with your group on purpose "
            f"and you trust what {owner} put there, open it with shared='group'"
        )
    return f"this cache folder belongs to {owner} (uid {status.st_uid}), not to {me}; {fix}"


def user_name(uid: int) -> str:
    """Return the name of a user, or the number of a user without a name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """Return the name of a group, or the number of a group without a name."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def apply_permissions(root: Path, names: Iterable[str], rights: Permissions) -> None:
    """Create missing subfolders, and set the permissions of root and of all subfolders.

    If the permissions of a folder change, those of its files change too: a private cache becomes a shared one.

    Args:
        root: Folder of the cache.
        names: Names of the subfolders.
        rights: Permissions to set.

    Raises:
        NotADirectoryError: A link or a file has the name of a folder.
        OSError: A folder cannot be created.
    """
    is_changed = _set_folder(root.resolve(), rights)
    for name in names:
        folder = root / name
        if not make_folder(folder, rights.folder) and (_set_folder(folder, rights) or is_changed):
            _share_files(folder, rights, root.stat().st_gid)


def _set_folder(folder: Path, rights: Permissions) -> bool:
    """Set the mode of a folder; return whether it was different."""
    mode = os.lstat(folder).st_mode
    if stat.S_IMODE(mode) == rights.folder or not is_folder(folder):
        return False
    fd = open_folder(folder)
    try:
        set_mode(fd, rights.folder)
        return stat.S_IMODE(os.fstat(fd).st_mode) != stat.S_IMODE(mode)
    finally:
        os.close(fd)


def _share_files(folder: Path, rights: Permissions, gid: int) -> None:
    with os.scandir(folder) as entries:
        files = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    for name in files:
        with suppress(OSError):  # deleted meanwhile, or a file of another user, which then stays unreadable
            fd = open_file(folder / name, os.O_RDONLY)
            try:
                if rights == GROUP:
                    os.fchown(fd, -1, gid)
                is_copy = folder.name == "copies" and "." not in name
                set_mode(fd, rights.copy if is_copy else rights.file)
            finally:
                os.close(fd)
