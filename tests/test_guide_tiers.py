"""The guide to tiers shows what its commands print."""

import difflib
from pathlib import Path

import pytest
from tests import guide_session

from tiercache.testing.s3_server import S3Server

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "tiers.md"


def differences(text: str, now: str) -> list[str]:
    was, now = (guide_session.alike(page).splitlines() for page in (text, now))
    return list(difflib.unified_diff(was, now, "the guide", "what is printed now", lineterm="", n=0))


def test_the_commands_of_the_guide_print_what_it_says(tmp_path):
    text = PAGE.read_text()
    assert differences(text, guide_session.replay(text, tmp_path)) == []


@pytest.mark.s3
def test_the_guide_to_restores_says_what_they_print(tmp_path):
    text = PAGE.read_text()
    with S3Server(kind="moto", bucket="bucket") as server:
        assert differences(text, guide_session.replay_s3(text, tmp_path, server)) == []
