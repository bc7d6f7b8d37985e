"""Storage options: the names that users may give, and what each back end calls them. Pure; values are never shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tiercache.model import parse_bool, parse_duration
from tiercache.store.retry import TIMEOUT_S

_CLIENT = frozenset(
    [
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "default_content_type",
        "default_headers",
        "http1_only",
        "http2_only",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "http2_keep_alive_while_idle",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_url",
        "proxy_ca_certificate",
        "proxy_excludes",
        "root_certificate",
        "randomize_addresses",
        "read_timeout",
        "timeout",
        "user_agent",
    ]
)
_DURATIONS = frozenset(
    [
        "connect_timeout",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "pool_idle_timeout",
        "read_timeout",
        "timeout",
    ]
)
# Of clients and clouds: a bool, or a text that says one.
_BOOLS = frozenset(
    [
        "allow_http",
        "allow_invalid_certificates",
        "disable_bulk_delete",
        "disable_tagging",
        "http1_only",
        "http2_keep_alive_while_idle",
        "http2_only",
        "imdsv1_fallback",
        "randomize_addresses",
        "request_payer",
        "s3_express",
        "skip_signature",
        "sse_bucket_key_enabled",
        "unsigned_payload",
        "use_azure_cli",
        "use_emulator",
        "use_fabric_endpoint",
        "virtual_hosted_style_request",
    ]
)
_CONFIG = {
    "s3": frozenset(
        [
            "access_key_id",
            "aws_endpoint_url_s3",
            "checksum_algorithm",
            "conditional_put",
            "container_credentials_relative_uri",
            "container_credentials_full_uri",
            "container_authorization_token_file",
            "copy_if_not_exists",
            "default_region",
            "disable_tagging",
            "disable_bulk_delete",
            "endpoint",
            "imdsv1_fallback",
            "metadata_endpoint",
            "region",
            "request_payer",
            "role_arn",
            "role_session_name",
            "s3_express",
            "secret_access_key",
            "server_side_encryption",
            "session_token",
            "skip_signature",
            "sse_bucket_key_enabled",
            "sse_customer_key_base64",
            "sse_kms_key_id",
            "sts_endpoint",
            "unsigned_payload",
            "virtual_hosted_style_request",
            "web_identity_token_file",
        ]
    ),
    "gs": frozenset(
        [
            "service_account",
            "service_account_key",
            "base_url",
            "bearer_token",
            "application_credentials",
            "skip_signature",
        ]
    ),
    "az": frozenset(
        [
            "account_name",
            "account_key",
            "client_id",
            "client_secret",
            "credential_type",
            "tenant_id",
            "authority_host",
            "sas_key",
            "token",
            "use_emulator",
            "use_fabric_endpoint",
            "encryption_key",
            "endpoint",
            "msi_endpoint",
            "object_id",
            "msi_resource_id",
            "federated_token_file",
            "use_azure_cli",
            "skip_signature",
            "disable_tagging",
            "fabric_token_service_url",
            "fabric_workload_host",
            "fabric_session_token",
            "fabric_cluster_identifier",
        ]
    ),
    "http": frozenset[str](),
}
# The environment's names without case: aws_region is region.
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
# What s3fs has no name for and what changes whether, where or how objects are read: it must not be dropped in silence.
_S3FS_LACKS = frozenset(
    [
        "aws_endpoint_url_s3",
        "container_credentials_relative_uri",
        "container_credentials_full_uri",
        "container_authorization_token_file",
        "s3_express",
        "server_side_encryption",
        "sse_bucket_key_enabled",
        "sse_customer_key_base64",
        "sse_kms_key_id",
        "default_headers",
        "proxy_url",
        "proxy_ca_certificate",
        "proxy_excludes",
    ]
)
# A stalled connection must not hang a job: after 20 s without a byte a request is made again, on another connection.
# `timeout` is not the HTTP client's: it limits a whole call, see CallLimit.
_CLIENT_DEFAULTS = {
    "timeout": timedelta(seconds=TIMEOUT_S),
    "read_timeout": timedelta(seconds=20),
    "connect_timeout": timedelta(seconds=5),
}
# A request is at most 8 MiB (or one small object): a server that takes longer sends less than 28 KiB/s.
_LONGEST_REQUEST = timedelta(minutes=5)
_PEM = "-----BEGIN"


@dataclass(frozen=True, slots=True)
class CloudOptions:
    """Options in obstore's names. config: the store's; client: its HTTP client's; profile: in the user's AWS files.

    client["timeout"]: limit of a whole call without progress, not of one request; client["root_certificate"]: a path,
    or PEM text. credentials: a function of the user's that returns keys.
    """

    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    client: Mapping[str, Any] = field(default_factory=dict, repr=False)
    profile: str | None = None
    credentials: Callable[[], Any] | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, cloud: str, given: Mapping[str, Any]) -> CloudOptions:
        """Check and translate what the user gave. cloud: "s3", "gs", "az" or "http".

        Raises:
            ValueError: an option that is not known, with those that are meant perhaps; or one given by two names.
        """
        config: dict[str, Any] = {}
        client: dict[str, Any] = {}
        profile = credentials = None
        for name, value in _flat(cloud, given):
            if name == "profile" and cloud == "s3":
                profile = value
            elif name == "credentials":
                if not callable(value):
                    raise ValueError(
                        f"storage option 'credentials' is a function that returns the keys, got {type(value).__name__}"
                    )
                credentials = value
            else:
                chosen, parsed = client if name in _CLIENT else config, _parsed(name, value)
                if chosen.setdefault(name, parsed) != parsed:
                    raise ValueError(f"storage option {name!r} is given twice, by two names and with two values")
        endpoint = str(config.get("endpoint", config.get("base_url", "")))
        if "allow_http" not in client:
            # The endpoint may also come from the environment, so only an https one given here forbids plain http.
            client["allow_http"] = not endpoint.startswith("https:")
        return cls(config, {**_CLIENT_DEFAULTS, **client}, profile, credentials)

    @property
    def timeout_s(self) -> float:
        """Seconds without progress after which a call fails, retries included."""
        return float(self._limit("timeout").total_seconds())

    def _limit(self, name: str) -> timedelta:
        """A timeout of the HTTP client, no longer than the call's."""
        limits: Mapping[str, timedelta] = {**_CLIENT_DEFAULTS, **self.client}
        return min(limits[name], limits["timeout"])

    def for_obstore(self) -> dict[str, Any]:
        """Options of obstore's HTTP client. Raises ValueError: the file of certificates cannot be read."""
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
        """Path of the file of certificates, None where none is given, or its text instead of a path."""
        given = self.client.get("root_certificate")
        return None if given is None or _PEM in given else str(given)

    @property
    def unknown_to_s3fs(self) -> list[str]:
        """Names of given options that for_s3fs() would have to drop, and that matter."""
        lacks = _S3FS_LACKS | (frozenset() if self.ca_file else {"root_certificate"})
        return sorted(lacks & {*self.config, *self.client})

    def for_s3fs(self) -> dict[str, Any]:
        """The same for s3fs, as far as it knows them: credentials, endpoint, region, timeouts, addressing style."""
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
        # Repeating is retry.py's business; a conditional put repeated by botocore would take itself for a rival.
        config_kwargs: dict[str, Any] = {"retries": {"total_max_attempts": 1}} | ({"s3": s3} if s3 else {})
        for name in ("read_timeout", "connect_timeout"):
            config_kwargs[name] = self._limit(name).total_seconds()
        named["anon"] = bool(named.get("anon"))
        return named | {"client_kwargs": client_kwargs, "config_kwargs": config_kwargs}

    def for_fsspec_http(self) -> dict[str, Any]:
        """The same for fsspec's HTTP file system: the headers, which may hold what lets one in."""
        headers = dict(self.client.get("default_headers") or {})
        if "user_agent" in self.client:
            headers["User-Agent"] = self.client["user_agent"]
        return {"headers": headers} if headers else {}


