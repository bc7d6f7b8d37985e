"""Files of a private folder, which are never opened through a symbolic link and have the requested permissions.

The module also identifies processes, which the names and texts of such files contain.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

# Without O_NONBLOCK, a named pipe under one of our names would block open() for ever. Regular files ignore the flag.
SAFE_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
PRIVATE = 0o600
NO_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_RIGHTS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_LONGEST_TEXT_BYTES = 1 << 20


def open_file(path: str | os.PathLike[str], flags: int, mode: int = PRIVATE, *, dir_fd: int | None = None) -> int:
    """Return a descriptor that is closed at exec. A file that O_CREAT makes has exactly `mode`.

    A link in the place of a file that is to be made is removed: it holds no data.

    Raises:
        OSError: ELOOP if an existing link would be read; otherwise the errors of open(2).
    """
    try:
        fd = os.open(path, flags | SAFE_FLAGS, mode, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.ELOOP or not flags & os.O_CREAT:
            raise
        if not stat.S_ISLNK(os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode):
            raise
        os.unlink(path, dir_fd=dir_fd)
        fd = os.open(path, flags | SAFE_FLAGS, mode, dir_fd=dir_fd)
    if flags & os.O_CREAT:
        try:
            set_mode(fd, mode)
        except BaseException:
            os.close(fd)
            raise
    return fd


def set_mode(fd: int, mode: int) -> None:
    """Set the mode of an open file or folder. Ignored on file systems without modes."""
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        try:
            os.fchmod(fd, mode)
        except OSError as error:
            if error.errno not in _NO_RIGHTS:
                raise


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether path is a real folder, not a link to one; False if it does not exist.

    Raises:
        NotADirectoryError: Path is something else.
        OSError: Other errors of lstat(2).
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(mode):
        what = "a symbolic link, which is never followed" if stat.S_ISLNK(mode) else "not a folder"
        raise NotADirectoryError(errno.ENOTDIR, f"{what}: remove it, and it is made again", str(path))
    return True


def make_folder(path: Path, mode: int) -> bool:
    """Make a folder with exactly this mode, and its parents. Return False if it exists. Raises as is_folder()."""
    if is_folder(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return not is_folder(path)
    fd = open_folder(path)
    try:
        set_mode(fd, mode)
    finally:
        os.close(fd)
    return True


def open_folder(path: str | os.PathLike[str], *, dir_fd: int | None = None) -> int:
    """Return a descriptor of a folder. A link to a folder is an error."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | SAFE_FLAGS, dir_fd=dir_fd)


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a small file, at most 1 MiB of it. Bytes that are not UTF-8 are replaced.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
    """
    fd = open_file(path, os.O_RDONLY)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.read(fd, _LONGEST_TEXT_BYTES).decode(errors="replace")
    finally:
        os.close(fd)


def link_whole(path: Path, text: str, mode: int = PRIVATE) -> None:
    """Write a complete file, unless the name is taken."""
    temp = _temp_beside(path, text, mode)
    try:
        os.link(temp, path, follow_symlinks=False)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        temp.rename(path)
    finally:
        with suppress(FileNotFoundError):
            temp.unlink()


def replace_whole(path: Path, text: str, mode: int = PRIVATE) -> None:
    """Write a complete file, replacing the old one; a link of that name is replaced, not followed."""
    temp = _temp_beside(path, text, mode)
    try:
        temp.rename(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temp.unlink()
        raise


def pid_namespace() -> int:
    """Return the id of this process's pid namespace, which differs between containers; 0 if unknown."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def start_time(pid: int) -> int | None:
    """Return the start time of a process, in ticks since boot; None if there is no such process.

    The pid and the start time together identify a process for ever. A zombie counts as dead: it holds nothing any more.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may contain anything
    return None if fields[0] in "ZX" else int(fields[19])


def maker_of(file: str) -> tuple[int, int] | None:
    """Return (pid namespace, pid) of the writer of a temporary file; None if the name is not a temporary one."""
    match = re.fullmatch(r"\..+\.(\d+)-(\d+)-[0-9a-f]{8}", file)
    return match and (int(match[1]), int(match[2]))


def _temp_beside(path: Path, text: str, mode: int) -> Path:
    temp = path.with_name(f".{path.name}.{pid_namespace()}-{os.getpid()}-{secrets.token_hex(4)}")
    fd = open_file(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode())
    except BaseException:
        with suppress(FileNotFoundError):
            temp.unlink()
        raise
    return temp


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of an open file. Return False if another process holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without flock
        return True
    return True
