"""The arguments of open_store(): URLs (parsing, redaction, root and key) and storage options of each client library.

Pure. Values of options, and secrets in URLs, are never shown.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tiercache.config import aws_endpoint_options
from tiercache.model import parse_bool, parse_bytes, parse_duration
from tiercache.store.contract import check_key
from tiercache.store.machine_limits import NO_LIMITS, StoreLimits
from tiercache.store.retry import TIMEOUT_S

# In abfss://container@account/... the "@" separates container and account, not credentials.
_AT_IS_A_PLACE = ("abfs", "abfss", "wasb", "wasbs")
_SCHEME = re.compile(r"[A-Za-z0-9+.-]+")
_CHAIN = "::"


@dataclass(frozen=True, slots=True, repr=False)
class ParsedUrl:
    """A parsed URL or local path.

    The scheme is in lower case, and "" for a local path. The host includes userinfo and port. The path of a URL has no
    leading "/". The chain is the rest after the first "::" of a URL such as "simplecache::s3://bucket/folder".
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
        scheme, found, rest = text.partition("://")
        if not found or not _SCHEME.fullmatch(scheme):
            return cls("", "", str(Path(text).expanduser()) if text == "~" or text.startswith("~/") else text)
        host, _, path = rest.partition("/")
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
        """Whether the URL has a query or fragment."""
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
    """Return whether both sides of a "::" form a chained URL: links are schemes or URLs, and the last link is a URL."""
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
    """Return the text of a message without the userinfo and query of URLs in it."""
    return _SECRET.sub("", text)


def split_url(url: str | os.PathLike[str]) -> tuple[str, str]:
    """Split the URL of an object into the root URL of its folder and its key: ("s3://bucket/folder", "object").

    Raises ValueError.
    """
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


def server_url(cloud: str, bucket: str, config: Mapping[str, Any]) -> str:
    """Return the server of a store, as far as it is known before the first request; for messages."""
    options = {**aws_endpoint_options(), **config} if cloud == "s3" else config
    given = {
        "s3": options.get("aws_endpoint_url_s3") or options.get("endpoint"),
        "gs": options.get("base_url"),
        "az": options.get("endpoint"),
        "http": bucket,
    }[cloud]
    if given:
        parts = urlsplit(str(given))
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    if cloud == "s3":
        return f"https://s3.{options.get('region') or options.get('default_region') or 'us-east-1'}.amazonaws.com"
    if cloud == "gs":
        return "https://storage.googleapis.com"
    return f"https://{options.get('account_name', bucket)}.blob.core.windows.net"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CLIENT = _names(
    """
    allow_http allow_invalid_certificates connect_timeout default_content_type default_headers http1_only
    http2_only http2_keep_alive_interval http2_keep_alive_timeout http2_keep_alive_while_idle pool_idle_timeout
    pool_max_idle_per_host proxy_url proxy_ca_certificate proxy_excludes root_certificate randomize_addresses
    read_timeout timeout user_agent
    """
)
_DURATIONS = _names(
    """
    connect_timeout http2_keep_alive_interval http2_keep_alive_timeout pool_idle_timeout read_timeout timeout
    """
)
# Options of clients and clouds that are a bool, or text that parse_bool() accepts.
_BOOLS = _names(
    """
    allow_http allow_invalid_certificates disable_bulk_delete disable_tagging http1_only
    http2_keep_alive_while_idle http2_only imdsv1_fallback randomize_addresses request_payer s3_express
    skip_signature sse_bucket_key_enabled unsigned_payload use_azure_cli use_emulator use_fabric_endpoint
    virtual_hosted_style_request
    """
)
_CONFIG = {
    "s3": _names(
        """
        access_key_id aws_endpoint_url_s3 checksum_algorithm conditional_put container_credentials_relative_uri
        container_credentials_full_uri container_authorization_token_file copy_if_not_exists default_region
        disable_tagging disable_bulk_delete endpoint imdsv1_fallback metadata_endpoint region request_payer
        role_arn role_session_name s3_express secret_access_key server_side_encryption session_token
        skip_signature sse_bucket_key_enabled sse_customer_key_base64 sse_kms_key_id sts_endpoint
        unsigned_payload virtual_hosted_style_request web_identity_token_file
        """
    ),
    "gs": _names(
        """
        service_account service_account_key base_url bearer_token application_credentials skip_signature
        """
    ),
    "az": _names(
        """
        account_name account_key client_id client_secret credential_type tenant_id authority_host sas_key token
        use_emulator use_fabric_endpoint encryption_key endpoint msi_endpoint object_id msi_resource_id
        federated_token_file use_azure_cli skip_signature disable_tagging fabric_token_service_url
        fabric_workload_host fabric_session_token fabric_cluster_identifier
        """
    ),
    "http": frozenset[str](),
}
# Prefixes of environment names, which are accepted as well: aws_region means region.
_PREFIX = {"s3": "aws_", "gs": "google_", "az": "azure_", "http": "http_"}
_S3FS = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "anon": "skip_signature",
    "endpoint_url": "endpoint",
    "requester_pays": "request_payer",
}
_CLIENT_KWARGS = {
    "endpoint_url": "endpoint",
    "region_name": "region",
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}
# Options that s3fs does not support but that change whether, where or how objects are read: never dropped silently.
_S3FS_LACKS = _names(
    """
    aws_endpoint_url_s3 container_credentials_relative_uri container_credentials_full_uri
    container_authorization_token_file s3_express server_side_encryption sse_bucket_key_enabled
    sse_customer_key_base64 sse_kms_key_id default_headers proxy_url proxy_ca_certificate proxy_excludes
    """
)
# A stalled connection must not hang a job: after 20 s without a byte, the request is sent again on another connection.
# `timeout` is not passed to the HTTP client: it limits a whole call, see CallLimit.
_CLIENT_DEFAULTS = {
    "timeout": timedelta(seconds=TIMEOUT_S),
    "read_timeout": timedelta(seconds=20),
    "connect_timeout": timedelta(seconds=5),
}
# A request is at most 8 MiB (or one small object): a request that takes longer gets less than 28 KiB/s.
_LONGEST_REQUEST = timedelta(minutes=5)
_PEM = "-----BEGIN"
_MOST_REQUESTS = 4096
# With less, a piece of a body would take longer than the timeout of a call.
_LEAST_BYTES_PER_S = 64 << 10


