"""The verb `tiercache ckpt verify`: all bytes of checkpoints are read and compared with known checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import typer

from tiercache._native.checksum import crc32c
from tiercache.checkpoint.layout import (
    MANIFEST_NAME,
    key_of,
    parse_manifest,
    parse_name,
)
from tiercache.cli.checkpoint_selection import CheckpointTiers, open_checkpoints
from tiercache.cli.common import CORRUPT, PARTIAL, Output, count, printable
from tiercache.cli.open_tiers import STATE_NAMES
from tiercache.errors import CorruptCheckpoint, StoreError
from tiercache.model import ObjectInfo, format_bytes
from tiercache.tier.move.transfer import Transfer


@dataclass(frozen=True, slots=True)
class _Finding:
    """Result for one copy. is_corrupt: Whether bytes differ from a checksum. is_proven: Whether all were compared."""

    path: str
    tier: str
    n_bytes: int = 0
    problems: tuple[str, ...] = ()
    is_corrupt: bool = False
    is_proven: bool = False

    @property
    def text(self) -> str:
        """The message for people."""
        if self.problems:
            return f"{self.path} in {self.tier}: {'CORRUPT: ' if self.is_corrupt else ''}{'; '.join(self.problems)}"
        what = "all bytes as they were written" if self.is_proven else "readable; no checksum of all its files is known"
        return f"{self.path} in {self.tier}: {what} ({format_bytes(self.n_bytes)})"


def verify(output: Output, rules: Path | None, paths: Sequence[str]) -> None:
    """Read checkpoints and compare them with known checksums. Raises typer.Exit with CORRUPT or PARTIAL."""
    findings: list[_Finding] = []
    with open_checkpoints(output, rules, paths) as found, Transfer(found.tiers.stores) as transfer:
        total = sum(int(found.snapshot.n_bytes[copy]) for group in found.groups for copy in found.copies(group))
        done = 0
        with output.byte_progress("reading") as advance:

            def on_bytes(n_bytes: int) -> None:
                nonlocal done
                done += n_bytes
                advance(done, total)

            for group in found.groups:
                for finding in _verify_group(found, transfer, group, on_bytes):
                    findings.append(finding)
                    facts = asdict(finding) | {"problems": list(finding.problems)}
                    output.event("copy", facts, printable(finding.text))
    corrupt = sum(one.is_corrupt for one in findings)
    other = sum(bool(one.problems) for one in findings) - corrupt
    text = f"{count(len(findings), 'copy', 'copies')} of {count(len(found.groups), 'checkpoint')}"
    text += f"; {corrupt} corrupt" if corrupt else ""
    text += f"; {other} not read" if other else ""
    output.summary({"copies": len(findings), "corrupt": corrupt, "not_read": other}, text)
    if corrupt or other:
        raise typer.Exit(CORRUPT if corrupt else PARTIAL)


@dataclass(slots=True)
class _ReadCopy:
    """A copy that was read. known, read: CRC-32C by key, as it should be, and as it was read."""

    tier: str
    problems: list[str]
    known: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    n_bytes: int = 0
    is_corrupt: bool = False


def _verify_group(
    found: CheckpointTiers, transfer: Transfer, group: int, on_bytes: Callable[[int], object]
) -> Iterator[_Finding]:
    """Yield the result of each copy of a checkpoint."""
    path = found.path(group)
    copies = [_read_copy(found, transfer, path, copy, on_bytes) for copy in found.copies(group)]
    for one in copies:
        others = [other for other in copies if other is not one and other.read]
        for other in others:
            for key in sorted(one.read.keys() & other.read.keys() - one.known.keys()):
                if one.read[key] != other.read[key]:
                    text = f"its bytes differ from those in {other.tier}, and no checksum tells which are right"
                    one.problems.append(f"{key}: {text}")
        compared = {*one.known, *(key for other in others for key in other.read)}
        is_proven = bool(one.read) and one.read.keys() <= compared and not one.problems
        if not found.snapshot.complete[group] and not one.problems:
            one.problems.append(f"the checkpoint is not complete: {found.problems.get(group, '')}")
        yield _Finding(found.name(group), one.tier, one.n_bytes, tuple(one.problems), one.is_corrupt, is_proven)


def _read_copy(
    found: CheckpointTiers, transfer: Transfer, path: str, copy: int, on_bytes: Callable[[int], object]
) -> _ReadCopy:
    """Read all objects of a copy, and compare them with the known checksums."""
    one = _ReadCopy(found.tier(copy), [])
    if not found.is_readable(copy):
        state = STATE_NAMES[found.snapshot.state[copy]]
        one.problems.append(f"it is {state} and cannot be read: tiercache tier get {path}")
        return one
    if not found.snapshot.whole[copy]:
        one.problems.append("files are missing, or differ from those of another tier")
    objects = found.objects(copy)
    try:
        one.known = _checksums(found, one.tier, path, objects)
    except CorruptCheckpoint as error:
        one.problems.append(str(error))
        one.is_corrupt = True
    for info in objects:
        try:
            crc = one.read[info.key] = transfer.checksum_of(one.tier, info, on_bytes)
        except StoreError as error:
            one.problems.append(str(error))
            continue
        one.n_bytes += info.n_bytes
        expected = one.known.get(info.key, crc)
        if crc != expected:
            one.problems.append(f"{info.key}: expected CRC-32C {expected:08x}, found {crc:08x}")
            one.is_corrupt = True
    for key in sorted(one.known.keys() - {info.key for info in objects}):
        one.problems.append(f"{key}: its manifest names it, and it is missing")
        one.is_corrupt = True
    return one


def _checksums(found: CheckpointTiers, tier: str, path: str, objects: Sequence[ObjectInfo]) -> dict[str, int]:
    """Return the known CRC-32C of each object of a copy.

    Of our own layout, checksums of objects that should be there are included. Raises CorruptCheckpoint if the manifest
    is corrupt.
    """
    sums = {one.key: one.crc32c for one in objects if one.crc32c is not None}
    name = path.rpartition("/")[2]
    manifest = next((one for one in objects if one.key == f"{path}/{MANIFEST_NAME}"), None)
    if manifest is None or parse_name(name) is None:
        return sums
    store = found.tiers.stores.store(tier)
    data = store.get(manifest.key)  # parse_manifest() compares it with the checksum that it contains
    stated = parse_manifest(data, f"{store.url}/{manifest.key}")
    parent = path[: len(path) - len(name)]
    sums |= {f"{parent}{key_of(name, one.path)}": one.crc32c for one in stated.files}
    sums.setdefault(manifest.key, crc32c(data))
    return sums
