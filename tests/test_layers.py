"""The layers of docs/architecture.md, held by reading the imports of every module."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tiercache"

LAYERS = {
    "errors": 0,
    "model": 0,
    "points": 0,
    "stats": 0,
    "version": 0,
    "config": 1,
    "descriptors": 1,
    "prices": 1,
    "waiting": 1,
    "_native": 1,
    "store": 2,
    "tierfile": 2,
    "shard": 3,
    "order": 3,
    "catalog": 3,
    "cache": 4,
    "images": 4,
    "tier": 4,
    "access": 5,
    "load": 5,
    "checkpoint": 5,
    "pack": 5,
    "opened": 6,
    "views": 6,
    "integrations": 6,
    "report": 6,
    "dataset": 7,
    "testing": 7,
    "demo": 8,
    "cli": 9,
}

# Each of these is known to one file of the library, so that it can be changed or left out there.
ONE_FILE_BACK_ENDS = ("obstore", "fsspec", "s3fs", "boto3", "ray", "prometheus_client")
# A file system is a subclass of fsspec's, and knows the cache, which no store may: 2026-11-25-cache-any-url.md.
SECOND_HOMES = {"fsspec": ["integrations/fsspec.py"]}
# The demo trains models, and nothing of the library imports it: docs/design/2026-11-25-demo.md.
TORCH_HOMES = ("load", "checkpoint", "integrations", "demo/train.py", "demo/models.py")
TERMINAL_HOMES = ("cli", "report", "config.py", "tierfile")

MODULES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")
CYTHON = sorted((SOURCE / "_native").glob("*.pyx"))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in the tree; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imports_of(path: Path) -> list[tuple[int, str]]:
    if path.suffix == ".py":
        return list(imported(ast.parse(path.read_text())))
    pattern = re.compile(r"^\s*(?:from|cimport|import)\s+(tiercache[\w.]*)(?:\s+c?import\s+(\w+))?")
    lines = enumerate(path.read_text().splitlines(), start=1)
    return [(n, ".".join(filter(None, match.groups()))) for n, line in lines if (match := pattern.match(line))]


def uses(path: Path, package: str) -> bool:
    return any(name.split(".")[0] == package for _, name in imports_of(path))


@pytest.mark.parametrize("path", [*MODULES, *CYTHON], ids=name_of)
def test_a_module_imports_only_lower_layers_and_its_own_package(path):
    part = part_of(path)
    assert part in LAYERS, f"{name_of(path)} has no layer: write it into docs/architecture.md and here"
    breaches = []
    for line, name in imports_of(path):
        top, _, rest = name.partition(".")
        if top != "tiercache":
            continue
        target = rest.split(".")[0]
        if target not in LAYERS:
            breaches.append(f"{name_of(path)}:{line} imports {name}; import from the module where it stands")
        elif target != part and LAYERS[target] >= LAYERS[part]:
            breaches.append(f"{name_of(path)}:{line} [{LAYERS[part]}] imports {name} [{LAYERS[target]}]")
    assert breaches == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_function_imports_our_own_package(path):
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    inside = {
        f"{name_of(path)}:{line} {name}"
        for f in functions
        for line, name in imported(f)
        if name.split(".")[0] == "tiercache"
    }
    assert inside == set()


@pytest.mark.parametrize("package", ONE_FILE_BACK_ENDS)
def test_a_back_end_is_imported_in_one_file(package):
    users = [name_of(p) for p in MODULES if part_of(p) != "testing" and uses(p, package)]
    others = [user for user in users if user not in SECOND_HOMES.get(package, [])]
    assert len(others) <= 1, f"{package} is imported in {users}"


def test_torch_is_imported_only_where_tensors_are_the_subject():
    users = [name_of(p) for p in MODULES if uses(p, "torch") or uses(p, "torchdata")]
    assert [u for u in users if u not in TORCH_HOMES and u.split("/")[0] not in TORCH_HOMES] == []


@pytest.mark.parametrize("package", ["typer", "rich", "pydantic", "click"])
def test_terminal_and_model_libraries_stay_in_the_command_and_the_configuration(package):
    users = [name_of(p) for p in MODULES if uses(p, package)]
    assert [u for u in users if u.split("/")[0] not in TERMINAL_HOMES] == []


def test_the_map_of_layers_in_the_docs_is_the_one_that_is_tested():
    text = (SOURCE.parents[1] / "docs" / "architecture.md").read_text()
    in_docs = {
        m[1].removesuffix("/").removesuffix(".py"): int(m[2])
        for m in re.finditer(r"^\s*`?([\w/.]+)`?\s+\[(\d)\]", text, re.M)
    }
    assert in_docs == {
        part: layer for part, layer in LAYERS.items() if (SOURCE / part).is_dir() or (SOURCE / f"{part}.py").exists()
    }
