"""Globs: RE2 over columns matches what a plain matcher of single paths matches."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.tier.text_columns import first_match

# -- the plain matcher, which shares nothing with the fast one ------------------------------------------------------


def plainly(glob: str, path: str) -> bool:
    return segments_match(glob.split("/"), path.split("/"))


def segments_match(globs: list[str], names: list[str]) -> bool:
    if not globs:
        return not names
    if globs[0] == "**":
        if len(globs) == 1:
            return bool(names)
        return any(segments_match(globs[1:], names[n:]) for n in range(len(names) + 1))
    return bool(names) and name_matches(globs[0], names[0]) and segments_match(globs[1:], names[1:])


def name_matches(glob: str, name: str) -> bool:
    if not glob:
        return not name
    if glob[0] == "*":
        return any(name_matches(glob[1:], name[n:]) for n in range(len(name) + 1))
    if not name:
        return False
    return glob[0] in ("?", name[0]) and name_matches(glob[1:], name[1:])


ATOMS = ["a", "b", "ab", ".", "*", "?", "]", "é", "+", "\n"]
names = st.lists(st.sampled_from(ATOMS), min_size=1, max_size=3).map("".join).filter(lambda name: "**" not in name)
globs = st.lists(st.one_of(names, st.just("**")), min_size=1, max_size=4).map("/".join)
paths = st.lists(st.text("abc.é+\n", min_size=1, max_size=3), min_size=1, max_size=4).map("/".join)
rules = st.tuples(st.lists(globs, min_size=1, max_size=2).map(tuple), st.lists(globs, max_size=1).map(tuple))


def first(path: str, given_rules: list) -> int:
    for number, (match, excepted) in enumerate(given_rules):
        if any(plainly(g, path) for g in match) and not any(plainly(g, path) for g in excepted):
            return number
    return -1


@given(st.lists(paths, max_size=20), st.lists(rules, max_size=4))
def test_the_first_matching_rule_is_the_one_that_the_plain_matcher_finds(texts, given_rules):
    found = first_match(pa.array(texts, pa.string()), given_rules)
    assert found.tolist() == [first(path, given_rules) for path in texts]


def test_paths_are_matched_in_parts_in_their_order():
    texts = [f"{'ab'[i % 2]}/{i}" for i in range(150_001)]
    found = first_match(pa.array(texts, pa.large_string()), [(("b/**",), ("b/*7",)), (("a/*",), ())])
    assert found.tolist() == [1 if i % 2 == 0 else -1 if str(i).endswith("7") else 0 for i in range(150_001)]


MATCHES = (
    "checkpoints/** checkpoints/a/step-1", "a/**/b a/b", "a/**/b a/x/y/b", "**/*.pt x.pt",
    ".* .hidden", "* .hidden", "** a/", "a/** a/b/", "a/** a//", "a/* a/", "a/ a/", "**/ a/b/",
)  # fmt: skip
DIFFERS = (
    "checkpoints/** checkpoints", "checkpoints/** checkpoints2/a", "a/**/b axb", "**/*.pt x.pt/y", "* a/b", "a?b a/b",
    "a.b axb", "A a", "** ", "a/** a/", "a/**/** a/",
    "**/b b/",
)  # fmt: skip


def test_a_glob_matches_as_the_reference_says():
    for text in (*MATCHES, *DIFFERS):
        glob, path = text.split(" ")
        assert (first_match(pa.array([path]), [((glob,), ())])[0] == 0) == (text in MATCHES), text


MALFORMED = {
    "a[b": "has no meaning", "a{b": "write a list of globs", "a}b": "write a list of globs",
    "a**": "a whole path segment",
    "**b/c": "a whole path segment", "***": "a whole path segment", "a\\*": "has no meaning",
}  # fmt: skip


def test_a_malformed_glob_is_an_error_that_names_it():
    for glob, what in MALFORMED.items():
        with pytest.raises(ValueError, match=what) as caught:
            first_match(pa.array(["a"]), [((glob,), ())])
        assert repr(glob) in str(caught.value)
