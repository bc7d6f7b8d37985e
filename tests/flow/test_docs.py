"""The docs: their links lead somewhere, their examples run, and the commands that they name exist."""

import os
import re
from pathlib import Path

import pytest
from tests.support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
# The rest of the first line may say what an example needs that is not among the packages of a developer.
FENCE = re.compile(r"^```(\w*)( with [^\n]*)?[^\n]*\n(.*?)^```", re.M | re.S)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return [code for lang, needs, code in FENCE.findall(path.read_text()) if lang == language and not needs]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = FENCE.sub("", path.read_text())
    headings = re.findall(r"^#+\s+(.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_between_pages_resolve(path):
    broken = []
    for link in LINK.findall(FENCE.sub("", path.read_text())):
        target, _, anchor = link.partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        page = (path.parent / target).resolve() if target else path
        if not page.exists() or (anchor and page.suffix == ".md" and anchor not in anchors(page)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_examples_run_in_order(path, tmp_path, warm_python):
    script = tmp_path / "examples.py"
    script.write_text("\n".join(blocks(path, "python")))
    environment = os.environ | {"HOME": str(tmp_path)}
    done = warm_python.run([str(script)], cwd=tmp_path, environment=environment, is_strict=True)
    assert done.returncode == 0, done.stderr


def test_every_make_target_that_the_docs_name_exists():
    targets = set(re.search(r"^\.PHONY: (build .*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    named = {target for p in PAGES for target in re.findall(r"(?:`|^\$? ?)make ([a-z]+)", p.read_text(), re.M)}
    assert named <= targets


def test_every_verb_that_the_readme_names_exists(warm_python):
    verbs = set(re.findall(r"^tiercache ([a-z]+)", "\n".join(blocks(ROOT / "README.md", "sh")), re.M))
    shown = warm_python.run(["-c", "from tiercache.cli.app import main; main()", "--help"], cwd=ROOT).stdout
    assert verbs
    assert verbs <= set(re.findall(r"[a-z]+", shown))


def test_every_page_that_the_source_names_exists():
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "csrc").glob("*.[ch]")]
    named = {page for path in sources for page in re.findall(r"docs/[\w/-]+\.md", path.read_text())}
    assert {page for page in named if not (ROOT / page).exists()} == set()


def test_every_name_in_the_call_chains_of_the_architecture_exists():
    source = ROOT / "src" / "tiercache"
    missing = []
    for file, name in re.findall(r"`([\w/]+\.pyx?):([\w.]+)`", (ROOT / "docs" / "architecture.md").read_text()):
        text = (source / file).read_text() if (source / file).exists() else ""
        owner, _, attribute = name.rpartition(".")
        found = re.search(rf"^ *(?:cdef |async )?(?:def|class) {attribute}\b", text, re.M)
        if not found or (owner and not re.search(rf"^(?:cdef )?class {owner}\b", text, re.M)):
            missing.append(f"{file}:{name}")
    assert missing == []


def test_the_worked_example_of_the_order_prints_what_the_guide_shows(tmp_path, warm_python):
    page = ROOT / "docs" / "guide" / "order.md"
    done = warm_python.run(["-c", "\n".join(blocks(page, "python"))], cwd=tmp_path, is_strict=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(blocks(page, "text")) != ""
