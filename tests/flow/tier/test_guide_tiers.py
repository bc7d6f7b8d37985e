"""The guide to tiers shows what its commands print."""

import pytest
from tests.support import ROOT, guide_session
from tests.support.guide_session import differences

from tiercache.tier.rules import load_rule_file

PAGE = ROOT / "docs" / "guide" / "tiers.md"


def test_the_commands_of_the_guide_print_what_it_shows(tmp_path, warm_python):
    text = PAGE.read_text()
    now = guide_session.replay(text, tmp_path, warm_python)
    assert differences(text, now) == [], "\n".join(differences(text, now))


TIERS = "".join(f"""[tiers.{name}]\nurl = "/{name}"\n""" for name in ("hot", "standard", "archive"))


@pytest.mark.parametrize("part", guide_session.blocks(PAGE.read_text(), "toml part"), ids=lambda part: part.split()[0])
def test_rule_file_examples_of_the_guide_are_valid(part, tmp_path):
    path = tmp_path / "tiercache.toml"
    path.write_text(part if "[tiers." in part else TIERS + part)
    file = load_rule_file(path)
    assert file.rules or file.pins or file.home_tier.known_prices.store_gb_month == 0.021
