"""How a store is reached: URLs (parsing, redaction, root and key), storage options, and S3 credentials.

Values of options, and secrets in URLs, are never shown. A source of credentials is read again shortly before its keys
expire, every 15 minutes if their expiry is unknown, and at once when the store refuses them, because another program
may have renewed the file, the environment or the token. Profiles, roles, SSO and metadata services are botocore's.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import unquote, urlsplit

from tiercache.config import aws_ca_bundle, aws_endpoint_options, aws_keys, aws_profile
from tiercache.distribution import install_command
from tiercache.errors import StoreError
from tiercache.model import parse_bool, parse_duration
from tiercache.store.contract import check_key

# In abfss://container@account/... the "@" separates container and account, not credentials.
_AT_IS_A_PLACE = ("abfs", "abfss", "wasb", "wasbs")
_SCHEME = re.compile(r"[A-Za-z0-9+.-]+")
# The clouds of obstore by the schemes of their URLs, whose host is a bucket or a server.
CLOUDS = {
    "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "azure": "az", "http": "http", "https": "http",
}  # fmt: skip
# pathlib.Path("s3://bucket/folder") is "s3:/bucket/folder".
_BROKEN = re.compile(rf"({'|'.join((*CLOUDS, *_AT_IS_A_PLACE, 'memory', 'file'))}):/?(?!/)", re.IGNORECASE)
_CHAIN = "::"
# Default of the storage option `timeout`: longer than the restart of a store (about 10 s).
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, repr=False)
class ParsedUrl:
    """A parsed URL or local path.

    scheme: In lower case; "" for a local path. host: With userinfo and port. path: Of a URL without leading "/". chain:
    The rest after the first "::" of a URL such as "simplecache::s3://bucket/folder".
    """

    scheme: str
    host: str
    path: str
    chain: str = ""

    @classmethod
    def parse(cls, url: str | os.PathLike[str]) -> ParsedUrl:
        """Parse a URL or local path. `file://` becomes a local path, and "~/" the user's home. Raises ValueError."""
        text = os.fspath(url)
        if not text:
            raise ValueError(f"not a URL or path: {text!r}")
        first, linked, chain = text.partition(_CHAIN)
        if linked and _is_chain(first, chain):
            scheme, _, rest = first.partition("://")
            host, _, path = rest.partition("/")
            return cls(scheme.lower(), host, path, chain)
        if broken := _BROKEN.match(text):
            slashes = "///" if broken[1].lower() == "file" else "//"
            raise ValueError(
                f"{text}: a URL has {'three' if len(slashes) > 2 else 'two'} slashes after its scheme: "
                f"{broken[1]}:{slashes}{text[broken.end() :]}; pathlib.Path drops slashes, so give URLs as text (a "
                f"local folder of this name is ./{text})"
            )
        scheme, found, rest = text.partition("://")
        if not found or not _SCHEME.fullmatch(scheme):
            return cls("", "", str(Path(text).expanduser()) if text == "~" or text.startswith("~/") else text)
        host, _, path = rest.partition("/")
        if CLOUDS.get(scheme.lower()) and not host:
            place = "HOST" if CLOUDS[scheme.lower()] == "http" else "BUCKET"
            raise ValueError(f"{scheme}://{path}: it names no {place.lower()}; {scheme}://{place}/FOLDER is expected")
        if scheme.lower() != "file":
            return cls(scheme.lower(), host, path)
        if host not in ("", "localhost"):
            raise ValueError(
                f"{redact(text)}: a file URL must have three slashes (file:///folder), or name this machine"
            )
        return cls("", "", unquote("/" + path))

    def __repr__(self) -> str:
        return f"ParsedUrl({self.shown!r})"

    @property
    def shown(self) -> str:
        """URL without userinfo, query and fragment, in every link of a chain."""
        if not self.scheme:
            return self.path
        host, path = self.host, self.path
        if ":" in host and not host.rpartition(":")[2].rstrip("]").isdigit() and "@" in path:
            host, _, path = path.rpartition("@")[2].partition("/")  # a password that contains "/"
        host = re.split(r"[?#]", host, maxsplit=1)[0] if not self.chain else host
        if self.scheme not in _AT_IS_A_PLACE or ":" in host.rpartition("@")[0]:
            host = host.rpartition("@")[2]
        path = path.partition("?")[0].partition("#")[0]
        return self._joined(host, path, redact(self.chain) if "://" in self.chain else self.chain)

    @property
    def has_userinfo(self) -> bool:
        """Whether the host contains credentials: text before an "@" that is not a container name."""
        return "@" in self.host and self.scheme not in _AT_IS_A_PLACE

    @property
    def has_query(self) -> bool:
        return bool(self.scheme) and any(mark in part for mark in "?#" for part in (self.host, self.path))

    @property
    def full(self) -> str:
        """URL as given, including secrets; never shown."""
        return self._joined(self.host, self.path, self.chain) if self.scheme else self.path

    def _joined(self, host: str, path: str, chain: str) -> str:
        if not chain:
            return f"{self.scheme}://{host}/{path}".rstrip("/") if path else f"{self.scheme}://{host}"
        first = f"{self.scheme}://{host}" if host or path else self.scheme
        return f"{first}{'/' if path else ''}{path}{_CHAIN}{chain}"


