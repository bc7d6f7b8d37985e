"""The names that users see."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiercache

MAX_NAMES = 34


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_public_names_are_few_and_sorted():
    assert tiercache.__all__ == sorted(tiercache.__all__)
    assert len(tiercache.__all__) <= MAX_NAMES


def test_dir_lists_the_public_names():
    assert dir(tiercache) == sorted(tiercache.__all__)


def test_every_public_name_exists_is_documented_and_shows_no_private_module():
    for name in set(tiercache.__all__) - {"__version__"}:
        value = getattr(tiercache, name)
        assert inspect.getdoc(value), name
        assert value.__module__.startswith("tiercache"), name


def described(value):
    """Names that the sections Args and Attributes of a docstring describe."""
    names, indent = set(), None
    for line in (inspect.getdoc(value) or "").splitlines():
        if line in ("Args:", "Attributes:"):
            indent = "    "
        elif line and not line.startswith(" "):
            indent = None
        elif indent is not None and (entry := re.match(rf"{indent}([*\w, ]+): \S", line)):
            names |= {name.strip("* ") for name in entry[1].split(",")}
    return names


def undescribed(name, value):
    """Yield the parameters of a callable, and of the public methods of a class, that no docstring describes."""
    texts = described(value)
    if inspect.isclass(value):
        texts |= described(value.__init__)
    for parameter in inspect.signature(value).parameters:
        if parameter not in texts and not parameter.startswith("_") and parameter != "self":
            yield f"{name}({parameter})"
    for method, found in inspect.getmembers(value, callable) if inspect.isclass(value) else ():
        is_ours = str(getattr(found, "__module__", "")).startswith("tiercache")
        if is_ours and not method.startswith("_"):
            yield from undescribed(f"{name}.{method}", found)


def test_every_parameter_of_a_public_callable_is_described():
    names = [name for name in tiercache.__all__ if name != "__version__"]
    assert [one for name in names for one in undescribed(name, getattr(tiercache, name))] == []


def test_a_parameter_that_is_not_described_is_found():
    def resize(image, width, height):
        """Return a resized image.

        Args:
            image: Image to resize.
            width: Width of the
                result: in pixels.

        Returns:
            height: not a parameter.
        """

    assert list(undescribed("resize", resize)) == ["resize(height)"]


def test_type_checkers_see_every_public_name():
    tree = ast.parse(Path(tiercache.__file__).read_text())
    named = {alias.asname or alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert set(tiercache.__all__) <= named


def test_star_import_gives_the_public_names():
    assert in_new_process("from tiercache import *; print(DataLoader.__name__, Writer.__name__)") == "DataLoader Writer"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Lodaer'"):
        _ = tiercache.Lodaer


def test_the_module_for_ray_is_an_attribute_that_says_what_to_install_without_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "tiercache.integrations.ray", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"tiercache.ray needs ray, .* pip install 'tiercache-data\[ray\]'"):
        _ = tiercache.ray


def test_no_public_name_is_that_of_a_module_which_would_replace_it_when_it_is_imported():
    modules = {path.stem for path in Path(tiercache.__file__).parent.iterdir()}
    assert not modules & set(tiercache.__all__)


def test_a_data_set_shows_its_users_no_internals():
    names = [name for name in dir(tiercache.Dataset) if not name.startswith("_")]
    assert not {"source", "serving", "is_plain", "with_source", "over"} & set(names)
