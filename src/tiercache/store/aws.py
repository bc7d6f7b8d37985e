"""What needs boto3: credentials from profiles in the user's AWS files."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

# How long a set of keys is used before boto3 is asked again; it renews temporary ones by itself in time.
_USED_FOR = timedelta(minutes=15)


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