def _is_chain(first: str, rest: str) -> bool:
    links = [first, *rest.split(_CHAIN)]
    return "://" in links[-1] and all(_SCHEME.fullmatch(link.partition("://")[0]) for link in links)


def redact(url: str | os.PathLike[str]) -> str:
    """Return the URL without userinfo, query and fragment, safe for messages, logs, file names and catalogs."""
    text = os.fspath(url)
    if text.lower().startswith("file://"):
        return text
    return ParsedUrl.parse(text).shown


_SECRET = re.compile(r"\?[^\s\"',)]*|(?<=://)[^/\s@\"']*@")


def hide_secrets(text: str) -> str:
    return _SECRET.sub("", text)


def split_url(url: str | os.PathLike[str]) -> tuple[str, str]:
    """Split the URL of an object into the URL of its folder and its key: ("s3://bucket/folder", "object")."""
    parsed = ParsedUrl.parse(url)
    if parsed.chain and not parsed.host and not parsed.path:  # the rest of the chain names the object
        root, key = split_url(parsed.chain)
        return f"{parsed.scheme}{_CHAIN}{root}", key
    if parsed.has_query and not parsed.chain:
        raise ValueError(f"{parsed.shown}: URLs with a query (such as presigned ones) cannot be opened")
    path = parsed.path
    if not parsed.scheme and not path.endswith("/"):
        path = os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
    folder, _, name = path.rpartition("/")
    if not name:
        raise ValueError(f"{parsed.shown}: the URL names a folder; the URL of an object is expected")
    if not parsed.scheme:
        return folder or "/", check_key(name)
    return ParsedUrl(parsed.scheme, parsed.host, folder, parsed.chain).full, check_key(name)


_WILD = frozenset("*?[")


def split_glob(text: str) -> tuple[str, list[str]]:
    """Return the root before the first segment with a wildcard, and the segments from there on."""
    scheme, _, rest = text.rpartition("://")
    segments = rest.split("/")
    wild = next((i for i, segment in enumerate(segments) if _WILD & set(segment)), len(segments))
    root = "/".join(segments[:wild]) or ("/" if wild else ".")
    return (f"{scheme}://{root}" if scheme else root), segments[wild:]


def matches_glob(segments: Sequence[str], globs: Sequence[str]) -> bool:
    """Return whether a path's segments match the globs, one each; "**" matches any number of segments."""
    if not globs:
        return not segments
    if globs[0] == "**":
        return any(matches_glob(segments[i:], globs[1:]) for i in range(len(segments) + 1))
    return bool(segments) and fnmatchcase(segments[0], globs[0]) and matches_glob(segments[1:], globs[1:])


