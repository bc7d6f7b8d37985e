"""What a verb says when Ctrl-C strikes it."""

import warnings

import pytest
import typer

from tiercache.cli.failures import INTERRUPTED, reports_failures


def struck(monkeypatch, where):
    """A verb that Ctrl-C strikes in its middle, or just after it has ended."""

    def verb():
        if where == "in it":
            raise KeyboardInterrupt

    class Struck(warnings.catch_warnings):
        def __exit__(self, *exc):
            super().__exit__(*exc)
            if where == "after it":
                raise KeyboardInterrupt

    monkeypatch.setattr(warnings, "catch_warnings", Struck)
    return reports_failures(verb, how_to_go_on="nothing was committed")


@pytest.mark.parametrize(("where", "said"), [("in it", "nothing was committed"), ("after it", "all was done before")])
def test_ctrl_c_says_what_to_do_and_of_a_verb_that_is_done_that_it_is(monkeypatch, capsys, where, said):
    with pytest.raises(typer.Exit) as ended:
        struck(monkeypatch, where)()
    assert (ended.value.exit_code, capsys.readouterr().err) == (INTERRUPTED, f"tiercache: interrupted: {said}\n")
