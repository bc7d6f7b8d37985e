"""Settings, and everything else that is asked of the environment: this file alone reads it.

A setting comes from ``tiercache.toml``, then from ``TIERCACHE_<SETTING>`` in the environment, then from arguments; the
later wins. The file is the first one found upwards from the working folder, else the one in the user's configuration
folder. ``docs/reference/configuration.md`` lists all. (``TIERCACHE_KERNEL`` is not a setting: the native modules read
it once, when they are imported.)
"""

from __future__ import annotations

import math
import os
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tiercache.model import parse_bool, parse_bytes

FILE_NAME = "tiercache.toml"
PREFIX = "TIERCACHE_"
# Tables of the same file that tiers are made of: tierfile/ reads them.
TIER_SECTIONS = ("tiers", "rules", "pins", "tags", "tiering")
_NO_LIMIT_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a number just below 2^63


def _user_folder(variable: str, below_home: str) -> Path | None:
    """The XDG folder that variable names, for tiercache; None for a user without a home.

    A relative value counts as unset, as XDG has it.
    """
    given = Path(os.environ.get(variable, ""))
    if given.is_absolute():
        return given / "tiercache"
    try:
        return Path.home() / below_home / "tiercache"
    except RuntimeError:  # a container run under a user id that nobody has
        return None


def _default_cache_dir() -> Path:
    folder = _user_folder("XDG_CACHE_HOME", ".cache")
    if folder is None:
        raise ValueError(f"this user has no home folder for a cache: set {PREFIX}CACHE_DIR")
    return folder


class Settings(BaseModel):
    """All settings, checked.

    Attributes:
        cache_dir: folder of the default cache.
        cache_size: its budget ("200GB", "80%"); None: the cache decides.
        cache_policy: what it gives up first when it is full.
        cache_shared: "group": others of the folder's group may read it, and a folder of theirs is read; None: nobody.
        cache_trace: file to which every opening of a copy is appended, for `tiercache simulate`; None: none.
        state_dir: folder of what this machine must not lose, such as its journal of moves; None: see state_folder().
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache_dir: Path = Field(default_factory=_default_cache_dir)
    cache_size: str | None = None
    cache_policy: Literal["plan", "resident", "s3fifo", "lru"] = "plan"
    cache_shared: Literal["group"] | None = None
    cache_trace: Path | None = None
    state_dir: Path | None = None

    @field_validator("cache_size", mode="before")
    @classmethod
    def _size(cls, size: object) -> object:
        if size is None:
            return None
        if isinstance(size, bool) or not isinstance(size, int | str):
            raise ValueError(f"a size is a number of bytes or a text such as '200GB' or '80%', got {size!r}")
        parse_bytes(size, whole_bytes=1)
        return str(size)


def load(start: str | os.PathLike[str] | None = None, **overrides: object) -> Settings:
    """Settings as they hold in folder start (the working folder): file, then environment, then overrides but None.

    A relative path in the file counts from the file's folder, elsewhere from the working folder; "~" is home.

    Raises:
        ValueError: a file that is no TOML, an unknown setting, or a value that does not fit; it names the file (and for
            syntax the line), variable or argument.
    """
    values: dict[str, object] = {}
    origins: dict[str, str] = {}

    def add(name: str, value: object, origin: str, folder: Path) -> None:
        if name not in Settings.model_fields:
            raise ValueError(f"{origin}: no setting is called {name!r}; {_suggestion(name)}")
        is_path = Settings.model_fields[name].annotation in (Path, Path | None)
        values[name] = folder / Path(value).expanduser() if is_path and isinstance(value, str | os.PathLike) else value
        origins[name] = origin

    here = Path.cwd() if start is None else Path(start).absolute()
    if (path := find_file(here)) is not None:
        for name, value in parse_toml(path, read_bytes(path)).items():
            if name not in TIER_SECTIONS:
                add(name, value, str(path), path.parent)
    for name, value in _environment().items():
        add(name, value, f"environment variable {PREFIX}{name.upper()}", Path.cwd())
    for name, value in overrides.items():
        if value is not None:
            add(name, value, "argument", Path.cwd())
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        text = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{origins.get(name, 'default')}: {name}: {text}") from error


def find_file(start: Path) -> Path | None:
    """The tiercache.toml that holds for folder start: the nearest upwards, else the user's own, else None."""
    for folder in (start, *start.parents, _user_folder("XDG_CONFIG_HOME", ".config")):
        if folder is not None and os.access(folder / FILE_NAME, os.F_OK):  # False where it is closed to us, too
            return folder / FILE_NAME
    return None


