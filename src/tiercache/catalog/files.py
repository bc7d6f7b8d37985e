"""Files of a folder of our own: never opened through a link, made with the rights asked for, whatever the umask."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

# Without O_NONBLOCK a pipe under a name of ours would hold an open() for ever; regular files do not know the flag.
SAFE_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
PRIVATE = 0o600
NO_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_RIGHTS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_LONGEST_TEXT_BYTES = 1 << 20


def open_file(path: str | os.PathLike[str], flags: int, mode: int = PRIVATE, *, dir_fd: int | None = None) -> int:
    """A descriptor, closed at exec. A file that O_CREAT makes has exactly mode.

    A link that stands where a file of ours is to be made is removed: it holds no data, and nobody has to clean up.

    Raises:
        OSError: ELOOP where a link is to be read, and all else of open(2).
    """
    try:
        fd = os.open(path, flags | SAFE_FLAGS, mode, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.ELOOP or not flags & os.O_CREAT or not _is_link(path, dir_fd):
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


def _is_link(path: str | os.PathLike[str], dir_fd: int | None) -> bool:
    return stat.S_ISLNK(os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode)


def set_mode(fd: int, mode: int) -> None:
    """Give an open file or folder these rights; file systems that keep none are left as they are."""
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        try:
            os.fchmod(fd, mode)
        except OSError as error:
            if error.errno not in _NO_RIGHTS:
                raise


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a real folder, no link to one, has that name.

    Raises:
        NotADirectoryError: something else has it.
        OSError: of lstat(2), but that nothing is there.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(mode):
        what = "a symbolic link, which is never followed" if stat.S_ISLNK(mode) else "no folder"
        raise NotADirectoryError(errno.ENOTDIR, f"{what}: remove it, and it is made anew", str(path))
    return True


def make_folder(path: Path, mode: int) -> bool:
    """Make a folder with exactly these rights, and with its parents; False: it is there. Raises as is_folder()."""
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
    """A descriptor of a folder; a link to one is an error."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | SAFE_FLAGS, dir_fd=dir_fd)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a small file, at most a megabyte of it; what is no UTF-8 is replaced.

    Raises:
        OSError: nothing to be read is there, or no regular file is.
    """
    fd = open_file(path, os.O_RDONLY)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.read(fd, _LONGEST_TEXT_BYTES).decode(errors="replace")
    finally:
        os.close(fd)


def link_whole(path: Path, text: str, mode: int = PRIVATE) -> None:
    """Write a file whole unless something has its name."""
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
    """Write a file whole over what is there; a link of that name is replaced, not followed."""
    temp = _temp_beside(path, text, mode)
    try:
        temp.rename(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temp.unlink()
        raise


def pid_namespace() -> int:
    """Which numbering of processes this one lives in: containers on one machine have their own. 0: not said."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def start_time(pid: int) -> int | None:
    """When a process started, in ticks since boot: with the pid it names a process for ever. None: no such process.

    A zombie is dead: it holds nothing any more.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in brackets may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def maker_of(file: str) -> tuple[int, int] | None:
    """(pid namespace, pid) of who was writing a file that has no name yet; None: it is no such file."""
    match = re.fullmatch(r"\..+\.(\d+)-(\d+)-[0-9a-f]{8}", file)
    return match and (int(match[1]), int(match[2]))


def _temp_beside(path: Path, text: str, mode: int) -> Path:
    temp = path.with_name(f".{path.name}.{pid_namespace()}-{os.getpid()}-{secrets.token_hex(4)}")
    fd = open_file(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        data = text.encode()
        done = 0
        while done < len(data):
            done += os.write(fd, data[done:])
    except BaseException:
        with suppress(FileNotFoundError):
            temp.unlink()
        raise
    finally:
        os.close(fd)
    return temp
