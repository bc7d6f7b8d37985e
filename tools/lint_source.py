"""Checks of the source that ruff and mypy cannot express; `make lint` runs them.

The layers are those of docs/architecture.md, which is the only list of them. ``python tools/lint_source.py [ROOT]``
prints one line for each violation, as ``file:line: rule``, and exits with 1 if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Only these files and folders may import these packages, so that a package can be replaced or left out there.
_TORCH_HOMES = (
    "load/",
    "checkpoint/",
    "integrations/",
    "demo/train.py",
    "transform_rng.py",
    "data/output_spec.py",
)  # transform_rng.py: on first use of a torch.Generator; output_spec.py: for the layout "nested"
HOMES = {
    "obstore": ("store/obstore.py",),
    "fsspec": ("store/fsspec.py", "integrations/fsspec.py"),
    "boto3": ("store/archive.py",),
    "botocore": ("store/archive.py", "store/access.py"),
    **dict.fromkeys(("torch", "torchdata"), _TORCH_HOMES),
    **dict.fromkeys(("typer", "rich", "click"), ("cli/",)),
    "ml_dtypes": ("load/batch.py",),
    "pydantic": ("tier/rules.py", "tier/plans.py"),
}
ENVIRONMENT_FILE, SLEEPING_FILE = "config.py", "waiting.py"
ENVIRONMENT_NAMES = frozenset({"os.environ", "os.environb", "os.getenv"})

# checkpoints.py imports dcp.py, and with it torch, where it is wanted: states of arrays do not need torch.
LAZY_FILES = ("checkpoint/checkpoints.py",)

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

LAYER_LINE = re.compile(r"^\s*`?([\w/.]+)`?\s+\[(\d+)\]", re.MULTILINE)
CYTHON_IMPORT = re.compile(r"^\s*(?:from|cimport|import)\s+(tiercache[\w.]*)(?:\s+c?import\s+(\w+))?")
# A broad handler is allowed at the top of a thread, which passes the error on, and around the user's code.
BROAD_HANDLER_REASON = re.compile(r"#.*\b(top|the user's code)\b")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
MACHINE_PATH = re.compile(r"""["'](/tmp|/home|/root|/work|/var|/mnt|/Users)\b""")


@dataclass(frozen=True, slots=True)
class Module:
    """A Python or Cython file of the package.

    Attributes:
        name: Path below the package, with "/".
        tree: Syntax tree, or None for Cython.
    """

    path: Path
    name: str
    text: str
    tree: ast.Module | None

    @property
    def part(self) -> str:
        """Top-level module or package that contains the file; layers are assigned to these, and to some files."""
        return self.name.split("/")[0].removesuffix(".py")

    @property
    def imports(self) -> list[tuple[int, str]]:
        """(line, dotted name) of every import anywhere in the file; `from a import b` gives a.b."""
        if self.tree is not None:
            return list(imports_in(self.tree))
        found = []
        for number, line in enumerate(self.text.splitlines(), start=1):
            if match := CYTHON_IMPORT.match(line):
                found.append((number, ".".join(filter(None, match.groups()))))
        return found


def read_modules(source: Path) -> list[Module]:
    """Return the modules of the package, except its own __init__.py, which imports lazily from every layer."""
    paths = [path for path in (*source.rglob("*.py"), *source.rglob("*.pyx")) if path != source / "__init__.py"]
    modules = []
    for path in sorted(paths):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text) if path.suffix == ".py" else None
        modules.append(Module(path, path.relative_to(source).as_posix(), text, tree))
    return modules


def read_layers(architecture: Path) -> dict[str, int]:
    """Return the layer of each top-level module or package, as listed in the document."""
    lines = LAYER_LINE.finditer(architecture.read_text(encoding="utf-8"))
    return {match[1].removesuffix("/").removesuffix(".py"): int(match[2]) for match in lines}


def imports_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import in the tree; a relative import yields its dots.

    A call of import_module() with a literal name is an import; one with a computed name cannot be detected.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "import_module":
            names = (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))
            yield from ((node.lineno, name) for name in names if isinstance(name, str))


