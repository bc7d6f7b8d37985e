"""The ring's C and that of packing under the compiler's sanitizers."""

from __future__ import annotations

import os
import platform
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support import ROOT

COMPILER = os.environ.get("CC", "cc")
# zstd's own functions are found by Python, and no ring calls them.
C_FILES = sorted(path for path in (ROOT / "csrc").glob("*.c") if path.name != "zstd_frames.c")
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Werror", "-fno-sanitize-recover=all", "-pthread"]


def build(name: str, sanitizers: str, folder: Path) -> Path:
    """The program of this name with these sanitizers, or a skipped test."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no C compiler {COMPILER}")
    probe, program = folder / "probe.c", folder / name
    probe.write_text("int main(void) { return 0; }\n")
    command = [COMPILER, *FLAGS, f"-fsanitize={sanitizers}", "-o", str(program)]
    if subprocess.run([*command, str(probe)], capture_output=True, check=False).returncode:
        pytest.skip(f"{COMPILER} has no -fsanitize={sanitizers} here")
    source = Path(__file__).with_name(f"{name}.c")
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), *map(str, C_FILES), "-lm"], check=True, timeout=120)
    return program


@pytest.mark.stress
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_rings_of_all_shapes_serve_every_byte_and_break_no_rule_of_c(tmp_path, sanitizers):
    program = build("ring_stress", sanitizers, tmp_path)
    seed = random.randrange(1 << 29)
    for n_runs, one in ((100, 2 * seed), (50, 2 * seed + 1)):  # portable copies, and this processor's
        run(program, one, n_runs)


@pytest.mark.stress
def test_packing_of_any_documents_stays_within_the_memory_that_it_asks_for(tmp_path):
    run(build("packing_stress", "address,undefined", tmp_path), random.randrange(1 << 29), 50_000)


def run(program: Path, seed: int, n_runs: int) -> None:
    command = [str(program), str(seed), str(n_runs)]
    if shutil.which("setarch"):  # the thread sanitizer of older compilers ends at once where addresses are very random
        command = ["setarch", platform.machine(), "-R", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, f"seed {seed}:\n{done.stdout}\n{done.stderr[-8000:]}"
