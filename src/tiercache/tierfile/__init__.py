"""The rule file: its tiers, rules, pins, tags and mover options, checked when it is read and frozen afterwards.

The tables stand in ``tiercache.toml`` beside the settings, or in a file that the caller names.
``docs/reference/tiers.md`` lists all keys. Each error message names the file and the key; a TOML syntax error names the
line.

``models`` holds the frozen tables, ``reading`` finds and checks the file, ``values`` converts single values.
"""

from tiercache.tierfile.models import (
    ROLES,
    BestMetric,
    KeepList,
    Kind,
    Pin,
    Role,
    Rule,
    RuleFile,
    Tag,
    Tier,
    TieringOptions,
)
from tiercache.tierfile.reading import load_rule_file

__all__ = [
    "ROLES",
    "BestMetric",
    "KeepList",
    "Kind",
    "Pin",
    "Role",
    "Rule",
    "RuleFile",
    "Tag",
    "Tier",
    "TieringOptions",
    "load_rule_file",
]
