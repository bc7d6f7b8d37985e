"""The rule file: tiers, rules, pins, tags and how things are moved; checked, and frozen once it is read.

They stand in ``tiercache.toml`` beside the settings, or in a file that is named; ``docs/reference/tiers.md`` lists all
keys. Every message names file and key, and the line where the file is no TOML.
"""

from tiercache.tierfile.models import ROLES, Best, Keep, Kind, Pin, Role, Rule, Tag, Tier, TierFile, Tiering
from tiercache.tierfile.reading import load_tiers

__all__ = ["ROLES", "Best", "Keep", "Kind", "Pin", "Role", "Rule", "Tag", "Tier", "TierFile", "Tiering", "load_tiers"]