def state_folder(start: str | os.PathLike[str] | None = None) -> Path:
    """Folder of what this machine must not lose: the setting state_dir, else the user's state folder. Not made here.

    Raises:
        ValueError: a user without a home who has not said where; or as load().
    """
    folder = load(start).state_dir or _user_folder("XDG_STATE_HOME", ".local/state")
    if folder is None:
        raise ValueError(f"this user has no home folder for state: set {PREFIX}STATE_DIR")
    return folder


def read_bytes(path: Path) -> bytes:
    """What a file of settings or rules holds. Raises ValueError, which names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def parse_toml(path: Path, data: bytes) -> dict[str, Any]:
    """The tables of a file's bytes. Raises ValueError, which names file, line and column."""
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error  # tomllib's message names line and column


def _environment() -> dict[str, str]:
    """Settings given by TIERCACHE_* variables. An empty one counts as unset.

    A variable that is no setting is an error only when it looks like one misspelt: Kubernetes gives every pod
    TIERCACHE_SERVICE_HOST and TIERCACHE_PORT when a service is called "tiercache", and those must not stop a job.
    """
    found: dict[str, str] = {}
    for variable, value in os.environ.items():
        name = variable.removeprefix(PREFIX).lower()
        if variable.startswith(PREFIX) and value:
            near = get_close_matches(name, Settings.model_fields, n=1, cutoff=0.8)
            if near:
                found[name] = value
    return found


def _suggestion(name: str) -> str:
    near = get_close_matches(name, Settings.model_fields, n=2, cutoff=0.6)
    near += get_close_matches(name, TIER_SECTIONS, n=1, cutoff=0.75)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "there are " + ", ".join(sorted(Settings.model_fields)) + "; tables: " + ", ".join(TIER_SECTIONS)


def distributed_environment() -> tuple[int, int, int, int] | None:
    """(rank, world size, local rank, local world size) as torchrun and other launchers set them.

    None without RANK and WORLD_SIZE. Without LOCAL_WORLD_SIZE (DeepSpeed sets LOCAL_SIZE) each rank counts as alone on
    its machine.

    Raises:
        ValueError: a variable that is not a number, or a rank that is not below its world size.
    """
    if not os.environ.get("RANK") or not os.environ.get("WORLD_SIZE"):
        return None
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    local_size = "LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    local_rank, local_world_size = 0, 1
    if os.environ.get(local_size):
        local_rank, local_world_size = _number("LOCAL_RANK", 0), _number(local_size, 1)
    ranks = (("RANK", rank, "WORLD_SIZE", world_size), ("LOCAL_RANK", local_rank, local_size, local_world_size))
    for name, member, size_name, size in ranks:
        if not 0 <= member < size:
            given = f"{name}={member} and {size_name}={size}"
            raise ValueError(f"environment variables {given}: a rank is from 0 to its world size - 1")
    return rank, world_size, local_rank, local_world_size


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "") or str(default)
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"environment variable {variable}: not a whole number: {text!r}") from error


def aws_profile() -> str | None:
    """The profile of the user's AWS files that AWS clients would use here, None where the environment gives keys.

    That is AWS_PROFILE, or "default" where there is one of the files.
    """
    named = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    if named:
        return named
    given = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    if any(os.environ.get(name) for name in (*given, "AWS_CONTAINER_CREDENTIALS_FULL_URI")) or _flag(
        "AWS_SKIP_SIGNATURE"
    ):
        return None
    return "default" if any(file.is_file() for file in aws_files()) else None


