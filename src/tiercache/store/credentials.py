"""S3 credentials: their sources, and their renewal when they expire or the store refuses them.

A source is read again shortly before its keys expire, every 15 minutes if their expiry is unknown, and at once when the
store refuses them, because another program may have renewed the file, the environment or the token.
"""

from __future__ import annotations

import configparser
import importlib
import json
import re
import shlex
import ssl
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from tiercache.config import aws_endpoint_options, aws_files, aws_keys, aws_profile, aws_web_identity
from tiercache.distribution import install_command
from tiercache.errors import StoreError
from tiercache.store.options import CloudOptions

# Keys without a known expiry are read again after this time.
_UNDATED = timedelta(minutes=15)
# Keys with a known expiry are read again this long before it; short-lived keys after three quarters of their life.
_MARGIN = timedelta(minutes=5)
# Pause after a source has failed while its last keys are still valid.
_TRY_AGAIN = timedelta(seconds=30)
_PROCESS_S = 60.0
_STS_S = 20.0
_STS_VERSION = "2011-06-15"
_STS_RETRYABLE_CODES = ("IDPCommunicationError", "InternalFailure", "ServiceUnavailable", "Throttling")
_ROLE_OPTIONS = ("role_arn", "role_session_name", "web_identity_token_file", "sts_endpoint")
_XML = re.compile(r"<(Code|Message|AccessKeyId|SecretAccessKey|SessionToken|Expiration)>([^<]*)</")
# Codes of S3 and STS for keys that are not, or no longer, valid. Statuses 401 and 403 only suggest it.
_INVALID_CODES = (
    "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "RequestExpired",
    "TokenRefreshRequired",
)  # fmt: skip
_TEXT_CHARS = 300


@dataclass(frozen=True, slots=True)
class Keys:
    """One set of credentials. expires_at has a time zone; it is None if it is unknown, or if the keys do not expire."""

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    expires_at: datetime | None = None


class Credentials:
    """Keys of one source, which read() reads when needed. `origin` and `url` are for messages.

    Safe for threads, but each process must create its own object. The lock is held while the source is read, so that a
    process is started once for all threads that wait for keys. If the reading fails, it fails for all of them.

    Attributes:
        number: Number of different keys that the source has given.
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
        self._n_failed = 0
        self._error: StoreError | ValueError | None = None  # of the last reading, if it failed
        self.number = 0

    def get(self) -> Keys:
        """Return keys that are valid now. Raises StoreError or ValueError if the source has none."""
        with self._after_others():
            now = self._now()
            if self._keys is None or (self._again_at is not None and now >= self._again_at):
                return self._refresh(self._keys, now)
            return self._keys

    def renew(self, number: int) -> bool:
        """Read the source again, and return whether its keys differ from the keys with this number."""
        with self._after_others():
            if self.number == number:
                self._refresh(None, self._now())
            return self.number != number

    @property
    def is_reading(self) -> bool:
        """Whether the source is being read now."""
        return self._lock.locked()

    @contextmanager
    def _after_others(self) -> Iterator[None]:
        """Hold the lock. If another thread's reading failed meanwhile, raise its error."""
        n_failed = self._n_failed
        with self._lock:
            if self._n_failed != n_failed and self._error is not None:
                raise self._error
            yield

    def _refresh(self, last: Keys | None, now: datetime) -> Keys:
        """Read the source. The last keys stay in use if the reading fails and they are still valid."""
        try:
            keys = self._read()
            if keys.expires_at is not None and keys.expires_at <= now:
                message = f"the credentials of {self.origin} have expired, at {keys.expires_at:%Y-%m-%d %H:%M:%S %Z}"
                raise StoreError(f"{message}: renew them at their source", url=self.url, code="ExpiredToken")
        except (StoreError, ValueError) as error:
            if last is None or (last.expires_at is not None and last.expires_at <= now):
                self._n_failed, self._error = self._n_failed + 1, error
                raise
            self._again_at = now + _TRY_AGAIN
            return last
        self._error = None
        if keys.expires_at is None:
            self._again_at = now + _UNDATED
        else:
            self._again_at = keys.expires_at - min(_MARGIN, (keys.expires_at - now) / 4)
        if keys != self._keys:
            self._keys, self.number = keys, self.number + 1
        return keys

    def for_obstore(self) -> dict[str, Any]:
        """Return the keys in the form of obstore's credential_provider."""
        keys = self.get()
        return {
            "access_key_id": keys.access_key_id,
            "secret_access_key": keys.secret_access_key,
            "token": keys.token,
            "expires_at": keys.expires_at or self._now() + _UNDATED,
        }


def wait_target(endpoint: str, credentials: Credentials | None) -> str:
    """Return what a call waits for now, for messages: the source of its keys while it is read, else the server."""
    return endpoint if credentials is None or not credentials.is_reading else credentials.origin


