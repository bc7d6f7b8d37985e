"""Three folders as tiers, checkpoints written days ago, and the move as a user runs it, for tests by name."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from tiercache.tier.mover import RunReport, run_once
from tiercache.tier.rules import load_rule_file

DAY_S = 86_400.0
TIERS = ("hot", "standard", "archive")
FILES = ("model.bin", "optim.bin", "rng.bin")
KEEP = '[[rules]]\nmatch = "**"\nkeep_hot = { last = 1 }\nkeep_standard = { last = 4 }\nthen = "archive"\n'


def content(path: str, version: str = "") -> bytes:
    return f"{path} {version}".encode() * 40


@dataclass
class Folders:
    """Three tiers, which are folders below a root. Moves have no grace period."""

    root: Path
    rules: str = KEEP
    tiering: str = 'grace = "0s"\n'

    def __post_init__(self) -> None:
        for tier in TIERS:
            (self.root / tier).mkdir(exist_ok=True)
        self.write_rules(self.rules)

    def write_rules(self, rules: str) -> None:
        text = f'state_dir = "{self.root / "state"}"\n'
        text += "".join(f'[tiers.{tier}]\nurl = "{self.root / tier}"\n' for tier in TIERS)
        text += f"{rules}\n[tiering]\n{self.tiering}"
        (self.root / "tiercache.toml").write_text(text)

    def write(self, tier: str, path: str, data: bytes, days: float = 1.0) -> None:
        file = self.root / tier / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        os.utime(file, (time.time() - days * DAY_S,) * 2)

    def save(self, *steps: int, tier: str = "hot", run: str = "run", version: str = "") -> None:
        """Write checkpoints of three files; a higher step is later."""
        for step in steps:
            for name in FILES:
                path = f"{run}/step-{step}/{name}"
                self.write(tier, path, content(path, version), days=30.0 - step / 10)

    @property
    def file(self):
        return load_rule_file(self.root / "tiercache.toml")

    def run(self, **options) -> RunReport:
        return run_once(self.file, **options)

    def found(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for tier in TIERS:
            for file in sorted((self.root / tier).rglob("*")):
                if file.is_file() and "_tiercache" not in file.parts:
                    found.setdefault(file.relative_to(self.root / tier).as_posix(), []).append(tier)
        return found

    def lies(self, step: int, run: str = "run") -> list[str]:
        """Return the tiers that have a checkpoint with all its bytes; "a part in TIER" where files are missing."""
        found = []
        for tier in TIERS:
            files = {name: self.root / tier / run / f"step-{step}" / name for name in FILES}
            there = [name for name, file in files.items() if file.exists()]
            right = all(files[name].read_bytes() == content(f"{run}/step-{step}/{name}") for name in there)
            if there:
                found.append(tier if len(there) == len(FILES) and right else f"a part in {tier}")
        return found
