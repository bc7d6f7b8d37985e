"""Real servers for tests, in processes of their own: nginx over a folder, and Azurite, Microsoft's Azure emulator."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest
from tests.support import ROOT
from tests.support.s3_server import free_ports

from tiercache.waiting import wait_for

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # requests to loopback must bypass proxies
_START_S = 60.0

NGINX_CONFIG = """
{user}
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@contextmanager
def nginx_over(root: Path, folder: Path) -> Iterator[str]:
    """Serve a folder by nginx, and yield the URL; skip the test where nginx is missing.

    Args:
        root: Folder that is served.
        folder: Empty folder for nginx's own files.
    """
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    port = free_ports(1)
    config = folder / "nginx.conf"
    # Root's nginx would read as `nobody`, which may not enter a temporary folder.
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(NGINX_CONFIG.format(folder=folder, root=root, port=port, user=user))
    with _running([binary, "-c", str(config), "-p", str(folder), "-e", str(folder / "error.log")], folder):
        url = f"http://127.0.0.1:{port}"
        _wait_for_answer(url)
        yield url


ACCOUNT = "devstoreaccount1"
# The key of every Azurite, published in its documentation.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextmanager
def azurite(folder: Path, container: str = "tiercache") -> Iterator[dict[str, str]]:
    """Run Azurite, and yield the storage options of its account; skip the test where Azurite is missing.

    Args:
        folder: Folder for its data.
        container: Name of the container that is created.
    """
    binary = shutil.which("azurite-blob") or shutil.which("azurite-blob", path=ROOT / ".venv-azurite/node_modules/.bin")
    if binary is None:
        pytest.skip("Azurite is not installed: `make integration` installs it where there is npm")
    port = free_ports(1)
    command = [binary, "--silent", "--skipApiVersionCheck", "--disableTelemetry", "--location", str(folder)]
    with _running([*command, "--blobHost", "127.0.0.1", "--blobPort", str(port)], folder):
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        _wait_for_answer(endpoint)
        _create_container(endpoint, container)
        yield {"account_name": ACCOUNT, "account_key": KEY, "endpoint": endpoint}


def _create_container(endpoint: str, container: str) -> None:
    date, version = formatdate(usegmt=True), "2021-08-06"
    resource = f"/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
    text = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n{resource}"
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)).decode()
    headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey {ACCOUNT}:{signature}"}
    request = urllib.request.Request(f"{endpoint}/{container}?restype=container", headers=headers, method="PUT")
    with _direct.open(request, timeout=_START_S):
        pass


@contextmanager
def _running(command: Sequence[str], folder: Path) -> Iterator[None]:
    with (folder / "process.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(_START_S)


def _wait_for_answer(url: str) -> None:
    def answers() -> bool:
        try:
            with _direct.open(url, timeout=5):
                return True
        except urllib.error.HTTPError as error:
            error.close()
            return True
        except OSError:
            return False

    assert wait_for(answers, _START_S), f"no answer from {url}"
