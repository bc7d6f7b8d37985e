"""What needs boto3: credentials from profiles in the user's AWS files, and the requests that obstore has none of."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.stats import Counters
from tiercache.store.landing import PerProcess
from tiercache.store.options import CloudOptions

# How long a set of keys is used before boto3 is asked again; it renews temporary ones by itself in time.
_USED_FOR = timedelta(minutes=15)

# A copy by the server of a GiB may take longer than obstore's 20 s without a byte.
_SILENCE_S = 120
_CONNECTIONS = 32
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_TRY_AGAIN_CODES = ("OperationAborted", "ConditionalRequestConflict", "RequestTimeout", "SlowDown")
_ARCHIVED_CODES = ("InvalidObjectState", "ObjectNotInActiveTierError")
_UNABLE = (405, 501)
# s3fs does not know these, S3Calls does.
_ENCRYPTION = ("server_side_encryption", "sse_kms_key_id", "sse_bucket_key_enabled")


def profile_credentials(profile: str) -> tuple[Callable[[], dict[str, Any]], dict[str, str]]:
    """A function that gives the keys of a profile as obstore wants them, and what else it says: region, endpoint.

    Raises:
        ValueError: boto3 is not installed, or there is no such profile, or it holds no credentials.
    """
    try:
        boto3 = importlib.import_module("boto3")
        botocore = importlib.import_module("botocore.session")
        exceptions = importlib.import_module("botocore.exceptions")
        providers = importlib.import_module("botocore.configprovider")
    except ImportError as error:
        raise ValueError(
            f"the AWS profile {profile!r} is read by boto3, which is not installed: pip install 'tiercache[archive]', "
            "or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    try:
        core = botocore.Session(profile=profile)
        session = boto3.Session(botocore_session=core)
        credentials = session.get_credentials()
        # As AWS clients have it: a variable of the environment, the profile's services, the profile's own endpoint.
        endpoint = providers.ConfiguredEndpointProvider(core.full_config, core.get_scoped_config(), "s3").provide()
    except exceptions.BotoCoreError as error:
        raise ValueError(f"the AWS profile {profile!r}: {error}") from error
    if credentials is None:
        raise ValueError(f"the AWS profile {profile!r} holds no credentials")

    def keys() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _USED_FOR,
        }

    said = {"region": session.region_name, "endpoint": endpoint}
    return keys, {name: value for name, value in said.items() if value}


# By process and profile: a session reads botocore's tables, 100 ms, and makes further clients from them in 3 ms. It is
# not safe from threads, hence the lock; a forked child has one of its own.
_sessions: dict[tuple[int, str | None], tuple[Any, Lock]] = {}


def has_boto3() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("boto3") is not None


class S3Calls:
    """boto3's client of one endpoint: a call is one request, not repeated, with our errors.

    Safe from any thread; each process makes a client of its own when it first needs one. counters: gets "requests".
    """

    def __init__(self, options: CloudOptions, url: str, counters: Counters) -> None:
        """Raises ValueError where boto3 is missing, or cannot do what the options ask for."""
        if not has_boto3():
            raise ValueError(
                f"{url}: storage classes, restores and batch deletes need boto3: pip install 'tiercache[archive]'"
            )
        if unknown := [name for name in options.unknown_to_s3fs if name not in _ENCRYPTION]:
            raise ValueError(f"{url}: storage classes go by boto3, which cannot be told {', '.join(unknown)}")
        self.url, self.counters = url, counters
        self._options = options
        self._client = PerProcess(lambda: _client(options), lambda client: client.close())

    def __reduce__(self) -> tuple[type[S3Calls], tuple[CloudOptions, str, Counters]]:
        return S3Calls, (self._options, self.url, self.counters)

    @property
    def writing(self) -> dict[str, Any]:
        """Arguments of all requests that write an object: how it is encrypted."""
        config = self._options.config
        kind = config.get("server_side_encryption")
        if kind is None:
            return {}
        more = {"SSEKMSKeyId": config["sse_kms_key_id"]} if "sse_kms_key_id" in config else {}
        return {"ServerSideEncryption": kind, **more}

    @property
    def reach(self) -> tuple[object, ...]:
        """The same where one server and one identity answer: what may copy between buckets by itself."""
        config = self._options.config
        names = ("endpoint", "region", "access_key_id", "session_token", "skip_signature")
        return self._options.profile, *(config.get(name) for name in names)

    def __call__(self, operation: str, where: str, **request: Any) -> Mapping[str, Any]:
        """The answer to one request.

        Args:
            operation: boto3's name of it, "head_object".
            where: the URL of the object, for errors.
            **request: its arguments, in boto3's names; those that are None are left out.

        Raises:
            NotFound, ObjectChanged, StoreError: with .status and .retryable; .archived True where the object must be
                restored first, .unable True where the server does not know the request at all.
        """
        exceptions = importlib.import_module("botocore.exceptions")
        given = {name: value for name, value in request.items() if value is not None}
        if "RequestPayer" not in given and str(self._options.config.get("request_payer", "")).lower() == "true":
            given["RequestPayer"] = "requester"
        self.counters.add("requests")
        try:
            answer: Mapping[str, Any] = getattr(self._client.get(), operation)(**given)
        except exceptions.ClientError as error:
            raise _refused(error.response, operation, where) from None
        except exceptions.BotoCoreError as error:
            # From None: a text of botocore may hold a signed URL.
            lost = isinstance(error, (exceptions.HTTPClientError, exceptions.ConnectionError))
            raise StoreError(f"{operation}: {type(error).__name__}", url=where, retryable=lost) from None
        return answer

    def takes(self, operation: str, *names: str) -> bool:
        """Whether the boto3 that is installed knows these arguments of an operation ("CopyObject")."""
        shape = self._client.get().meta.service_model.operation_model(operation).input_shape
        return set(names) <= set(shape.members)

    def close(self) -> None:
        """Drop this process's connections."""
        self._client.drop()


