"""Run torchdata's own test/stateful_dataloader against its class and against ours, and tell where they differ.

    python tests/integration/upstream.py CHECKOUT     (a clone of https://github.com/pytorch/data)

Nothing of those tests is kept here: they are copied to a temporary folder, once as they are and once with their import
of StatefulDataLoader led to tiercache.DataLoader. It takes some ten minutes for each. Needs the `integration` extra.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

SUITE = Path("test/stateful_dataloader")
# Of a test: the suite's own are much shorter, and one that hangs must not keep the others.
TEST_TIMEOUT_S = 300
SHIM = """\
from torchdata.stateful_dataloader import Stateful
from tiercache import DataLoader as StatefulDataLoader
"""


def copy_suite(checkout: Path, folder: Path, *, ours: bool) -> None:
    """Copy the suite below folder; ours: with every import of the class (those of child processes too) led to ours.

    Raises:
        FileNotFoundError: no such suite in the checkout.
    """
    if not (checkout / SUITE).is_dir():
        raise FileNotFoundError(f"{checkout} has no {SUITE}: it is to be a clone of https://github.com/pytorch/data")
    shutil.copytree(checkout / SUITE, folder / SUITE)
    if ours:
        (folder / "tiercache_shim.py").write_text(SHIM)
        for path in (folder / SUITE).glob("*.py"):
            text = path.read_text()
            path.write_text(re.sub(r"from torchdata\.stateful_dataloader import", "from tiercache_shim import", text))


def run_suite(folder: Path, arguments: list[str]) -> dict[str, str]:
    """Run the copied suite; by test "passed", "failed" or "skipped"."""
    report = folder / "report.xml"
    paths = [str(folder), str(Path(__file__).parents[2] / "src")]
    command = [sys.executable, "-m", "pytest", str(SUITE), "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += [f"--timeout={TEST_TIMEOUT_S}", f"--junitxml={report}", f"--rootdir={folder}", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with (folder / "output.txt").open("w") as output:
        subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output, check=False)
    if not report.exists():
        raise RuntimeError(f"the suite did not run:\n{(folder / 'output.txt').read_text()[-4000:]}")
    return read_report(report)


def read_report(report: Path) -> dict[str, str]:
    """By test ("file::class::name") "passed", "failed" or "skipped", from pytest's XML."""
    outcomes: dict[str, str] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        name = f"{case.get('classname', '').removeprefix('test.stateful_dataloader.')}::{case.get('name')}"
        # Subtests come as cases of their own: the worst counts.
        outcomes[name] = max(outcome, outcomes.get(name, outcome), key=["passed", "skipped", "failed"].index)
    return outcomes


def compare(checkout: Path, arguments: list[str]) -> tuple[str, list[str]]:
    """Run both. Returns a report to print, and the tests that upstream's class passes and ours should, but does not."""
    found = {}
    for ours in (False, True):
        with tempfile.TemporaryDirectory(prefix="upstream-") as folder:
            copy_suite(checkout, Path(folder), ours=ours)
            found[ours] = run_suite(Path(folder), arguments)
    theirs, mine = found[False], found[True]
    lines = [
        f"{name}: " + ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(outcomes.values()).items()))
        for name, outcomes in (("torchdata.StatefulDataLoader", theirs), ("tiercache.DataLoader", mine))
    ]
    names = sorted(theirs.keys() | mine.keys())
    lines += [f"  {n}: {theirs.get(n)} -> {mine.get(n)}" for n in names if theirs.get(n) != mine.get(n)]
    worse = [n for n in names if theirs.get(n) == "passed" and mine.get(n) != "passed"]
    return "\n".join(lines), worse


def main() -> int:
    """Print the report; 1 where ours fails what upstream's class passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    given = parser.parse_args()
    report, worse = compare(given.checkout, given.pytest)
    print(report)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
