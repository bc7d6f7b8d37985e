"""Epochs of other libraries with their own cache limits, each in a process of its own in its environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from cachebench.data import RECORD_BYTES
from peers.catalogue import PEERS
from peers.environments import NotInstalledError, interpreter
from rows import OUT

if TYPE_CHECKING:
    from cachebench.data import Packed

CHILD = Path(__file__).with_name("peer_child.py")
LONGEST_S = 180
REASON_LENGTH = 200


def peer_job(peer: str, packed: Packed, f: float, folder: Path) -> dict[str, Any]:
    """Return a peer's arguments, except the epoch: the same records in as many files, and a limit of share f."""
    return {
        "peer": peer,
        "data": str(folder / f"{peer}-{packed.folder.name}"),
        "cache": str(folder / f"{peer}-cache"),
        "n_records": packed.n_records,
        "n_shards": len(packed.shard_bytes),
        "content_bytes": RECORD_BYTES - 8,
        "shard_bytes": int(packed.shard_bytes.max()),
        "cache_bytes": int(packed.n_bytes * f),
    }


def epochs_of(job: dict[str, Any], f: float, n_epochs: int) -> dict[str, Any]:
    """Measure epochs from an empty cache. "missing" in the result: the reason why there are no figures."""
    peer = job["peer"]
    try:
        python = interpreter(peer, PEERS[peer], OUT / "envs")
    except NotInstalledError as error:
        return {"missing": str(error)}
    shutil.rmtree(job["cache"], ignore_errors=True)
    found = []
    for epoch in range(n_epochs):
        done = _run(python, {**job, "epoch": epoch})
        if "missing" in done:
            return done
        found.append(done)
    return _summary(found, f, job)


def _run(python: Path, job: dict[str, Any]) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [str(python), str(CHILD), json.dumps(job)],
            check=False,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            env={**os.environ, "PYTHONPATH": ""},
        )
    except subprocess.TimeoutExpired:
        return {"missing": f"an epoch took longer than {LONGEST_S} s (epoch {job['epoch']})"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        said = next((line for line in reversed(lines) if "Error" in line), lines[-1])
        return {"missing": f"epoch {job['epoch']}: {said.strip()[:REASON_LENGTH]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _summary(found: list[dict[str, Any]], f: float, job: dict[str, Any]) -> dict[str, Any]:
    shares = [one["fetched_bytes"] / one["stored_bytes"] for one in found]
    held = max(one["held_bytes"] for one in found) / job["cache_bytes"]
    wrong = [one for one in found if one["n_records"] != job["n_records"] or one["n_distinct"] != job["n_records"]]
    notes = [f"held up to {held:.2f} of its limit"] + (["records missing or twice"] if wrong else [])
    return {
        "share": mean(shares[1:]),
        "epochs": shares,
        "wall_s": mean(one["wall_s"] for one in found[1:]),
        "bound": 1 - f,
        "bound_of": "1 - f",
        "note": ", ".join(notes),
    }
