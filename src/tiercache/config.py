"""Settings, and the only reader of the environment.

A setting comes from ``tiercache.toml``, then from the environment variable ``TIERCACHE_<SETTING>``, then from an
argument; a later source overrides an earlier one. The file is the first one found upwards from the working folder, or
else the one in the user's configuration folder. ``docs/reference/configuration.md`` lists all settings.
(``TIERCACHE_KERNEL`` is not a setting: the native modules read it once, at import.)
"""

from __future__ import annotations

import math
import os
import tomllib
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from tiercache.model import parse_bool, parse_bytes

FILE_NAME = "tiercache.toml"
PREFIX = "TIERCACHE_"
# Tables of the same file that define tiers; tier/rules.py reads them.
TIER_SECTIONS = ("tiers", "rules", "pins", "tiering")
_NO_LIMIT_BYTES = 1 << 60  # cgroup v1 reports "no limit" as a number just below 2^63


def _user_folder(variable: str, below_home: str) -> Path | None:
    given = Path(os.environ.get(variable, ""))
    if given.is_absolute():
        return given / "tiercache"
    try:
        return Path.home() / below_home / "tiercache"
    except RuntimeError:  # a container that runs under a user id without an account
        return None


def _default_cache_dir() -> Path:
    folder = _user_folder("XDG_CACHE_HOME", ".cache")
    if folder is None:
        raise ValueError(f"the user has no home folder for the cache: set {PREFIX}CACHE_DIR")
    return folder


