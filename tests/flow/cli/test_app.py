"""What the command does apart from its verbs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).parent / "tiercache"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_of_a_named_shell_is_printed_to_a_child_of_sh(shell):
    # What follows the command keeps sh from replacing itself by it, so that sh is its parent process.
    script = f'"{COMMAND}" --show-completion {shell}; code=$?; exit $code'
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "_TIERCACHE_COMPLETE" in done.stdout


def test_bash_completes_verbs_with_the_printed_script():
    script = (
        f'eval "$("{COMMAND}" --show-completion bash)"; COMP_WORDS=(tiercache st); COMP_CWORD=1; '
        '_tiercache_completion tiercache; echo "${COMPREPLY[@]}"'
    )
    path = f"{COMMAND.parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env={"PATH": path})
    assert done.stdout.split() == ["status"]


def test_an_unknown_shell_is_an_error_that_lists_the_known_ones(tiercache):
    refused = tiercache("--show-completion", "ksh", code=2)
    assert all(name in refused.err for name in ("ksh", "bash", "zsh", "fish"))