def server_url(cloud: str, bucket: str, config: Mapping[str, Any]) -> str:
    """Return the server of a store, as far as it is known before the first request; for messages."""
    options = {**aws_endpoint_options(), **config} if cloud == "s3" else config
    given = {
        "s3": options.get("endpoint"),
        "gs": options.get("base_url"),
        "az": options.get("endpoint"),
        "http": bucket,
    }[cloud]
    if given:
        parts = urlsplit(str(given))
        if parts.scheme not in ("http", "https") or not parts.netloc:
            name = {"gs": "base_url", "s3": "endpoint or AWS_ENDPOINT_URL"}.get(cloud, "endpoint")
            raise ValueError(
                f"the endpoint of {cloud}://{bucket} must be a URL with its scheme, such as http://localhost:9000, got "
                f"{hide_secrets(str(given))!r} (storage option {name})"
            )
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    if cloud == "s3":
        return f"https://s3.{options.get('region') or 'us-east-1'}.amazonaws.com"
    if cloud == "gs":
        return "https://storage.googleapis.com"
    return f"https://{options.get('account_name', bucket)}.blob.core.windows.net"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CLIENT = _names(
    """
    allow_http allow_invalid_certificates connect_timeout default_headers pool_max_idle_per_host proxy_url read_timeout
    root_certificate user_agent
    """
)
_DURATIONS = ("connect_timeout", "read_timeout")
# Options of clients and clouds that are a bool, or text that parse_bool() accepts.
_BOOLS = _names(
    """
    allow_http allow_invalid_certificates disable_bulk_delete request_payer skip_signature use_azure_cli
    virtual_hosted_style_request
    """
)
# The usual ones. obstore reads all its others from the environment, such as AWS_S3_EXPRESS or AZURE_MSI_ENDPOINT.
_CONFIG = {
    "s3": _names(
        """
        access_key_id checksum_algorithm disable_bulk_delete endpoint region request_payer secret_access_key
        server_side_encryption session_token skip_signature sse_kms_key_id virtual_hosted_style_request
        """
    ),
    "gs": _names("service_account service_account_key base_url bearer_token application_credentials skip_signature"),
    "az": _names(
        """
        account_name account_key client_id client_secret tenant_id sas_key token endpoint use_azure_cli skip_signature
        """
    ),
    "http": frozenset[str](),
}
_S3FS = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "anon": "skip_signature",
    "endpoint_url": "endpoint",
    "requester_pays": "request_payer",
}
# A stalled connection must not hang a job: after 20 s without a byte, the request is sent again on another connection.
# `timeout` is not passed to the HTTP client: it limits a whole call, see CallLimit.
_CLIENT_DEFAULTS = {
    "read_timeout": timedelta(seconds=20),
    "connect_timeout": timedelta(seconds=5),
}
# A read ends when it stalls (stall_s). A part of an upload is 8 MiB: one that takes longer gets less than 28 KiB/s.
_LONGEST_READ, _LONGEST_PART = timedelta(hours=12), timedelta(minutes=5)
_PEM = "-----BEGIN"
_MOST_REQUESTS = 1024


CALL_OPTIONS = ("timeout", "concurrency", "single_writer")


@dataclass(frozen=True, slots=True)
class CallOptions:
    """Storage options of every remote store. timeout_s: Without progress, with retries. concurrency: Of reads."""

    timeout_s: float = TIMEOUT_S
    concurrency: int | None = None
    is_single_writer: bool = False

    @classmethod
    def take(cls, given: Mapping[str, Any]) -> tuple[CallOptions, dict[str, Any]]:
        own = {name.lower(): value for name, value in given.items() if name.lower() in CALL_OPTIONS}
        others = {name: value for name, value in given.items() if name.lower() not in CALL_OPTIONS}
        timeout, number, single = (own.get(name) for name in CALL_OPTIONS)
        if number is not None and (
            isinstance(number, bool) or not str(number).isdecimal() or not 0 < int(number) <= _MOST_REQUESTS
        ):
            raise ValueError(
                f"storage option 'concurrency' must be a whole number from 1 to {_MOST_REQUESTS}, got {number!r}"
            )
        return cls(
            TIMEOUT_S if timeout is None else _duration("timeout", timeout).total_seconds(),
            None if number is None else int(number),
            single is not None and _bool("single_writer", single),
        ), others


