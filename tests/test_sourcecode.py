"""What the house style asks of the text of every source file, as far as a machine can see it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tiercache"
PYTHON = sorted(SOURCE.rglob("*.py"))
NATIVE = sorted([*(SOURCE / "_native").glob("*.pyx"), *(ROOT / "csrc").glob("*.[ch]")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAX_FILE_LINES = 500
MAX_CODE_LINES = 40
MAX_POSITIONAL = 5

# torch's own signature, which a drop-in has to have, and to hand on.
LONG_SIGNATURES = {("load/loader.py", "__init__")}
ENVIRONMENT_READERS = {"config.py"}
SLEEPERS = {"waiting.py"}
# An `except Exception` is right only where a thread begins: the error is handed to whoever waits for the thread.
# Or round the user's code, whose errors are handed on as those of a thread.
THREAD_TOP = re.compile(r"#.*\b(top|the user's code)\b")


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE if path.is_relative_to(SOURCE) else ROOT).as_posix()


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines of the body that hold code: no docstring, comment or blank line; the signature does not count."""
    body = function.body
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        body = body[1:]
    if not body:
        return 0
    text = lines[body[0].lineno - 1 : function.end_lineno]
    return sum(1 for line in text if line.strip() and not line.strip().startswith("#"))


def dotted(node: ast.expr) -> str:
    """The name that a call or attribute is written as: os.environ.get, time.sleep; "" for anything computed."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE, *TESTS], ids=name_of)
def test_no_file_is_longer_than_the_wall(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES, "split it: it has two reasons to change"


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_functions_are_short(path):
    text = path.read_text()
    functions = [f for f in functions_of(ast.parse(text)) if (name_of(path), f.name) not in LONG_SIGNATURES]
    lengths = {f"{f.name} (line {f.lineno})": code_lines(f, text.splitlines()) for f in functions}
    assert {name: n for name, n in lengths.items() if n > MAX_CODE_LINES} == {}


# A verb of the command has its flags as arguments: typer's way, and called by name.
@pytest.mark.parametrize("path", [p for p in PYTHON if not name_of(p).startswith("cli/")], ids=name_of)
def test_functions_take_few_positional_arguments(path):
    long = []
    for f in functions_of(ast.parse(path.read_text())):
        names = [a.arg for a in (*f.args.posonlyargs, *f.args.args) if a.arg not in ("self", "cls")]
        if len(names) > MAX_POSITIONAL and (name_of(path), f.name) not in LONG_SIGNATURES:
            long.append(f"{f.name} (line {f.lineno}): {names}")
    assert long == [], "make an options dataclass, or keyword-only arguments"


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
