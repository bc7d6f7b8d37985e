"""What the house style asks of the text of every source file, as far as a machine can see it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tiercache"
PYTHON = sorted(SOURCE.rglob("*.py"))
NATIVE = sorted([*(SOURCE / "_native").glob("*.pyx"), *(ROOT / "csrc").glob("*.[ch]")])

ENVIRONMENT_READERS = {"config.py"}
SLEEPERS = {"waiting.py"}
# An `except Exception` is right only where a thread begins: the error is handed to whoever waits for the thread.
# Or round the user's code, whose errors are handed on as those of a thread.
THREAD_TOP = re.compile(r"#.*\b(top|the user's code)\b")


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE if path.is_relative_to(SOURCE) else ROOT).as_posix()


def dotted(node: ast.expr) -> str:
    """The name that a call or attribute is written as: os.environ.get, time.sleep; "" for anything computed."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize(
    "path", [p for p in PYTHON if name_of(p) not in SLEEPERS and not name_of(p).startswith("testing/")], ids=name_of
)
def test_nothing_sleeps_but_the_one_poll(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert [n.lineno for n in calls if dotted(n.func).split(".")[-1] == "sleep"] == []


@pytest.mark.parametrize("path", [p for p in PYTHON if name_of(p) not in ENVIRONMENT_READERS], ids=name_of)
def test_the_environment_is_read_in_one_file(path):
    readers = {"os.environ", "os.environb", "os.getenv"}
    tree = ast.parse(path.read_text())
    found = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and dotted(n) in readers]
    found += [
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.module == "os" and any(a.name in ("environ", "getenv") for a in n.names)
    ]
    assert found == []


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_broad_handlers_stand_at_thread_tops_or_raise_again(path):
    text = path.read_text()
    lines = text.splitlines()
    found = []
    for handler in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ExceptHandler)):
        types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        broad = any(t is None or dotted(t) in ("Exception", "BaseException") for t in types)
        raises = any(isinstance(n, ast.Raise) for n in ast.walk(handler))
        if broad and not raises and not THREAD_TOP.search(lines[handler.lineno - 1]):
            found.append(handler.lineno)
    assert found == [], 'name the errors; where a thread begins, say "a thread\'s top" on the line'


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=name_of)
def test_nothing_is_left_for_later(path):
    words = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    assert [n for n, line in enumerate(path.read_text().splitlines(), start=1) if words.search(line)] == []


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_no_path_of_somebodys_machine_is_written_down(path):
    places = re.compile(r"""["'](/tmp|/home|/root|/work|/var|/mnt|/Users)\b""")
    assert [n for n, line in enumerate(path.read_text().splitlines(), start=1) if places.search(line)] == []


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_finalizers_ask_first_whether_the_interpreter_exits(path):
    """By a default argument: a module's globals may be None by then, the function that asks among them."""
    finalizers = [n for n in ast.walk(ast.parse(path.read_text())) if getattr(n, "name", "") == "__del__"]
    asking = [n for n in finalizers if "sys.is_finalizing" in map(dotted, n.args.defaults)]
    assert [n.lineno for n in finalizers if n not in asking] == []
