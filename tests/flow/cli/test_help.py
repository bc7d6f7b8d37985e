"""Help: of the command without loading the library, and of each verb."""

import subprocess
import sys

from tiercache.cli.app import VERBS, load_verb

HEAVY = ["numpy", "pandas", "pyarrow", "torch", "rich", "sqlite3", "obstore", "fsspec"]
LIGHT = ["tiercache.cli", "tiercache.cli.app", "tiercache.distribution", "tiercache.errors"]
CODE = f"""
import contextlib, io, sys
from tiercache.cli.app import main
for group in ["", "tier", "ckpt"]:
    sys.argv[1:] = [*group.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main()
    assert "Usage" in out.getvalue(), (group, out.getvalue())
    loaded = [name for name in sys.modules if name.split(".")[0] in {HEAVY}]
    loaded += [name for name in sys.modules if name.startswith("tiercache.") and name not in {LIGHT}]
    assert not loaded, (group, loaded[:5])
"""


def test_the_help_that_lists_verbs_loads_nothing_of_the_library():
    subprocess.run([sys.executable, "-c", CODE], check=True)


def test_there_are_at_most_28_verbs_and_each_line_of_help_begins_the_text_of_the_verb(tiercache):
    assert len(VERBS) <= 28
    for path, (_, line) in VERBS.items():
        assert load_verb(path).help.splitlines()[0] == line
        assert line in " ".join(tiercache(*path.split(), "--help").out.split())
