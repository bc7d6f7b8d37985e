"""The linter of the source finds what it is there for."""

import importlib.util
import sys

import pytest
from tests.support import ROOT

DOCUMENT = "  waiting.py  [1] a\n  config.py  [1] b\n  low/  [2] c\n  high/  [3] d\n  load/  [4] e\n"


@pytest.fixture(scope="module")
def lint():
    spec = importlib.util.spec_from_file_location("lint_source", ROOT / "tools" / "lint_source.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["lint_source"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module.lint
    del sys.modules["lint_source"]


@pytest.fixture
def root(tmp_path):
    """A checkout without violations."""
    for name in ("waiting.py", "config.py", "low/a.py", "high/b.py", "load/c.py"):
        path = tmp_path / "src" / "tiercache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from os import getpid\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "architecture.md").write_text(DOCUMENT)
    return tmp_path


def test_a_clean_checkout_has_no_violations(lint, root):
    assert lint(root) == []


@pytest.mark.parametrize(
    ("name", "line", "text", "fact"),
    [
        ("low/a.py", 1, "from tiercache.high.b import x", "layer 2 imports tiercache.high.b.x of layer 3"),
        ("low/a.pyx", 1, "from tiercache.high cimport b", "layer 2 imports"),
        ("low/a.py", 1, "import tiercache", "import it from the module that defines it"),
        ("low/a.py", 1, "from . import x", "absolute"),
        ("high/b.py", 2, "def f():\n    from tiercache.low import a", "inside a function"),
        ("new.py", 1, "", "new has no layer"),
        ("low/a.py", 1, "import torch.nn", "torch.nn is imported"),
        ("load/c.py", 1, "from typer import echo", "typer.echo is imported"),
        ("low/a.py", 1, "import boto3", "boto3 is imported"),
        (
            "low/a.py",
            2,
            "import importlib\nx = importlib.import_module('botocore.config')",
            "botocore.config is imported",
        ),
        ("low/a.py", 3, "from importlib import import_module\ndef f():\n    import_module('obstore')", "obstore is"),
        ("low/a.py", 2, "from importlib import import_module\nimport_module('tiercache.high.b')", "layer 2 imports"),
        ("low/a.py", 2, "import time\ntime.sleep(1)", "sleep"),
        ("low/a.py", 2, "import os\nos.environ.get('X')", "os.environ is read"),
        ("low/a.py", 1, "from os import getenv", "os.getenv is imported"),
        ("low/a.py", 3, "try:\n    f()\nexcept Exception:\n    pass", "handler"),
        ("low/a.py", 3, "try:\n    f()\nexcept:\n    pass", "handler"),
        ("low/a.py", 2, "class A:\n    def __del__(self):\n        pass", "__del__"),
        ("low/a.py", 1, "# TO" + "DO later", "unfinished"),
        ("low/a.py", 1, 'path = "/' + 'home/me/x"', "path of one machine"),
    ],
)
def test_each_rule_names_file_line_and_fact(lint, root, name, line, text, fact):
    path = root / "src" / "tiercache" / name
    path.write_text(text)
    found = lint(root)
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:{line}: ")
    assert fact in found[0]


def test_code_in_its_allowed_file_is_no_violation(lint, root):
    source = root / "src" / "tiercache"
    (source / "waiting.py").write_text("import time\ntime.sleep(1)\n")
    (source / "config.py").write_text("import os\nos.environ.get('X')\n")
    (source / "load" / "c.py").write_text("import torch\nfrom tiercache.low import a\n")
    (source / "low" / "a.py").write_text("class A:\n    def __del__(self, is_exiting=sys.is_finalizing): pass\n")
    (source / "high" / "b.py").write_text("try:\n    f()\nexcept Exception:  # a thread's top\n    pass\n")
    assert lint(root) == []