def _client(options: CloudOptions) -> Any:
    boto3 = importlib.import_module("boto3")
    config_of, unsigned = importlib.import_module("botocore.config").Config, importlib.import_module("botocore")
    named = options.for_s3fs()
    settings = named["config_kwargs"]
    settings["read_timeout"] = max(settings.get("read_timeout", _SILENCE_S), _SILENCE_S)
    settings.setdefault("s3", {"addressing_style": "path" if "endpoint_url" in named else "auto"})
    if named["anon"]:
        settings["signature_version"] = unsigned.UNSIGNED
    # Sums are given with each request; those that botocore adds by itself are unknown to many servers.
    config = config_of(
        max_pool_connections=_CONNECTIONS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **settings,
    )
    asked = os.getpid(), named.get("profile")
    if asked not in _sessions:
        _sessions.setdefault(asked, (boto3.Session(profile_name=asked[1]), Lock()))
    session, lock = _sessions[asked]
    with lock:
        return session.client(
            "s3",
            endpoint_url=named.get("endpoint_url"),
            aws_access_key_id=named.get("key"),
            aws_secret_access_key=named.get("secret"),
            aws_session_token=named.get("token"),
            config=config,
            **named["client_kwargs"],
        )


def _refused(response: Mapping[str, Any], operation: str, where: str) -> StoreError:
    """Our error for an answer that is one."""
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    code, text = str(response["Error"].get("Code", "")), str(response["Error"].get("Message", ""))
    if status == 404:
        missing = {"NoSuchBucket": "bucket", "NoSuchUpload": "upload"}.get(code, "object")
        return NotFound(f"no such {missing} ({operation})", url=where, status=status, code=code)
    if status == 412:
        message = f"the object is not the one that was asked for ({operation})"
        return ObjectChanged(message, url=where, status=status, code=code)
    if code in _ARCHIVED_CODES:
        message = f"{operation}: it is archived, and must be restored before it can be read: tiercache restore"
        return StoreError(message, url=where, status=status, code=code, archived=True)
    retryable = status in _TRY_AGAIN or code in _TRY_AGAIN_CODES
    unable = status in _UNABLE or code in ("NotImplemented", "MethodNotAllowed")
    said = f"{operation}: HTTP {status} {code}{': ' if text else ''}{text}"
    return StoreError(said, url=where, status=status, code=code, retryable=retryable and not unable, unable=unable)
