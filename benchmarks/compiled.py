"""C sources of the benchmarks, compiled once."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
from pathlib import Path

FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]


def compiled(source: Path, folder: Path) -> ctypes.CDLL:
    """Compile a C source, unless folder has it already, and return the library. Raises CalledProcessError."""
    digest = hashlib.sha256(source.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    target = folder / f"{source.stem}-{digest}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*shlex.split(os.environ.get("CC", "cc")), *FLAGS, str(source), "-o", str(partial)], check=True)
        partial.rename(target)
    return ctypes.CDLL(str(target))