CachePolicy: TypeAlias = Literal["plan", "lru"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, validated by read_settings().

    Attributes:
        cache_dir: Folder of the default cache.
        cache_size: Size limit of the default cache ("200GB", or "80%" of its disk); None: the cache decides.
        cache_policy: Eviction policy of the default cache.
        state_dir: Folder of state that must not be lost, such as the journal of moves; None: see state_folder().
        peers: Machines that serve their caches to each other: addresses with commas, or "dns:NAME:PORT" or "slurm";
            None: no peers.
        peers_token: Token that peers demand; None: none.
        peers_ca: File of certificates (PEM) that are trusted for peers, which are then reached by TLS; None: plain
            HTTP.
    """

    cache_dir: Path = field(default_factory=_default_cache_dir)
    cache_size: str | None = None
    cache_policy: CachePolicy = "plan"
    state_dir: Path | None = None
    peers: str | None = None
    peers_token: str | None = field(default=None, repr=False)
    peers_ca: Path | None = None


SETTINGS = tuple(setting.name for setting in fields(Settings))
_PATHS = ("cache_dir", "state_dir", "peers_ca")
CHOICES = {"cache_policy": get_args(CachePolicy)}


def _checked(name: str, value: object) -> Any:
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"must be {' or '.join(map(repr, CHOICES[name]))}, got {value!r}")
    if name in _PATHS and not isinstance(value, Path):
        raise ValueError(f"must be a path, got {value!r}")
    if name == "peers" and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    if name in ("peers", "peers_token") and not isinstance(value, str):
        raise ValueError(
            f"must be a text{' or a list of texts' if name == 'peers' else ''}, got {type(value).__name__}"
        )
    if name != "cache_size":
        return value
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"a size must be a number of bytes or a text such as '200GB' or '80%', got {value!r}")
    parse_bytes(value, whole_bytes=1)
    return str(value)


def read_settings(start: str | os.PathLike[str] | None = None, **overrides: object) -> Settings:
    """Return the settings that apply in a folder. start: Folder from which the file is searched upwards.

    A relative path in the file is relative to the file's folder; elsewhere it is relative to the working folder. "~" is
    the home folder. Overrides of None are ignored.

    Raises:
        ValueError: The file is not TOML, or a setting is unknown or has an invalid value. The message names the file
            (and the line of a syntax error), the environment variable or the argument.
    """
    values: dict[str, object] = {}
    origins: dict[str, str] = {}

    def add(name: str, value: object, origin: str, folder: Path) -> None:
        if name not in SETTINGS:
            raise ValueError(f"{origin}: unknown setting {name!r}; {_suggestion(name)}")
        if name in _PATHS and isinstance(value, str | os.PathLike):
            value = folder / Path(value).expanduser()
        values[name] = value
        origins[name] = origin

    here = Path.cwd() if start is None else Path(start).absolute()
    if (path := find_file(here)) is not None:
        for name, value in parse_toml(path, read_file(path)).items():
            if name not in TIER_SECTIONS:
                add(name, value, str(path), path.parent)
    for name, value in _environment().items():
        add(name, value, f"environment variable {PREFIX}{name.upper()}", Path.cwd())
    for name, value in overrides.items():
        if value is not None:
            add(name, value, "argument", Path.cwd())
    checked: dict[str, Any] = {}
    for name, value in values.items():
        try:
            checked[name] = _checked(name, value)
        except ValueError as error:
            raise ValueError(f"{origins[name]}: {name}: {error}") from error
    return Settings(**checked)


def find_file(start: Path) -> Path | None:
    """Return the tiercache.toml that applies in folder start: the nearest upwards, else the user's own, else None."""
    for folder in (start, *start.parents, _user_folder("XDG_CONFIG_HOME", ".config")):
        if folder is not None and os.access(folder / FILE_NAME, os.F_OK):  # also False if we have no access
            return folder / FILE_NAME
    return None


def state_folder(start: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of state that this machine must not lose. The folder is not created.

    It is the setting state_dir, or else the user's state folder. Raises ValueError.
    """
    folder = read_settings(start).state_dir or _user_folder("XDG_STATE_HOME", ".local/state")
    if folder is None:
        raise ValueError(f"the user has no home folder for state: set {PREFIX}STATE_DIR")
    return folder


def read_file(path: Path) -> bytes:
    """Return the content of a settings or rule file. Raises ValueError, which names the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def parse_toml(path: Path, data: bytes) -> dict[str, Any]:
    """Return the tables in a TOML file's bytes. Raises ValueError, which names file, line and column."""
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error  # tomllib's message names line and column


def _environment() -> dict[str, str]:
    """Return the settings that TIERCACHE_* variables give. An empty variable counts as unset.

    A variable that names no setting is an error only if it looks like a misspelt setting: Kubernetes sets
    TIERCACHE_SERVICE_HOST and TIERCACHE_PORT in every pod if a service is called "tiercache", and those must not stop a
    job.
    """
    found: dict[str, str] = {}
    for variable, value in os.environ.items():
        name = variable.removeprefix(PREFIX).lower()
        if variable.startswith(PREFIX) and value:
            near = get_close_matches(name, SETTINGS, n=1, cutoff=0.8)
            if near:
                found[name] = value
    return found


def _suggestion(name: str) -> str:
    near = get_close_matches(name, SETTINGS, n=2, cutoff=0.65)
    near += get_close_matches(name, TIER_SECTIONS, n=1, cutoff=0.75)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "the settings are " + ", ".join(sorted(SETTINGS)) + "; the tables are " + ", ".join(TIER_SECTIONS)


def distributed_environment() -> tuple[int, int, int, int] | None:
    """Return rank, world size, local rank and local world size, as torchrun and other launchers set them.

    None without RANK and WORLD_SIZE. Without LOCAL_WORLD_SIZE (DeepSpeed sets LOCAL_SIZE), each rank counts as the only
    rank of its machine. Raises ValueError.
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
            raise ValueError(f"environment variables {given}: a rank must be from 0 to its world size - 1")
    return rank, world_size, local_rank, local_world_size


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "") or str(default)
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"environment variable {variable}: not a whole number: {text!r}") from error


def slurm_hosts() -> str:
    """Return the nodes of this Slurm job, in Slurm's form; "" if there is none."""
    return os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST") or ""


def aws_profile() -> str | None:
    return os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or None


def aws_keys() -> tuple[str, str, str | None] | None:
    """Return access key, secret key and session token from the current environment; None without the first two."""
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    token = os.environ.get("AWS_SESSION_TOKEN") or os.environ.get("AWS_SECURITY_TOKEN")
    return (key, secret, token or None) if key and secret else None


def aws_ca_bundle() -> str | None:
    """Return the path of the certificate file that AWS clients trust here; None: the system's certificates."""
    return os.environ.get("AWS_CA_BUNDLE") or None


def aws_endpoint_options() -> dict[str, Any]:
    """Return how AWS clients reach S3 here, from the environment, under obstore's option names.

    boto3 reads the same settings from other variables. A client that addressed another server than the store does would
    change, or delete, objects of the same names there.
    """
    names = {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    options: dict[str, Any] = {
        name: next(filter(None, map(os.environ.get, given)), None) for name, given in names.items()
    }
    options["skip_signature"] = _bool_variable("AWS_SKIP_SIGNATURE")
    options["virtual_hosted_style_request"] = _bool_variable("AWS_VIRTUAL_HOSTED_STYLE_REQUEST")
    options["request_payer"] = _bool_variable("AWS_REQUEST_PAYER", "requester")
    return {name: value for name, value in options.items() if value is not None}


def _bool_variable(variable: str, *true: str) -> bool | None:
    """Return the boolean value of a variable; None if it is unset or empty. true: Further texts that mean true."""
    text = os.environ.get(variable, "")
    try:
        return None if not text else text.lower() in true or parse_bool(text)
    except ValueError as error:
        raise ValueError(f"environment variable {variable}: {error}") from error


def available_cpus(root: Path = Path("/")) -> int:
    """Return the CPUs that this process may use: its affinity, limited by its cgroup quota (rounded up)."""
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
    """Return the memory that this process may use: the smallest limit of its cgroups (v1, v2), or of the machine."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            words = _words(folder / name)
            if words and words[0].isdigit() and int(words[0]) < _NO_LIMIT_BYTES:
                limits.append(int(words[0]))
    return min(limits)


def private_bytes(root: Path = Path("/")) -> int:
    """Return the memory of this process without pages of files; 0 if the system does not report it."""
    try:
        with (root / "proc/self/statm").open("rb", buffering=0) as file:  # once per window: 5 us; in text mode 35 us
            words = file.read().split()
    except OSError:
        return 0
    return (int(words[1]) - int(words[2])) * os.sysconf("SC_PAGE_SIZE") if len(words) > 2 else 0


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's cgroups for controller, and of their parent cgroups.

    Inside a container, the path in /proc/self/cgroup may be the host's and not exist here; the walk upwards then ends
    at the mounted root, which is the container's own.
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