def refused_error(error: StoreError, credentials: Credentials | None, number: int) -> StoreError:
    """Return the error of a refused request with .details["renewed"] set if its source has newer keys now.

    with_retries() then makes one more attempt. number is that of the keys that signed the request.
    """
    is_invalid = error.code in _INVALID_CODES
    if credentials is None or not (error.status in (401, 403) or is_invalid):
        return error
    error.retryable = False
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
    """Return the error of a request whose credentials the client library obtains by itself.

    .details["renewed"] is set if new credentials may help: a new client obtains them at once, but the present one keeps
    the refused ones until their stated end.

    Args:
        error: Error of the request.
        cloud: "s3", "gs", "az" or "http".
    """
    if error.code in _INVALID_CODES if cloud == "s3" else cloud in ("gs", "az") and error.status == 401:
        error.details["renewed"] = True
    return error


def s3_access(options: CloudOptions, url: str) -> tuple[dict[str, Any], Credentials | None]:
    """Return the options of the store without keys, and the source of the keys.

    The options gain the region and endpoint of the profile. The source is None if requests are not signed, or if the
    back end itself asks the metadata service of a container or machine. Options take precedence over the profile, and
    the profile over the environment. Raises ValueError.
    """
    config = dict(options.config)
    role = {name: config.pop(name) for name in _ROLE_OPTIONS if name in config}
    if options.credentials is not None:
        return config, Credentials("the function in storage_options", lambda: _called(options, url), url)
    if {"access_key_id", "secret_access_key"} & config.keys():
        key, secret = config.pop("access_key_id", None), config.pop("secret_access_key", None)
        if not key or not secret:
            raise ValueError(f"{url}: access_key_id and secret_access_key belong together: give both")
        keys = Keys(key, secret, config.pop("session_token", None))
        return config, Credentials("storage_options", lambda: keys, url)
    if config.get("skip_signature"):
        return config, None
    if {"role_arn", "web_identity_token_file"} & role.keys():
        return config, _role(role, {**aws_endpoint_options(), **config}, options, url)
    if options.profile is not None:
        return _of_profile(options.profile, config, options, url)
    if aws_endpoint_options().get("skip_signature"):
        return config, None
    if aws_keys() is not None:
        return config, Credentials("the environment (AWS_ACCESS_KEY_ID)", lambda: _from_environment(url), url)
    if "web_identity_token_file" in aws_web_identity():
        return config, _role(role, {**aws_endpoint_options(), **config}, options, url)
    return config, None


def default_profile(options: CloudOptions) -> str | None:
    """Return the profile to use if the options give no credentials."""
    names = ("access_key_id", "skip_signature", "web_identity_token_file", "role_arn")
    if options.credentials is not None or any(options.config.get(name) for name in names):
        return options.profile
    return options.profile or aws_profile()


def _from_environment(url: str) -> Keys:
    keys = aws_keys()
    if keys is None:
        raise StoreError("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY were removed from the environment", url=url)
    return Keys(*keys)


def _called(options: CloudOptions, url: str) -> Keys:
    given = options.credentials() if options.credentials is not None else None
    return _parsed(given, "the function in storage_options", url)


def _parsed(given: object, origin: str, url: str) -> Keys:
    """Convert a mapping with obstore's or AWS's names (STS, credential_process) to Keys."""
    if not isinstance(given, Mapping):
        raise StoreError(f"{origin} must return a mapping of keys, got {type(given).__name__}", url=url)

    def value(*names: str) -> Any:
        return next((given[name] for name in names if given.get(name)), None)

    key, secret = value("access_key_id", "AccessKeyId"), value("secret_access_key", "SecretAccessKey")
    if not isinstance(key, str) or not isinstance(secret, str):
        raise StoreError(f"{origin} returned no access_key_id and secret_access_key (or AccessKeyId ...)", url=url)
    expires_at = value("expires_at", "Expiration")
    if isinstance(expires_at, str):
        try:
            expires_at = datetime.fromisoformat(expires_at)
        except ValueError as error:
            raise StoreError(f"{origin} returned an invalid expiry time: {expires_at!r}", url=url) from error
    if expires_at is not None and not isinstance(expires_at, datetime):
        raise StoreError(f"{origin} must return expires_at as a datetime, got {type(expires_at).__name__}", url=url)
    if expires_at is not None and expires_at.tzinfo is None:
        expires_at = expires_at.replace(tzinfo=UTC)
    return Keys(key, secret, value("token", "session_token", "SessionToken"), expires_at)


# Profiles