@dataclass(frozen=True, slots=True)
class CloudOptions:
    """Storage options with obstore's names, for the store (config) and its HTTP client.

    The client's "timeout" limits a whole call without progress, not one request; its "root_certificate" is a path or
    PEM text. credentials is a function of the user that returns the keys. single_writer says that the user promises
    that one process writes at a time. limits are those of all processes together.
    """

    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    client: Mapping[str, Any] = field(default_factory=dict, repr=False)
    profile: str | None = None
    credentials: Callable[[], Any] | None = field(default=None, repr=False)
    single_writer: bool = False
    limits: StoreLimits = NO_LIMITS

    @classmethod
    def parse(cls, cloud: str, given: Mapping[str, Any]) -> CloudOptions:
        """Validate and translate the options of the user. Raises ValueError."""
        config: dict[str, Any] = {}
        client: dict[str, Any] = {}
        profile = credentials = None
        single_writer = False
        limits, given = take_limits(given)
        for name, value in _flat(cloud, given):
            if name == "profile" and cloud == "s3":
                profile = value
            elif name == "credentials":
                if not callable(value):
                    raise ValueError(
                        f"storage option 'credentials' must be a function that returns keys, got {type(value).__name__}"
                    )
                credentials = value
            elif name == "single_writer":
                single_writer = parse_single_writer(value)
            else:
                chosen, parsed = client if name in _CLIENT else config, _parsed(name, value)
                if chosen.setdefault(name, parsed) != parsed:
                    raise ValueError(f"storage option {name!r} is given twice, with different values")
        endpoint = str(config.get("endpoint", config.get("base_url", "")))
        if "allow_http" not in client:
            # The endpoint may also come from the environment, so only an https endpoint given here forbids plain http.
            client["allow_http"] = not endpoint.startswith("https:")
        return cls(config, {**_CLIENT_DEFAULTS, **client}, profile, credentials, single_writer, limits)

    @property
    def timeout_s(self) -> float:
        """Seconds without progress after which a call fails, retries included."""
        return float(self._limit("timeout").total_seconds())

    def _limit(self, name: str) -> timedelta:
        """Return a timeout of the HTTP client, at most the timeout of the call."""
        limits: Mapping[str, timedelta] = {**_CLIENT_DEFAULTS, **self.client}
        return min(limits[name], limits["timeout"])

    def for_obstore(self) -> dict[str, Any]:
        """Return the options of obstore's HTTP client. Raises ValueError if the certificate file cannot be read."""
        client = {
            **self.client,
            "timeout": max(_LONGEST_REQUEST, self._limit("timeout")),
            "read_timeout": self._limit("read_timeout"),
            "connect_timeout": self._limit("connect_timeout"),
        }
        if "root_certificate" in client:
            client["root_certificate"] = _pem("root_certificate", client["root_certificate"])
        return client

    @property
    def ca_file(self) -> str | None:
        """Path of the certificate file; None if there is none, or if the option holds PEM text."""
        given = self.client.get("root_certificate")
        return None if given is None or _PEM in given else str(given)

    @property
    def unknown_to_s3fs(self) -> list[str]:
        """Names of the given options that matter and that for_s3fs() cannot pass on."""
        lacks = _S3FS_LACKS | (frozenset() if self.ca_file else {"root_certificate"})
        return sorted(lacks & {*self.config, *self.client})

    def for_s3fs(self) -> dict[str, Any]:
        """Return the options that s3fs supports: credentials, endpoint, region, timeouts and addressing style."""
        named = {theirs: self.config[ours] for theirs, ours in _S3FS.items() if ours in self.config}
        client_kwargs = {}
        region = self.config.get("region", self.config.get("default_region"))
        if region is not None:
            client_kwargs["region_name"] = region
        if self.client.get("allow_invalid_certificates"):
            client_kwargs["verify"] = False
        elif self.ca_file:
            client_kwargs["verify"] = self.ca_file
        s3 = {}
        if "virtual_hosted_style_request" in self.config:
            s3["addressing_style"] = "virtual" if self.config["virtual_hosted_style_request"] else "path"
        # Only retry.py retries: a conditional put that botocore retried would find its own object and report a
        # conflict.
        config_kwargs: dict[str, Any] = {"retries": {"total_max_attempts": 1}} | ({"s3": s3} if s3 else {})
        for name in ("read_timeout", "connect_timeout"):
            config_kwargs[name] = self._limit(name).total_seconds()
        named["anon"] = bool(named.get("anon"))
        return named | {"client_kwargs": client_kwargs, "config_kwargs": config_kwargs}

    def for_fsspec_http(self) -> dict[str, Any]:
        """Return the options of fsspec's HTTP file system: the headers, which may contain credentials."""
        headers = dict(self.client.get("default_headers") or {})
        if "user_agent" in self.client:
            headers["User-Agent"] = self.client["user_agent"]
        return {"headers": headers} if headers else {}


