"""Help is printed without loading the library, and former names of options work for one release."""

import subprocess
import sys

import pytest
import typer

from tiercache.cli.app import app

GROUP = typer.main.get_command(app)
TIER = GROUP.commands["tier"]
VERBS = ["", *sorted(GROUP.commands), *(f"tier {name}" for name in sorted(TIER.commands))]
HEAVY = ["numpy", "pandas", "pyarrow", "torch", "rich", "sqlite3", "obstore", "fsspec"]
LIGHT = ["tiercache.cli", "tiercache.errors", "tiercache.model", "tiercache.distribution", "tiercache.waiting"]
CODE = f"""
import contextlib, io, sys
from tiercache.cli.app import main
for verb in sys.argv[1:]:
    sys.argv[1:] = [*verb.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main()
    assert "Usage" in out.getvalue(), (verb, out.getvalue())
    loaded = [name for name in sys.modules if name.split(".")[0] in {HEAVY}]
    loaded += [name for name in sys.modules if name.startswith("tiercache.") and not name.startswith({tuple(LIGHT)})]
    assert not loaded, (verb, loaded[:5])
"""


def test_the_help_of_no_verb_loads_the_library():
    assert len(VERBS) > 18
    subprocess.run([sys.executable, "-c", CODE, *VERBS], check=True)


@pytest.mark.parametrize(
    ("verb", "old", "new"),
    [
        ("warm", "--share", "--fraction"),
        ("warm", "--first", "--limit"),
        ("pin", "--share", "--fraction"),
        ("pin", "--first", "--limit"),
        ("evict", "--to", "--target-size"),
        ("tier plan", "--limit", "--rows"),
        ("tier apply", "--limit", "--rows"),
        ("tier run", "--limit", "--rows"),
    ],
)
def test_a_former_name_of_an_option_is_not_in_the_help(verb, old, new, tiercache):
    words = tiercache(*verb.split(), "--help").out.split()
    assert new in words
    assert old not in words


@pytest.mark.parametrize("arguments", [["--share", "50%"], ["--share=50%"]])
def test_a_former_name_of_an_option_works_and_warns(arguments, tiercache, data_set, tmp_path):
    cache = "--cache", tmp_path / "cache", "--cache-size", "1GB"
    new = tiercache("warm", data_set, *cache, "--fraction", "50%", "--dry-run", "--json")
    old = tiercache("warm", data_set, *cache, *arguments, "--dry-run", "--json")
    assert (old.out, new.err) == (new.out, "")
    assert "--share" in old.err
    assert "--fraction" in old.err
