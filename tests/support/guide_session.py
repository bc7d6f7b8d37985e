"""Sessions in the guide to tiers: what stands after `$ ` in a console block is run, and the page has what it prints.

    python -m tests.support.guide_session docs/guide/tiers.md        writes what the commands print now into the page

Blocks that begin with ```console are one session: the page's Python blocks are run before, in the user's home, and its
first TOML block is laid there as tiercache.toml.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.warm_python import WarmPython

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.M | re.S)
MAIN = "from tiercache.cli.app import main; main()"


def differences(text: str, now: str) -> list[str]:
    """Lines in which a page differs from what is printed now."""
    was, now_lines = (alike(page).splitlines() for page in (text, now))
    return list(difflib.unified_diff(was, now_lines, "the guide", "what is printed now", lineterm="", n=0))


def blocks(text: str, language: str) -> list[str]:
    """The contents of a page's blocks of one language, in order."""
    return [code for found, code in FENCE.findall(text) if found == language]


def commands(block: str) -> Iterator[tuple[str, str]]:
    """(command, what the page says that it prints), in order."""
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed


def prepare(text: str, folder: Path, environment: Mapping[str, str], python: WarmPython) -> None:
    """What the page's Python blocks and the first of TOML make of the folder."""
    (folder / "tiercache.toml").write_text(blocks(text, "toml")[0])
    script = folder / "examples.py"
    script.write_text("\n".join(blocks(text, "python")))
    done = python.run([str(script)], cwd=folder, environment=environment, is_strict=True)
    script.unlink()
    assert done.returncode == 0, done.stderr


def run(command: str, folder: Path, environment: Mapping[str, str], python: WarmPython) -> str:
    """What a command prints, errors included; one that ends with another code than 0 says so in a line of its own."""
    program, *arguments = shlex.split(command)
    if program == "tiercache":
        done = python.run(["-c", MAIN, *arguments], cwd=folder, environment=environment)
    else:
        done = subprocess.run(
            [program, *arguments], cwd=folder, env=dict(environment), capture_output=True, text=True, check=False
        )
    ended = f"[exit code {done.returncode}]\n" if done.returncode else ""
    return at_home(done.stdout + done.stderr, str(folder)) + ended


def at_home(printed: str, home: str) -> str:
    """The text with ~ for a home; columns of a table that had the home in them are as much narrower."""
    at = next((line.index(home) for line in printed.splitlines() if home in line and ": " not in line), None)
    if at is None:
        return printed.replace(home, "~")
    gone = " " * (len(home) - 1)
    lines = [
        line.replace(home, "~") if home in line else line[:at] + line[at:].replace(gone, "", 1)
        for line in printed.splitlines()
    ]
    return "".join(f"{line}\n" for line in lines)


def environment_in(home: Path) -> dict[str, str]:
    """That of a user who has nothing configured."""
    ours = {"HOME": str(home), "COLUMNS": "150"}
    return {name: value for name, value in os.environ.items() if not name.startswith(("TIERCACHE_", "XDG_"))} | ours


def replay(text: str, home: Path, python: WarmPython) -> str:
    """The page with what the commands of its session in local folders print here."""
    environment = environment_in(home)
    prepare(text, home, environment, python)

    def replayed(match: re.Match[str]) -> str:
        if match[1] != "console":
            return match[0]
        lines = [f"$ {command}\n{run(command, home, environment, python)}" for command, _ in commands(match[2])]
        return "```console\n" + "".join(lines) + "```"

    return FENCE.sub(replayed, text)


def alike(text: str) -> str:
    """A page without what differs from run to run: dates, times, ids, and how wide a column is."""
    text = re.sub(r"\d{4}-\d\d-\d\d(T[\d:.]+Z?)?", "DATE", text)
    text = re.sub(r"\b[0-9a-f]{8,}\b", "ID", text)
    text = re.sub(r"\b\d+(\.\d+)? ?(ms|s|seconds?|min|h|hours?)\b", "TIME", text)
    return re.sub(r"[ \t]+", " ", text)


def main() -> None:
    """Write a page anew."""
    page = Path(sys.argv[1])
    with WarmPython() as python, tempfile.TemporaryDirectory() as home:
        page.write_text(replay(page.read_text(), Path(home), python))


if __name__ == "__main__":
    main()