def _of_profile(
    name: str, config: dict[str, Any], options: CloudOptions, url: str
) -> tuple[dict[str, Any], Credentials | None]:
    profile = _profile(name)
    environment = aws_endpoint_options()
    endpoint = environment.get("endpoint") or _endpoint_of(profile, "s3")
    found = {"region": environment.get("region") or profile.get("region"), "endpoint": endpoint}
    config = {**{key: value for key, value in found.items() if value}, **config}
    origin, source = f"the AWS profile {name!r}", _source_of(profile)
    if source is None:
        if name == "default":  # the file sets only a region: the machine's own role is used
            return config, None
        raise ValueError(f"{origin} contains no credentials")
    if source == "process":
        origin = f"credential_process of {origin}"
    return config, Credentials(origin, lambda: _read_profile(name, config, options, url), url)


def _source_of(profile: Mapping[str, str]) -> Literal["botocore", "role", "keys", "process"] | None:
    """Return what gives the keys of a profile. botocore implements SSO, login and roles of other profiles."""
    assumes = "role_arn" in profile and "web_identity_token_file" not in profile
    if assumes or "login_session" in profile or any(name.startswith("sso_") for name in profile):
        return "botocore"
    if "role_arn" in profile:
        return "role"
    if profile.get("aws_access_key_id"):
        return "keys"
    return "process" if profile.get("credential_process") else None


def _read_profile(name: str, config: Mapping[str, Any], options: CloudOptions, url: str) -> Keys:
    profile = _profile(name)
    origin, source = f"the AWS profile {name!r}", _source_of(profile)
    if source == "botocore":
        return _by_botocore(name)
    if source == "role":
        role = {key: profile[key] for key in _ROLE_OPTIONS if key in profile}
        if (endpoint := _endpoint_of(profile, "sts")) is not None:
            role["sts_endpoint"] = endpoint
        return _assume_role({**aws_web_identity(), **role}, config, options, url)
    if source == "keys":
        secret = profile.get("aws_secret_access_key")
        if not secret:
            raise ValueError(f"{origin} has an aws_access_key_id, but no aws_secret_access_key")
        return Keys(profile["aws_access_key_id"], secret, profile.get("aws_session_token") or None)
    if source is None:
        raise ValueError(f"{origin} contains no credentials any more")  # for example while the file is being replaced
    return _by_process(profile["credential_process"], origin, url, min(_PROCESS_S, options.timeout_s))


def _profile(name: str) -> dict[str, str]:
    """Return a profile of the user's AWS files, `services` resolved. The credentials file takes precedence."""
    config_file, keys_file = aws_files()
    config, keys = _sections(config_file), _sections(keys_file)
    section = next((s for s in config if s == f"profile {name}" or (s == name == "default")), None)
    if section is None and name not in keys and name != "default":  # "default" may be missing
        raise ValueError(f"the AWS profile {name!r} is neither in {config_file} nor in {keys_file}")
    profile = dict(config[section]) if section is not None else {}
    own = keys.get(name, {})
    if own.get("aws_access_key_id"):
        profile = {k: v for k, v in profile.items() if k not in ("aws_secret_access_key", "aws_session_token")}
    profile |= own
    for key, value in config.get(f"services {profile.get('services', '')}", {}).items():
        for line in value.splitlines():
            setting, found, text = line.partition("=")
            if found and setting.strip() == "endpoint_url":
                profile[f"{key} endpoint_url"] = text.strip()
    return profile


def _endpoint_of(profile: Mapping[str, str], service: str) -> str | None:
    return profile.get(f"{service} endpoint_url") or profile.get("endpoint_url") or None


def _sections(path: Path) -> dict[str, dict[str, str]]:
    """Return the sections of an AWS file, with names without quotes and extra blanks; {} if there is no file."""
    parser = configparser.RawConfigParser(strict=False, default_section="\0")
    try:
        text = path.read_text(encoding="utf-8")
        parser.read_string(text)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        # From None, because the parser's text may contain keys.
        raise ValueError(f"{path}: cannot be read as an AWS file: {reason}") from None
    return {" ".join(s.replace('"', "").replace("'", "").split()): dict(parser.items(s)) for s in parser.sections()}


def _by_process(command: str, origin: str, url: str, timeout_s: float) -> Keys:
    """Return the keys that a profile's credential_process prints."""
    source = f"credential_process of {origin}"
    try:
        words = shlex.split(command)
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False)
    except (ValueError, OSError) as error:
        raise StoreError(f"{source} cannot be run: {error}", url=url) from None
    except subprocess.TimeoutExpired as error:
        output = _tail(error.stderr)
        raise StoreError(f"{source} did not end within {timeout_s:g} s{output}", url=url, retryable=True) from None
    if done.returncode:
        raise StoreError(f"{source} ended with {done.returncode}{_tail(done.stderr)}", url=url)
    try:
        keys = json.loads(done.stdout)
    except ValueError:
        raise StoreError(f"{source} printed no JSON{_tail(done.stderr)}", url=url) from None
    if isinstance(keys, dict) and keys.get("Version") != 1:
        raise StoreError(f"{source} printed Version {keys.get('Version')!r}, expected 1", url=url)
    return _parsed(keys, source, url)


