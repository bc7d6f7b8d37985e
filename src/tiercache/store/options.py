"""The arguments of open_store(): URLs (parsing, redaction, root and key) and storage options of each client library.

Pure. Values of options, and secrets in URLs, are never shown.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tiercache.config import aws_ca_bundle, aws_endpoint_options
from tiercache.model import parse_bool, parse_duration
from tiercache.store.contract import check_key

# In abfss://container@account/... the "@" separates container and account, not credentials.
_AT_IS_A_PLACE = ("abfs", "abfss", "wasb", "wasbs")
_SCHEME = re.compile(r"[A-Za-z0-9+.-]+")
_CHAIN = "::"
# Default of the storage option `timeout`: longer than the restart of a store (about 10 s).
TIMEOUT_S = 60.0


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
        "s3": options.get("endpoint"),
        "gs": options.get("base_url"),
        "az": options.get("endpoint"),
        "http": bucket,
    }[cloud]
    if given:
        parts = urlsplit(str(given))
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
    allow_http allow_invalid_certificates connect_timeout default_content_type default_headers http1_only
    http2_only http2_keep_alive_interval http2_keep_alive_timeout http2_keep_alive_while_idle pool_idle_timeout
    pool_max_idle_per_host proxy_url proxy_ca_certificate proxy_excludes root_certificate randomize_addresses
    read_timeout user_agent
    """
)
_DURATIONS = _names(
    """
    connect_timeout http2_keep_alive_interval http2_keep_alive_timeout pool_idle_timeout read_timeout
    """
)
# Options of clients and clouds that are a bool, or text that parse_bool() accepts.
_BOOLS = _names(
    """
    allow_http allow_invalid_certificates disable_bulk_delete disable_tagging http1_only
    http2_keep_alive_while_idle http2_only randomize_addresses request_payer s3_express
    skip_signature sse_bucket_key_enabled unsigned_payload use_azure_cli use_emulator use_fabric_endpoint
    virtual_hosted_style_request
    """
)
_CONFIG = {
    "s3": _names(
        """
        access_key_id checksum_algorithm conditional_put copy_if_not_exists disable_bulk_delete disable_tagging endpoint
        region request_payer s3_express secret_access_key server_side_encryption session_token skip_signature
        sse_bucket_key_enabled sse_customer_key_base64 sse_kms_key_id unsigned_payload virtual_hosted_style_request
        """
    ),
    "gs": _names("service_account service_account_key base_url bearer_token application_credentials skip_signature"),
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
# Options that boto3 does not support but that change where or how objects are read: never dropped silently.
_BOTO3_LACKS = _names(
    "s3_express sse_customer_key_base64 default_headers proxy_url proxy_ca_certificate proxy_excludes"
)
# A stalled connection must not hang a job: after 20 s without a byte, the request is sent again on another connection.
# `timeout` is not passed to the HTTP client: it limits a whole call, see CallLimit.
_CLIENT_DEFAULTS = {
    "read_timeout": timedelta(seconds=20),
    "connect_timeout": timedelta(seconds=5),
}
# A request is at most 8 MiB (or one small object): a request that takes longer gets less than 28 KiB/s.
_LONGEST_REQUEST = timedelta(minutes=5)
_PEM = "-----BEGIN"
_MOST_REQUESTS = 1024


CALL_OPTIONS = ("timeout", "concurrency", "single_writer")


@dataclass(frozen=True, slots=True)
class CallOptions:
    """Storage options of every remote store.

    Attributes:
        timeout_s: Seconds without progress after which a call fails, retries included.
        concurrency: Number of read requests that run at once.
        is_single_writer: Whether the user promises that one process writes at a time.
    """

    timeout_s: float = TIMEOUT_S
    concurrency: int | None = None
    is_single_writer: bool = False

    @classmethod
    def take(cls, given: Mapping[str, Any]) -> tuple[CallOptions, dict[str, Any]]:
        """Return these options, and the others. Raises ValueError."""
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

    The client's "timeout" limits a whole call without progress, not one request; its "root_certificate" is a path or
    PEM text. credentials is a function of the user that returns the keys.
    """

    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    client: Mapping[str, Any] = field(default_factory=dict, repr=False)
    profile: str | None = None
    credentials: Callable[[], Any] | None = field(default=None, repr=False)
    call: CallOptions = field(default_factory=CallOptions)

    @classmethod
    def parse(cls, cloud: str, given: Mapping[str, Any]) -> CloudOptions:
        """Validate and translate the options of the user. Raises ValueError."""
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
        """Return a timeout of the HTTP client, at most the timeout of the call."""
        limits: Mapping[str, timedelta] = {**_CLIENT_DEFAULTS, **self.client}
        return min(limits[name], timedelta(seconds=self.call.timeout_s))

    def for_obstore(self) -> dict[str, Any]:
        """Return the options of obstore's HTTP client. Raises ValueError if the certificate file cannot be read."""
        client = {
            **self.client,
            "timeout": max(_LONGEST_REQUEST, timedelta(seconds=self.call.timeout_s)),
            "read_timeout": self._limit("read_timeout"),
            "connect_timeout": self._limit("connect_timeout"),
        }
        if "root_certificate" in client:
            client["root_certificate"] = _pem("root_certificate", client["root_certificate"])
        return client

    @property
    def unknown_to_boto3(self) -> list[str]:
        """Names of the given options that matter and that boto3 lacks."""
        is_text = _PEM in str(self.client.get("root_certificate", ""))
        return sorted((_BOTO3_LACKS | ({"root_certificate"} if is_text else set())) & {*self.config, *self.client})

    def for_boto3(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arguments of boto3's client without keys, and those of its botocore.config.Config."""
        arguments = {"endpoint_url": self.config.get("endpoint"), "region_name": self.config.get("region")}
        if self.client.get("allow_invalid_certificates"):
            arguments["verify"] = False
        elif "root_certificate" in self.client:
            arguments["verify"] = self.client["root_certificate"]
        style = self.config.get("virtual_hosted_style_request")
        default = "auto" if arguments["endpoint_url"] is None else "path"
        # Only requests.py retries: a conditional put that botocore retried would find its own object and report a
        # conflict.
        return arguments, {
            "retries": {"total_max_attempts": 1},
            "s3": {"addressing_style": default if style is None else "virtual" if style else "path"},
            "read_timeout": self._limit("read_timeout").total_seconds(),
            "connect_timeout": self._limit("connect_timeout").total_seconds(),
        }


def _flat(cloud: str, given: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the options under obstore's names. Values of None are left out."""
    known = _CONFIG[cloud] | _CLIENT
    names = {name: name for name in known}
    if cloud == "s3":
        names |= {**_S3FS, "profile": "profile"}
    if cloud != "http":
        names["credentials"] = "credentials"
    for given_name, value in given.items():
        lower = given_name.lower()
        short = lower.removeprefix(_PREFIX[cloud])
        name = names.get(lower) or (short if short in known else None)
        if name is None:
            suggestion = _near(lower, {*names, *CALL_OPTIONS})
            raise ValueError(f"unknown storage option {given_name!r} for {cloud}://{suggestion}")
        if value is not None:
            yield name, value


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
