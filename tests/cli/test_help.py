"""Help is printed without loading the library."""

import subprocess
import sys

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