_LIMITS = ("max_requests", "max_bandwidth")
_BIT_RATE = re.compile(r"([0-9.]+) *([kmgt]?)bit(?:/s|ps)?", re.IGNORECASE)
_BIT_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def take_limits(given: Mapping[str, Any]) -> tuple[StoreLimits, dict[str, Any]]:
    """Return the limits in storage options, and the other options. Raises ValueError."""
    others = {name: value for name, value in given.items() if name.lower() not in _LIMITS}
    limits = {name.lower(): value for name, value in given.items() if name.lower() in _LIMITS and value is not None}
    n_requests, bandwidth = (limits.get(name) for name in _LIMITS)
    return StoreLimits(
        None if n_requests is None else _n_requests(n_requests),
        None if bandwidth is None else _bytes_per_s(bandwidth),
    ), others


def _n_requests(value: object) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or not 0 < int(text) <= _MOST_REQUESTS:
        raise ValueError(f"storage option 'max_requests' must be a whole number from 1 to {_MOST_REQUESTS}: {value!r}")
    return int(text)


def _bytes_per_s(value: object) -> float:
    try:
        match = _BIT_RATE.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is not None:
            bytes_per_s = float(match[1]) * _BIT_UNITS[match[2].lower()] / 8
        else:
            text = value.strip().removesuffix("/s") if isinstance(value, str) else value
            bytes_per_s = float(parse_bytes(text))  # type: ignore[arg-type]
    except (ValueError, TypeError):
        bytes_per_s = 0.0
    if isinstance(value, bool) or bytes_per_s < _LEAST_BYTES_PER_S:
        raise ValueError(
            f"storage option 'max_bandwidth' must be a bandwidth such as '5Gbit' (per second) or '600MB' (bytes per "
            f"second) of at least 64 KiB per second, got {value!r}"
        )
    return bytes_per_s


