"""The ring's C under the compiler's sanitizers: shares, errands, damage, closing, told sizes, memory used again."""

from __future__ import annotations

import os
import platform
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.stress.kills import ROOT

STRESS = Path(__file__).with_name("ring_stress.c")
COMPILER = os.environ.get("CC", "cc")
# zstd's own functions are found by Python, and no ring calls them.
C_FILES = sorted(path for path in (ROOT / "csrc").glob("*.c") if path.name != "frames.c")
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-fno-sanitize-recover=all", "-pthread"]


def build(sanitizers: str, folder: Path) -> Path:
    """The program with these sanitizers, or a skipped test."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no C compiler {COMPILER}")
    probe, program = folder / "probe.c", folder / "ring_stress"
    probe.write_text("int main(void) { return 0; }\n")
    command = [COMPILER, *FLAGS, f"-fsanitize={sanitizers}", "-o", str(program)]
    if subprocess.run([*command, str(probe)], capture_output=True, check=False).returncode:
        pytest.skip(f"{COMPILER} has no -fsanitize={sanitizers} here")
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(STRESS), *map(str, C_FILES)], check=True, timeout=120)
    return program


@pytest.mark.stress
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_rings_of_all_shapes_serve_every_byte_and_break_no_rule_of_c(tmp_path, sanitizers):
    seed = random.randrange(1 << 30)
    program = [str(build(sanitizers, tmp_path)), str(seed), "150"]
    if shutil.which("setarch"):  # the thread sanitizer of older compilers ends at once where addresses are very random
        program = ["setarch", platform.machine(), "-R", *program]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, f"seed {seed}:\n{done.stdout}\n{done.stderr[-8000:]}"