def _flat(cloud: str, given: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    known = _CONFIG[cloud] | _CLIENT
    for name, value in given.items():
        if value is None:
            continue
        lower = name.lower()
        short = lower.removeprefix(_PREFIX[cloud])
        if cloud == "s3" and lower == "client_kwargs":
            yield from _client_kwargs(value)
        elif lower == "verify":
            yield _verify(value)
        elif cloud == "s3" and lower in _S3FS:
            yield _S3FS[lower], value
        elif lower in known or (cloud == "s3" and lower == "profile") or (cloud != "http" and lower == "credentials"):
            yield lower, value
        elif short in known:
            yield short, value
        else:
            names = known | (frozenset(_S3FS) | {"client_kwargs", "profile"} if cloud == "s3" else frozenset())
            names |= {"verify"} | (frozenset() if cloud == "http" else {"credentials"})
            raise ValueError(f"unknown storage option {name!r} for {cloud}://{_near(lower, names)}")


def _client_kwargs(given: object) -> Iterable[tuple[str, Any]]:
    if not isinstance(given, Mapping):
        raise ValueError(f"client_kwargs is a dict, got {type(given).__name__}")
    for name, value in given.items():
        if name in _CLIENT_KWARGS:
            yield _CLIENT_KWARGS[name], value
        elif name == "verify":
            yield _verify(value)
        else:
            raise ValueError(f"unknown name {name!r} in client_kwargs{_near(name, {*_CLIENT_KWARGS, 'verify'})}")


def _verify(value: object) -> tuple[str, Any]:
    """Boto3's word for both: whether certificates are checked, and a file of certificates to trust."""
    if isinstance(value, bool) or str(value).lower() in ("true", "false"):
        return "allow_invalid_certificates", not parse_bool(value)
    return "root_certificate", _certificate("verify", value)


def _certificate(option: str, value: object) -> str:
    """The absolute path of a file of certificates, or their text. Raises ValueError if it holds none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str) and _PEM in value:
        return value
    if not isinstance(value, str | Path):
        raise ValueError(f"{option} is the path of a file of certificates (PEM), got {type(value).__name__}")
    path = Path(value).expanduser().absolute()
    _pem(option, str(path))
    return str(path)


def _pem(option: str, given: str) -> str:
    """The text of certificates, read if it is a path."""
    if _PEM in given:
        return given
    try:
        text = Path(given).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{option}: the file of certificates {given} cannot be read: {error.strerror}") from error
    if _PEM not in text:
        raise ValueError(f"{option}: {given} holds no certificate in PEM form")
    return text


def with_ca_bundle(options: CloudOptions, path: str | None) -> CloudOptions:
    """The options with the certificates of AWS_CA_BUNDLE's file, unless they have some of their own."""
    if path is None or {"root_certificate", "allow_invalid_certificates"} & options.client.keys():
        return options
    return replace(options, client={**options.client, "root_certificate": _certificate("AWS_CA_BUNDLE", path)})


def _near(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, near))}?" if near else f"; known are {', '.join(sorted(known))}"


def _parsed(name: str, value: Any) -> Any:
    """What obstore takes: durations, bools, paths of certificates, and all else as text where it is a number."""
    if name == "root_certificate":
        return _certificate("storage option 'root_certificate'", value)
    if name in _DURATIONS:
        return parse_limit(name, value)
    if name in _BOOLS:
        if name == "request_payer" and str(value).lower() == "requester":  # as HTTP says it
            return True
        try:
            return parse_bool(value)
        except ValueError as error:
            raise ValueError(f"storage option {name!r}: {error}") from None
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def parse_limit(name: str, value: Any) -> timedelta:
    """Seconds as a number, also one written as text (as the command line gives it), or "30s", "5m"."""
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
        raise ValueError(f"storage option {name!r} is a number of seconds or a text such as '30s' or '5m'")
    return timedelta(seconds=seconds)