def _flat(cloud: str, given: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the options under obstore's names. Values of None are left out."""
    known = _CONFIG[cloud] | _CLIENT
    names = {name: name for name in (*known, "single_writer")}
    if cloud == "s3":
        names |= {**_S3FS, "profile": "profile", "client_kwargs": "client_kwargs"}
    if cloud != "http":
        names["credentials"] = "credentials"
    for given_name, value in given.items():
        if value is None:
            continue
        lower = given_name.lower()
        short = lower.removeprefix(_PREFIX[cloud])
        name = names.get(lower) or (short if short in known else None)
        if lower == "verify":
            yield _verify(value)
        elif name == "client_kwargs":
            yield from _client_kwargs(value)
        elif name is not None:
            yield name, value
        else:
            suggestion = _near(lower, {*names, "verify", *_LIMITS})
            raise ValueError(f"unknown storage option {given_name!r} for {cloud}://{suggestion}")


def _client_kwargs(given: object) -> Iterable[tuple[str, Any]]:
    if not isinstance(given, Mapping):
        raise ValueError(f"client_kwargs must be a dict, got {type(given).__name__}")
    for name, value in given.items():
        if name in _CLIENT_KWARGS:
            yield _CLIENT_KWARGS[name], value
        elif name == "verify":
            yield _verify(value)
        else:
            raise ValueError(f"unknown name {name!r} in client_kwargs{_near(name, {*_CLIENT_KWARGS, 'verify'})}")


def _verify(value: object) -> tuple[str, Any]:
    """Translate boto3's `verify`: a bool that enables certificate checks, or a file of trusted certificates."""
    if isinstance(value, bool) or str(value).lower() in ("true", "false"):
        return "allow_invalid_certificates", not parse_bool(value)
    return "root_certificate", _certificate("verify", value)


def _certificate(option: str, value: object) -> str:
    """Return the absolute path of a certificate file, or PEM text. Raises ValueError if it contains no certificate."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str) and _PEM in value:
        return value
    if not isinstance(value, str | Path):
        raise ValueError(f"{option} must be the path of a certificate file (PEM), got {type(value).__name__}")
    path = Path(value).expanduser().absolute()
    _pem(option, str(path))
    return str(path)


def _pem(option: str, given: str) -> str:
    """Return the PEM text, read from the file if a path is given."""
    if _PEM in given:
        return given
    try:
        text = Path(given).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{option}: the certificate file {given} cannot be read: {error.strerror}") from error
    if _PEM not in text:
        raise ValueError(f"{option}: {given} contains no certificate in PEM format")
    return text


def with_ca_bundle(options: CloudOptions, path: str | None) -> CloudOptions:
    """Return the options with the certificates of AWS_CA_BUNDLE's file, unless the options set their own."""
    if path is None or {"root_certificate", "allow_invalid_certificates"} & options.client.keys():
        return options
    return replace(options, client={**options.client, "root_certificate": _certificate("AWS_CA_BUNDLE", path)})


def _near(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, near))}?" if near else f"; known are {', '.join(sorted(known))}"


def _parsed(name: str, value: Any) -> Any:
    """Convert a value to what obstore accepts: durations, bools, certificate paths; other numbers become text."""
    if name == "root_certificate":
        return _certificate("storage option 'root_certificate'", value)
    if name in _DURATIONS:
        return parse_limit(name, value)
    if name in _BOOLS:
        if name == "request_payer" and str(value).lower() == "requester":  # the value of the HTTP header
            return True
        try:
            return parse_bool(value)
        except ValueError as error:
            raise ValueError(f"storage option {name!r}: {error}") from None
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def parse_single_writer(value: Any) -> bool:
    """Parse the storage option `single_writer`: a bool, or text that parse_bool() accepts. Raises ValueError."""
    try:
        return parse_bool(value)
    except ValueError as error:
        raise ValueError(f"storage option 'single_writer': {error}") from None


def parse_limit(name: str, value: Any) -> timedelta:
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