def aws_files() -> tuple[Path, Path]:
    """The user's AWS files: of configuration, and of credentials. They need not exist."""
    places = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
    config, credentials = (os.path.expanduser(os.environ.get(v) or default) for v, default in places.items())  # noqa: PTH111
    return Path(config), Path(credentials)


def aws_keys() -> tuple[str, str, str | None] | None:
    """Access key, secret key and session token of the environment as it is now; None without the first two."""
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    token = os.environ.get("AWS_SESSION_TOKEN") or os.environ.get("AWS_SECURITY_TOKEN")
    return (key, secret, token or None) if key and secret else None


def aws_web_identity() -> dict[str, str]:
    """What the environment says of a role that is taken on by a token's file, in the names of storage options."""
    names = {
        "role_arn": "AWS_ROLE_ARN",
        "web_identity_token_file": "AWS_WEB_IDENTITY_TOKEN_FILE",
        "role_session_name": "AWS_ROLE_SESSION_NAME",
        "sts_endpoint": "AWS_ENDPOINT_URL_STS",
    }
    return {name: os.environ[variable] for name, variable in names.items() if os.environ.get(variable)}


def aws_ca_bundle() -> str | None:
    """Path of the file of certificates that AWS clients trust here, None: the system's."""
    return os.environ.get("AWS_CA_BUNDLE") or None


def aws_reach() -> dict[str, Any]:
    """How AWS clients reach S3 here, in obstore's names: what the environment says, which boto3 reads by other names.

    A client that asked another server than the store does would change, or delete, objects of the same names there.
    """
    names = {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    said: dict[str, Any] = {name: next(filter(None, map(os.environ.get, given)), None) for name, given in names.items()}
    said["skip_signature"] = _flag("AWS_SKIP_SIGNATURE")
    said["virtual_hosted_style_request"] = _flag("AWS_VIRTUAL_HOSTED_STYLE_REQUEST")
    said["request_payer"] = _flag("AWS_REQUEST_PAYER", "requester")
    return {name: value for name, value in said.items() if value is not None}


def _flag(variable: str, *true: str) -> bool | None:
    """What a variable says, None where it is not set or empty. true: further texts that mean true."""
    text = os.environ.get(variable, "")
    try:
        return None if not text else text.lower() in true or parse_bool(text)
    except ValueError as error:
        raise ValueError(f"environment variable {variable}: {error}") from error


def available_cpus(root: Path = Path("/")) -> int:
    """CPUs this process may use: its affinity, cut to its cgroup's quota (rounded up). root: above /proc and /sys."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [n_cpus]
    for folder in _cgroup_folders(root, "cpu"):
        quota_us, period_us, *_ = [*_words(folder / "cpu.max"), "", ""]
        if not quota_us:
            quota_us, period_us = (
                "".join(_words(folder / "cpu.cfs_quota_us")),
                "".join(_words(folder / "cpu.cfs_period_us")),
            )
        if quota_us.isdigit() and period_us.isdigit() and int(period_us):
            quotas.append(math.ceil(int(quota_us) / int(period_us)))
    return max(1, min(quotas))


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """Memory this process may use: the smallest limit of its cgroup and those above it (v1, v2), else the machine's."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            if words and words[0].isdigit() and int(words[0]) < _NO_LIMIT_BYTES:
                limits.append(int(words[0]))
    return min(limits)


def private_bytes(root: Path = Path("/")) -> int:
    """Memory of this process that is not pages of files; 0 where the system does not say. root: above /proc."""
    try:
        with (root / "proc/self/statm").open("rb", buffering=0) as file:  # asked for each window: 5 us, as text 35
            words = file.read().split()
    except OSError:
        return 0
    return (int(words[1]) - int(words[2])) * os.sysconf("SC_PAGE_SIZE") if len(words) > 2 else 0


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's cgroups for controller and of those above them.

    Inside a container the path in /proc/self/cgroup may be the host's and not exist here; the walk upwards then ends at
    the mounted root, which is the container's own.
    """
    folders: list[Path] = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            mounted = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mounted = root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = mounted / path.lstrip("/")
        folders += [inner, *(p for p in inner.parents if p.is_relative_to(mounted))]
    return folders


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux, or a file of the other cgroup version
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
