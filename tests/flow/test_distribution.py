"""The name of the distribution, and the other project whose import package has the name tiercache."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import ROOT

import tiercache

PACKAGE = Path(tiercache.__file__).parent
# The other project's name with extras, or as the last argument of pip.
OTHER_PROJECT = re.compile(r"tiercache\[[a-z]|pip install [^\n`]*\btiercache(?![-\w/])")


def run_python(site: Path, code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def site(tmp_path):
    """A folder of installed packages, with this one."""
    (tmp_path / "tiercache_data-0.1.0.dist-info").mkdir()
    (tmp_path / "tiercache").mkdir()
    for entry in PACKAGE.iterdir():
        (tmp_path / "tiercache" / entry.name).symlink_to(entry)
    return tmp_path


@pytest.mark.parametrize("module", ["tiercache", "tiercache.cli.app"])
def test_importing_warns_of_another_project_installed_in_the_same_folder(site, module):
    (site / "tiercache-0.1.13.dist-info").mkdir()
    said = run_python(site, f"import {module}")
    assert said.count("UserWarning") == 1
    assert f"another project, tiercache 0.1.13, is installed in {site} beside tiercache-data" in said
    assert "`pip uninstall tiercache`, then `pip install --force-reinstall --no-deps tiercache-data`" in said


def test_the_command_warns_if_the_other_project_has_replaced_files(site):
    (site / "tiercache-0.1.13.dist-info").mkdir()
    for name in ("__init__.py", "config.py"):
        (site / "tiercache" / name).unlink()
        (site / "tiercache" / name).write_text('"""Of the other project."""\n')
    assert "`pip uninstall tiercache`" in run_python(site, "import tiercache.cli.app")


def test_no_text_advises_installing_the_other_project():
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml")]
    for folder in ("src", "docs", "examples", "benchmarks", ".ci"):
        paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in ("", ".md", ".py"))
        files += [path for path in paths if ".egg-info" not in path.parent.name]  # a build has made it
    assert len(files) > 200
    found = {str(file): match[0] for file in files if (match := OTHER_PROJECT.search(file.read_text()))}
    assert found == {}
