"""Options of clients of the test servers of S3."""


def s3fs_options(server):
    """Return the options of s3fs for the server's bucket."""
    return {
        "key": server.access_key_id,
        "secret": server.secret_access_key,
        "endpoint_url": server.endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"s3": {"addressing_style": "path"}},
    }
