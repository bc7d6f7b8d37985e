"""Print how large the repository is: code lines, modules, classes, functions, public names, lines of tests and docs.

Code lines are lines of Python and Cython without docstrings, comments and blank lines.

    python tools/count_code.py            the whole repository
    python tools/count_code.py --modules  also one line for each package and module
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


def docstring_lines(tree: ast.AST) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def code_lines(path: Path) -> int:
    text = path.read_text()
    if path.suffix == ".pyx":  # no parser here: a docstring is a string that begins its line
        lines, inside = 0, False
        for line in map(str.strip, text.splitlines()):
            quotes = line.count('"""')
            if inside or line.startswith('"""'):
                inside = inside ^ (quotes % 2 == 1)
            elif line and not line.startswith("#"):
                lines += 1
        return lines
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT and token.type != tokenize.ENDMARKER:
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found - docstring_lines(ast.parse(text)))


def main() -> None:
    modules = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("src/**/*.pyx")])
    lines = {path: code_lines(path) for path in modules}
    nodes = [node for path in modules if path.suffix == ".py" for node in ast.walk(ast.parse(path.read_text()))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    documented = sum(len(docstring_lines(ast.parse(path.read_text()))) for path in modules if path.suffix == ".py")
    public = ast.parse((ROOT / "src/tiercache/__init__.py").read_text())
    names = next(
        len(ast.literal_eval(node.value))
        for node in public.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    if "--modules" in sys.argv[1:]:
        packages: dict[str, int] = {}
        for path in modules:
            packages[(path.relative_to(ROOT / "src/tiercache").parts)[0]] = (
                packages.get(path.relative_to(ROOT / "src/tiercache").parts[0], 0) + lines[path]
            )
            print(f"{lines[path]:7,} {path.relative_to(ROOT)}")
        for name, n_lines in sorted(packages.items(), key=lambda item: -item[1]):
            print(f"{n_lines:7,} {name}")
    for label, count in {
        "code lines": sum(lines.values()),
        "lines with docstrings, comments and blanks": sum(len(path.read_text().splitlines()) for path in modules),
        "docstring lines": documented,
        "modules": len(modules),
        "modules below 80 lines": sum(len(path.read_text().splitlines()) < 80 for path in modules),
        "classes": sum(isinstance(node, ast.ClassDef) for node in nodes),
        "functions": len(functions),
        "public names": names,
        "lines of C": sum(len(path.read_text().splitlines()) for path in ROOT.glob("csrc/*.[ch]")),
        "lines of tests": sum(len(path.read_text().splitlines()) for path in ROOT.glob("tests/**/*.py")),
        "lines of docs": sum(
            len(path.read_text().splitlines()) for path in [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")]
        ),
    }.items():
        print(f"{count:8,} {label}")


if __name__ == "__main__":
    main()