def check_layers(module: Module, layers: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    """Yield imports from layers that are not lower, and files whose layer is not listed."""
    own = layers.get(module.name.removesuffix(".py"), layers.get(module.part))
    if own is None:
        yield 1, f"{module.part} has no layer in docs/architecture.md"
        return
    for line, name in module.imports:
        top, _, rest = name.partition(".")
        if not top:
            yield line, "imports are absolute"
        if top != "tiercache":
            continue
        target = rest.split(".")[0]
        file = "/".join(rest.split(".")[:2])
        if target not in layers:
            yield line, f"{name} is imported; import it from the module that defines it"
        elif target != module.part and (layer := layers.get(file, layers[target])) >= own:
            yield line, f"layer {own} imports {name} of layer {layer}; a module imports only lower layers"


def check_homes(module: Module) -> Iterator[tuple[int, str]]:
    """Yield imports of libraries that only some files may import."""
    for line, name in module.imports:
        homes = HOMES.get(name.split(".")[0])
        if homes is not None and not module.name.startswith(homes):
            yield line, f"{name} is imported; only {', '.join(homes)} may import it"


def check_functions(module: Module) -> Iterator[tuple[int, str]]:
    """Yield imports of our own package inside functions: a cycle means that a type belongs in a lower layer."""
    if module.name in LAZY_FILES:
        return
    functions = (n for n in ast.walk(module.tree or ast.Module([], [])) if isinstance(n, FUNCTIONS))
    found = {found for function in functions for found in imports_in(function) if found[1].split(".")[0] == "tiercache"}
    for line, name in sorted(found):
        yield line, f"{name} is imported inside a function"


def check_calls(module: Module) -> Iterator[tuple[int, str]]:
    """Yield sleeps and reads of the environment outside the one file that may do so."""
    for node in ast.walk(module.tree or ast.Module([], [])):
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "sleep":
            if module.name != SLEEPING_FILE:
                yield node.lineno, f"a sleep; {SLEEPING_FILE} has the only one"
        elif isinstance(node, ast.Attribute) and dotted(node) in ENVIRONMENT_NAMES and module.name != ENVIRONMENT_FILE:
            yield node.lineno, f"{dotted(node)} is read; only {ENVIRONMENT_FILE} reads the environment"
        elif isinstance(node, ast.ImportFrom) and node.module == "os" and module.name != ENVIRONMENT_FILE:
            names = {f"os.{alias.name}" for alias in node.names} & ENVIRONMENT_NAMES
            yield from ((node.lineno, f"{name} is imported; only {ENVIRONMENT_FILE} may") for name in sorted(names))


def check_handlers(module: Module) -> Iterator[tuple[int, str]]:
    """Yield handlers of all exceptions that neither raise again nor give the allowed reason."""
    lines = module.text.splitlines()
    for node in ast.walk(module.tree or ast.Module([], [])):
        if not isinstance(node, ast.ExceptHandler):
            continue
        types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        is_broad = any(t is None or dotted(t) in ("Exception", "BaseException") for t in types)
        raises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
        if is_broad and not raises and not BROAD_HANDLER_REASON.search(lines[node.lineno - 1]):
            yield node.lineno, 'a handler of all exceptions; name them, or say "a thread\'s top" or "the user\'s code"'


def check_finalizers(module: Module) -> Iterator[tuple[int, str]]:
    """Yield __del__ methods that do not check whether the interpreter exits, when module globals may be None.

    The function that checks must be a default argument, because its global name may be None too.
    """
    functions = (n for n in ast.walk(module.tree or ast.Module([], [])) if isinstance(n, ast.FunctionDef))
    for function in functions:
        if function.name == "__del__" and "sys.is_finalizing" not in map(dotted, function.args.defaults):
            yield function.lineno, "a __del__ without the argument is_exiting: Callable[[], bool] = sys.is_finalizing"


def check_text(text: str) -> Iterator[tuple[int, str]]:
    """Yield unfinished work, and paths of one machine, which no file may contain."""
    for number, line in enumerate(text.splitlines(), start=1):
        if UNFINISHED.search(line):
            yield number, "unfinished work is named; finish it or open an issue"
        if MACHINE_PATH.search(line):
            yield number, "a path of one machine"


def dotted(node: ast.expr | None) -> str:
    """Return the dotted name of an expression, such as os.environ.get, or "" for a computed one."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def lint(root: Path) -> list[str]:
    """Return the violations in a checkout, one line each."""
    source, architecture = root / "src" / "tiercache", root / "docs" / "architecture.md"
    modules, layers = read_modules(source), read_layers(architecture)
    found: list[str] = []
    for module in modules:
        checks = [check_layers(module, layers), check_homes(module), check_functions(module)]
        checks += [check_calls(module), check_handlers(module), check_finalizers(module), check_text(module.text)]
        found += [f"{module.path}:{line}: {text}" for check in checks for line, text in check]
    for path in sorted((root / "csrc").glob("*.[ch]")):
        found += [f"{path}:{line}: {text}" for line, text in check_text(path.read_text(encoding="utf-8"))]
    parts = {module.part for module in modules} | {module.name.removesuffix(".py") for module in modules}
    found += [f"{architecture}:1: it lists {name}, which does not exist" for name in sorted(layers.keys() - parts)]
    return found


if __name__ == "__main__":
    violations = lint(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
    print("\n".join(violations) if violations else "lint_source: no violations")
    sys.exit(bool(violations))
