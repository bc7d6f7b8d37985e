"""The state of a run: a few hundred bytes of JSON-able values, equal on every rank, from which the order follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from tiercache.errors import ObjectChanged, UnsupportedFormat

if TYPE_CHECKING:
    from tiercache.load.source import Source

STATE_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run stands.

    Attributes:
        epoch, offset: records of that epoch that all ranks together were served; the rest names the order.
        group_bytes, window_bytes: None for "all".
    """

    dataset_id: str
    version: int
    fingerprint: str
    seed: int
    epoch: int
    offset: int
    shuffle: bool
    drop_last: bool
    group_bytes: int | None
    window_bytes: int | None
    streams: int = 1
    placement: Literal["sticky", "global"] = "sticky"
    format: int = STATE_FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_dict(state: Any) -> RunState:
        """Read to_dict() back.

        Raises:
            ValueError: not a state of this loader.
            UnsupportedFormat: of another release.
        """
        if not isinstance(state, Mapping) or not _is_count(state.get("format")):
            found = f"it has the keys {sorted(state)}" if isinstance(state, Mapping) else f"it is {state!r}"
            raise ValueError(f"not a state of tiercache.DataLoader over a tiercache.Dataset: {found}")
        if state["format"] != STATE_FORMAT:
            raise UnsupportedFormat(
                f"the state has format {state['format']}, this release reads {STATE_FORMAT}: update tiercache",
                url="state_dict",
                found=state["format"],
                supported=STATE_FORMAT,
            )
        names = {field.name for field in fields(RunState)}
        if set(state) != names:
            raise ValueError(
                f"the state's keys are not those of format {STATE_FORMAT}: {sorted(names ^ set(state))} differ"
            )
        for name in ("version", "epoch", "offset", "streams"):
            if not _is_count(state[name]):
                raise ValueError(f"the state's {name} must be an integer of 0 or more, got {state[name]!r}")
        return RunState(**state)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def reopen(source: Source, state: RunState) -> Source:
    """The data set as the state names it: the same, of the state's version.

    Raises:
        ObjectChanged: another data set, or a version that is not the one that was read.
    """
    if state.dataset_id != source.dataset_id:
        raise ObjectChanged(
            "the state is of another data set", url=source.url, expected=state.dataset_id, found=source.dataset_id
        )
    found = source if source.version == state.version else source.at_version(state.version)
    if found.fingerprint != state.fingerprint:
        raise ObjectChanged(
            f"version {state.version} is not the one that the state was saved on",
            url=source.url,
            expected=state.fingerprint,
            found=found.fingerprint,
        )
    return found
