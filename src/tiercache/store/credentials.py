"""S3 credentials: their sources, and their renewal when they expire or the store refuses them.

A source is read again shortly before its keys expire, every 15 minutes if their expiry is unknown, and at once when the
store refuses them, because another program may have renewed the file, the environment or the token. Profiles, roles,
SSO and metadata services are botocore's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any

from tiercache.config import aws_endpoint_options, aws_keys, aws_profile
from tiercache.distribution import install_command
from tiercache.errors import StoreError
from tiercache.store.options import CloudOptions

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
            "expires_at": (keys.expires_at or self._now() + _UNDATED).astimezone(UTC),  # obstore wants this very zone
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

    Options take precedence over the environment, and the environment over botocore's other sources, whose region and
    endpoint the options gain. The source is None if requests are not signed, or if botocore is missing and obstore asks
    the metadata service by itself. Raises ValueError.
    """
    config = dict(options.config)
    if options.credentials is not None:
        give = options.credentials
        origin = "the function in storage_options"
        return config, Credentials(origin, lambda: _parsed(give(), origin, url), url)
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


def _parsed(given: object, origin: str, url: str) -> Keys:
    """Convert a mapping with obstore's or AWS's names to Keys."""
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
                "of a cloud machine; for a public bucket set anon=True"
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