@dataclass(frozen=True, slots=True)
class CloudOptions:
    """Storage options with obstore's names, for the store (config) and its HTTP client.

    The client's "root_certificate" is a path. credentials: A function of the user that returns the keys.
    """

    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    client: Mapping[str, Any] = field(default_factory=dict, repr=False)
    profile: str | None = None
    credentials: Callable[[], Any] | None = field(default=None, repr=False)
    call: CallOptions = field(default_factory=CallOptions)

    @classmethod
    def parse(cls, cloud: str, given: Mapping[str, Any]) -> CloudOptions:
        config: dict[str, Any] = {}
        client: dict[str, Any] = {}
        profile = credentials = None
        call, given = CallOptions.take(given)
        for name, value in _flat(cloud, given):
            if name == "profile" and cloud == "s3":
                profile = value
            elif name == "credentials":
                if not callable(value):
                    raise ValueError(
                        f"storage option 'credentials' must be a function that returns keys, got {type(value).__name__}"
                    )
                credentials = value
            else:
                chosen, parsed = client if name in _CLIENT else config, _parsed(name, value)
                if chosen.setdefault(name, parsed) != parsed:
                    raise ValueError(f"storage option {name!r} is given twice, with different values")
        endpoint = str(config.get("endpoint", config.get("base_url", "")))
        if "allow_http" not in client:
            # The endpoint may also come from the environment, so only an https endpoint given here forbids plain http.
            client["allow_http"] = not endpoint.startswith("https:")
        bundle = aws_ca_bundle() if cloud == "s3" else None
        if bundle is not None and client.keys().isdisjoint(("root_certificate", "allow_invalid_certificates")):
            client["root_certificate"] = _certificate("AWS_CA_BUNDLE", bundle)
        return cls(config, client, profile, credentials, call)

    def _limit(self, name: str) -> timedelta:
        limits: Mapping[str, timedelta] = {**_CLIENT_DEFAULTS, **self.client}
        return min(limits[name], timedelta(seconds=self.call.timeout_s))

    @property
    def stall_s(self) -> float:
        """Seconds without a byte after which an attempt is repeated; infinite if obstore ends it, by read_timeout."""
        return math.inf if "read_timeout" in self.client else self._limit("read_timeout").total_seconds()

    def for_obstore(self) -> dict[str, Any]:
        client = {**self.client, "timeout": _LONGEST_READ, "connect_timeout": self._limit("connect_timeout")}
        if "read_timeout" in client:
            client["read_timeout"] = self._limit("read_timeout")
        if "root_certificate" in client:
            client["root_certificate"] = _read_pem("root_certificate", client["root_certificate"])
        return client

    def for_obstore_uploads(self) -> dict[str, Any]:
        """Return the options of a client that sends parts by itself, so that nothing else can end a request."""
        longest = max(_LONGEST_PART, timedelta(seconds=self.call.timeout_s))
        return {**self.for_obstore(), "timeout": longest, "read_timeout": self._limit("read_timeout")}

    def for_boto3(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arguments of boto3's client without keys, and those of its botocore.config.Config."""
        arguments = {"endpoint_url": self.config.get("endpoint"), "region_name": self.config.get("region")}
        if self.client.get("allow_invalid_certificates"):
            arguments["verify"] = False
        elif "root_certificate" in self.client:
            arguments["verify"] = self.client["root_certificate"]
        style = self.config.get("virtual_hosted_style_request")
        default = "auto" if arguments["endpoint_url"] is None else "path"
        # Only remote.py retries: a conditional put that botocore retried would find its own object and report a
        # conflict.
        proxy = self.client.get("proxy_url")
        return arguments, {
            "proxies": {"http": proxy, "https": proxy} if proxy else None,
            "retries": {"total_max_attempts": 1},
            "s3": {"addressing_style": default if style is None else "virtual" if style else "path"},
            "read_timeout": self._limit("read_timeout").total_seconds(),
            "connect_timeout": self._limit("connect_timeout").total_seconds(),
        }


def _flat(cloud: str, given: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    names = {name: name for name in _CONFIG[cloud] | _CLIENT}
    if cloud == "s3":
        names |= {**_S3FS, "profile": "profile"}
    if cloud != "http":
        names["credentials"] = "credentials"
    for given_name, value in given.items():
        lower = given_name.lower()
        name = names.get(lower)
        if name is None:
            suggestion = _near(lower, {*names, *CALL_OPTIONS})
            raise ValueError(f"unknown storage option {given_name!r} for {cloud}://{suggestion}")
        if value is not None:
            yield name, value


def _certificate(option: str, value: object) -> str:
    if not isinstance(value, str | Path):
        raise ValueError(f"{option} must be the path of a certificate file (PEM), got {type(value).__name__}")
    path = str(Path(value).expanduser().absolute())
    _read_pem(option, path)
    return path


def _read_pem(option: str, path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{option}: the certificate file {path} cannot be read: {error.strerror}") from error
    if _PEM not in text:
        raise ValueError(f"{option}: {path} contains no certificate in PEM format")
    return text


def _near(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, near))}?" if near else f"; known are {', '.join(sorted(known))}"


def _parsed(name: str, value: Any) -> Any:
    """Convert a value to what obstore accepts: durations, bools, certificate paths; other numbers become text."""
    if name == "root_certificate":
        return _certificate("storage option 'root_certificate'", value)
    if name in _DURATIONS:
        return _duration(name, value)
    if name in _BOOLS:
        # "requester" is the value of the HTTP header
        return True if name == "request_payer" and str(value).lower() == "requester" else _bool(name, value)
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _bool(name: str, value: Any) -> bool:
    try:
        return parse_bool(value)
    except ValueError as error:
        raise ValueError(f"storage option {name!r}: {error}") from None


def _duration(name: str, value: Any) -> timedelta:
    """Parse a duration: seconds as a number or as text (from the command line), or text such as "30s" or "5m"."""
    if isinstance(value, timedelta):
        return value
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = parse_duration(value)
        except ValueError:
            seconds = math.nan
    if isinstance(value, bool) or not 0 < seconds < math.inf:
        raise ValueError(f"storage option {name!r} must be a positive number of seconds or text such as '30s' or '5m'")
    return timedelta(seconds=seconds)


def plain_url(url: str) -> str:
    """Return the URL in a normal form: a local path is absolute, without links."""
    scheme, found, rest = url.partition("://")
    if found and scheme != "file":
        return url
    return os.path.realpath(unquote(rest) if found and "%" in rest else rest if found else url)


def absolute_url(url: str | os.PathLike[str]) -> str:
    """Return the URL, with an absolute path for a local one: it means the same in processes with other folders."""
    parsed = ParsedUrl.parse(url)
    return os.fspath(url) if parsed.scheme else os.path.abspath(parsed.path)  # noqa: PTH100 - resolve() follows links


def scheme_of(url: str) -> str:
    """Return the scheme of a URL in lower case; "" for a local path."""
    scheme, found, _ = url.partition("://")
    return scheme.lower() if found and scheme.lower() != "file" else ""


# Keys without a known expiry are read again after this time.
_UNDATED = timedelta(minutes=15)
# Keys with a known expiry are read again this long before it; short-lived keys after three quarters of their life.
_MARGIN = timedelta(minutes=5)
# Pause after a source has failed while its last keys are still valid.
_TRY_AGAIN = timedelta(seconds=30)
# Codes of S3 and STS for keys that are not, or no longer, valid. Statuses 401 and 403 only suggest it.
_INVALID_CODES = (
    "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "RequestExpired",
    "TokenRefreshRequired",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Keys:
    """One set of credentials. expires_at has a time zone; it is None if it is unknown, or if the keys do not expire."""

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    expires_at: datetime | None = None


class Credentials:
    """Keys of one source, which read() reads when needed. Safe for threads; each process has its own object.

    The lock is held while the source is read, so that a process is started once for all threads. number counts the
    different keys that the source has given; accepted is the number of the last keys with which a request succeeded.
    """

    def __init__(
        self,
        origin: str,
        read: Callable[[], Keys],
        url: str,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.origin, self.url = origin, url
        self._read, self._now = read, now
        self._lock = Lock()
        self._keys: Keys | None = None
        self._again_at: datetime | None = None
        self.number = self.accepted = 0

    def get(self) -> Keys:
        """Return keys that are valid now. Raises StoreError or ValueError if the source has none."""
        with self._lock:
            now = self._now()
            if self._keys is None or (self._again_at is not None and now >= self._again_at):
                return self._refresh(self._keys, now)
            return self._keys

    def renew(self, number: int) -> bool:
        """Read the source again, and return whether its keys differ from the keys with this number."""
        with self._lock:
            if self.number == number:
                self._refresh(None, self._now())
            return self.number != number

    @property
    def is_reading(self) -> bool:
        return self._lock.locked()

    def _refresh(self, last: Keys | None, now: datetime) -> Keys:
        """Read the source. The last keys stay in use if the reading fails and they are still valid."""
        try:
            keys = self._read()
            if keys.expires_at is not None and keys.expires_at <= now:
                message = f"the credentials of {self.origin} have expired, at {keys.expires_at:%Y-%m-%d %H:%M:%S %Z}"
                message += ": renew them at their source"
                raise StoreError(message, url=self.url, code="ExpiredToken", retryable=self.accepted > 0)
        except (StoreError, ValueError):
            if last is None or (last.expires_at is not None and last.expires_at <= now):
                raise
            self._again_at = now + _TRY_AGAIN
            return last
        if keys.expires_at is None:
            self._again_at = now + _UNDATED
        else:
            self._again_at = keys.expires_at - min(_MARGIN, (keys.expires_at - now) / 4)
        if keys != self._keys:
            self._keys, self.number = keys, self.number + 1
        return keys

    def for_obstore(self) -> dict[str, Any]:
        keys = self.get()
        return {
            "access_key_id": keys.access_key_id,
            "secret_access_key": keys.secret_access_key,
            "token": keys.token,
            "expires_at": (keys.expires_at or self._now() + _UNDATED).astimezone(UTC),  # obstore wants this very zone
        }


def wait_target(endpoint: str, credentials: Credentials | None) -> str:
    """Return what a call waits for now, for messages: the source of its keys while it is read, else the server."""
    return endpoint if credentials is None or not credentials.is_reading else credentials.origin


def refused_error(error: StoreError, credentials: Credentials | None, number: int) -> StoreError:
    """Return the error of a refused request with .details["renewed"] set if its source has newer keys now.

    with_retries() then makes one more attempt at once. A source of keys that were accepted may renew them late:
    then the call is retried within its time limit. number is that of the keys that signed the request.
    """
    is_invalid = error.code in _INVALID_CODES
    if credentials is None or not (error.status in (401, 403) or is_invalid):
        return error
    error.retryable = is_invalid and credentials.accepted > 0
    try:
        if credentials.renew(number):
            error.details["renewed"] = True
        elif is_invalid:
            error.message += f"; {credentials.origin} has no newer credentials"
    except (StoreError, ValueError) as failed:
        # Another program may be replacing the file: the call is retried within its time limit.
        error.message += f"; reading the credentials again failed: {failed}"
        error.retryable = True
    return error


def refused_without_source(error: StoreError, cloud: str) -> StoreError:
    """As refused_error(), where the client library obtains the credentials by itself.

    A new client obtains new ones at once; the present one keeps the refused ones until their stated end.
    """
    if error.code in _INVALID_CODES if cloud == "s3" else cloud in ("gs", "az") and error.status == 401:
        error.details["renewed"] = True
    return error


def s3_access(options: CloudOptions, url: str) -> tuple[dict[str, Any], Credentials | None]:
    """Return the options of the store without keys, and the source of the keys. Raises ValueError.

    Options take precedence over the environment, and the environment over botocore's other sources, whose region and
    endpoint the options gain. None: requests are not signed, or obstore asks the metadata service as botocore is
    missing.
    """
    config = dict(options.config)
    if options.credentials is not None:
        give = options.credentials
        origin = "the function in storage_options"
        return config, Credentials(origin, lambda: _to_keys(give(), origin, url), url)
    if {"access_key_id", "secret_access_key"} & config.keys():
        key, secret = config.pop("access_key_id", None), config.pop("secret_access_key", None)
        if not key or not secret:
            raise ValueError(f"{url}: access_key_id and secret_access_key belong together: give both")
        keys = Keys(key, secret, config.pop("session_token", None))
        return config, Credentials("storage_options", lambda: keys, url)
    if config.get("skip_signature") or (options.profile is None and aws_endpoint_options().get("skip_signature")):
        return config, None
    if options.profile is None and aws_keys() is not None:
        return config, Credentials("the environment (AWS_ACCESS_KEY_ID)", lambda: _from_environment(url), url)
    return _by_botocore(options.profile, config, url)


def _from_environment(url: str) -> Keys:
    keys = aws_keys()
    if keys is None:
        raise StoreError("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY were removed from the environment", url=url)
    return Keys(*keys)


def _to_keys(given: object, origin: str, url: str) -> Keys:
    if not isinstance(given, Mapping):
        raise StoreError(f"{origin} must return a mapping of keys, got {type(given).__name__}", url=url)

    def value(*names: str) -> Any:
        return next((given[name] for name in names if given.get(name)), None)

    key, secret = value("access_key_id", "AccessKeyId"), value("secret_access_key", "SecretAccessKey")
    if not isinstance(key, str) or not isinstance(secret, str):
        raise StoreError(f"{origin} returned no access_key_id and secret_access_key (or AccessKeyId ...)", url=url)
    expires_at = value("expires_at", "Expiration")
    if expires_at is not None and not isinstance(expires_at, datetime):
        raise StoreError(f"{origin} must return expires_at as a datetime, got {type(expires_at).__name__}", url=url)
    if expires_at is not None and expires_at.tzinfo is None:
        expires_at = expires_at.replace(tzinfo=UTC)
    return Keys(key, secret, value("token", "session_token", "SessionToken"), expires_at)


def _by_botocore(profile: str | None, config: dict[str, Any], url: str) -> tuple[dict[str, Any], Credentials | None]:
    """Return the options with region and endpoint of the profile, and botocore's credential chain."""
    named = profile or aws_profile()
    origin = f"the AWS profile {named!r}" if named else "the AWS configuration"
    try:
        botocore, providers, exceptions = (
            importlib.import_module(f"botocore.{name}") for name in ("session", "configprovider", "exceptions")
        )
    except ImportError:
        if named is None:
            return config, None
        raise ValueError(
            f"{url}: {origin} is read by botocore: {install_command('archive')}; or give access_key_id and "
            "secret_access_key in storage_options or the environment"
        ) from None

    def read() -> Keys:
        try:
            # A new session each time: an old one does not see what another program has written since.
            found = botocore.Session(profile=profile).get_credentials()
            frozen = None if found is None else found.get_frozen_credentials()
        except (exceptions.BotoCoreError, exceptions.ClientError) as error:
            answer = getattr(error, "response", {})
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            lost = isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError)
            retryable = lost or status >= 500 or status == 429
            code = answer.get("Error", {}).get("Code")
            # From None, because botocore's text may contain a signed URL.
            raise StoreError(f"{origin} gave no keys: {error}", url=url, retryable=retryable, code=code) from None
        if frozen is None:
            raise ValueError(
                f"{url}: no credentials in storage_options, in the environment, in {origin} or in the metadata service "
                "of a cloud machine; for a public bucket set the storage option anon=true"
            )
        return Keys(frozen.access_key, frozen.secret_key, frozen.token, getattr(found, "_expiry_time", None))

    try:
        session = botocore.Session(profile=profile)
        chosen = session.get_scoped_config()
        endpoints = providers.ConfiguredEndpointProvider(session.full_config, chosen, "s3")
        environment = aws_endpoint_options()
        found = {
            "region": environment.get("region") or chosen.get("region"),
            "endpoint": environment.get("endpoint") or endpoints.provide(),
        }
    except exceptions.BotoCoreError as error:
        raise ValueError(f"{url}: {origin} cannot be read: {error}") from None
    return {**{name: value for name, value in found.items() if value}, **config}, Credentials(origin, read, url)
