"""Virtual environments, one per contender, made on first use."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peers.catalogue import Peer

STAMP = "requirements"
TIMEOUT_S = 1800
REASON_LENGTH = 300


class NotInstalledError(Exception):
    """The environment of a contender could not be made; the message gives the reason."""


def interpreter(name: str, peer: Peer, folder: Path) -> Path:
    """Return the Python that runs a contender. Its environment is made, or made again if requirements changed.

    Raises:
        NotInstalledError: A requirement is missing, or pip failed.
    """
    if not peer.requirements:
        return Path(sys.executable)
    place = folder / (peer.environment or name)
    python, stamp = place / "bin" / "python", place / STAMP
    wanted = "\n".join(peer.requirements) + "\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    _check_system(peer)
    print(f"making the environment of {peer.title} ({', '.join(peer.requirements)})", file=sys.stderr, flush=True)
    if place.exists():
        shutil.rmtree(place)
    _run([sys.executable, "-m", "venv", str(place)])
    _run([str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *peer.requirements])
    stamp.write_text(wanted)
    return python


def _check_system(peer: Peer) -> None:
    if not peer.system:
        return
    if shutil.which("pkg-config") is None:
        raise NotInstalledError(f"the build from source needs pkg-config and {', '.join(peer.system)}")
    for module in peer.system:
        if subprocess.run(["pkg-config", "--exists", module], check=False).returncode:
            raise NotInstalledError(f"the build from source needs the development files of {module}")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise NotInstalledError(f"installing took longer than {TIMEOUT_S} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        said = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise NotInstalledError(said.strip()[:REASON_LENGTH])