def _tail(stderr: bytes | None) -> str:
    text = " ".join((stderr or b"").decode("utf-8", "replace").split())
    return f": {text[-_TEXT_CHARS:]}" if text else ""


def _by_botocore(name: str) -> Keys:
    """Return the keys of a profile by SSO, by login, or by a role assumed with another profile's keys."""
    try:
        botocore = importlib.import_module("botocore.session")
        exceptions = importlib.import_module("botocore.exceptions")
    except ImportError as error:
        raise ValueError(
            f"the AWS profile {name!r} uses SSO or another role, which needs boto3: "
            f"{install_command('archive')}, or give the profile a line `credential_process = aws configure "
            "export-credentials --profile OTHER --format process`"
        ) from error
    try:
        # A new session each time: an old one does not see what `aws sso login` has written since.
        credentials = botocore.Session(profile=name).get_credentials()
        if credentials is None:
            raise ValueError(f"the AWS profile {name!r} contains no credentials")
        frozen = credentials.get_frozen_credentials()
    except (exceptions.BotoCoreError, exceptions.ClientError) as error:
        raise ValueError(f"the AWS profile {name!r}: {error}") from error
    return Keys(frozen.access_key, frozen.secret_key, frozen.token)


# Roles from a token file


def _role(role: Mapping[str, str], config: Mapping[str, Any], options: CloudOptions, url: str) -> Credentials:
    settings = {**aws_web_identity(), **role}
    if not settings.get("role_arn") or not settings.get("web_identity_token_file"):
        raise ValueError(
            f"{url}: role_arn and web_identity_token_file belong together: give both. To assume a role by other keys, "
            "use a profile with role_arn and source_profile: storage_options={'profile': ...}"
        )
    origin = f"the token file {settings['web_identity_token_file']} (STS)"
    return Credentials(origin, lambda: _assume_role(settings, config, options, url), url)


def _assume_role(role: Mapping[str, str], config: Mapping[str, Any], options: CloudOptions, url: str) -> Keys:
    """Return the keys that STS gives for the token that the file contains now."""
    file = role["web_identity_token_file"]
    try:
        token = Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"the token file {file} cannot be read: {error}", url=url) from None
    region = config.get("region") or config.get("default_region") or "us-east-1"
    domain = "amazonaws.com.cn" if str(region).startswith("cn-") else "amazonaws.com"
    endpoint = role.get("sts_endpoint") or f"https://sts.{region}.{domain}"
    if not endpoint.startswith(("https://", "http://")):
        raise ValueError(f"sts_endpoint must be a URL, got {endpoint!r}")
    request = {
        "Action": "AssumeRoleWithWebIdentity",
        "Version": _STS_VERSION,
        "RoleArn": role["role_arn"],
        "RoleSessionName": role.get("role_session_name") or "tiercache",
        "WebIdentityToken": token,
    }
    data = urllib.parse.urlencode(request).encode()
    try:
        with urllib.request.urlopen(  # noqa: S310 - the scheme was checked
            endpoint, data, timeout=min(_STS_S, options.timeout_s), context=_tls(options, endpoint)
        ) as answer:
            fields = dict(_XML.findall(answer.read().decode("utf-8", "replace")))
    except urllib.error.HTTPError as error:
        with error:
            fields = dict(_XML.findall(error.read().decode("utf-8", "replace")))
        code = fields.get("Code", "")
        text = f"{code}: {fields.get('Message', '')}" if code else f"HTTP {error.code}"
        retryable = error.code >= 500 or error.code == 429 or code in _STS_RETRYABLE_CODES
        message = f"STS at {endpoint} gave no keys for the token in {file}: {text[:_TEXT_CHARS]}"
        raise StoreError(
            message, url=url, retryable=retryable, status=error.code, code=code, before_request=True
        ) from None
    except (OSError, HTTPException) as error:  # includes URLError
        message = f"cannot connect to STS at {endpoint}: {getattr(error, 'reason', error)}"
        raise StoreError(message, url=url, retryable=True, sent=False) from None
    return _parsed(fields, f"STS at {endpoint}", url)


def _tls(options: CloudOptions, endpoint: str) -> ssl.SSLContext | None:
    if not endpoint.startswith("https:"):
        return None
    context = ssl.create_default_context()
    if options.client.get("allow_invalid_certificates"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif (given := options.client.get("root_certificate")) is not None:
        if options.ca_file is not None:
            context.load_verify_locations(cafile=options.ca_file)
        else:
            context.load_verify_locations(cadata=given)
    return context
