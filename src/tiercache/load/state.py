"""The state of a run: plain values, equal on all ranks, that determine the order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from tiercache.errors import ObjectChanged, UnsupportedFormat
from tiercache.model import SourcePart

if TYPE_CHECKING:
    from tiercache.data.records import Records


# Format 2 has streams, several data sets and selections. This release does not read format 1 (one stream, other keys).
STATE_FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The position of a run.

    Attributes:
        parts: The data sets that are read, with their versions and selections.
        seed: Seed of the run. The order of an epoch follows from it and the epoch's number.
        epoch: Number of the epoch.
        offset: Records of that epoch that all ranks together were served.
        shuffle, drop_last: The loader's arguments.
        streams, placement: See `LoaderOptions`.
        group_bytes, window_bytes: The shuffle sizes in bytes; None for "all".
        mixture: The weights and the stop rule of a mixture as plain values; None: the parts are not mixed.
        format: Version of this form of the state.
    """

    parts: tuple[SourcePart, ...]
    seed: int
    epoch: int
    offset: int
    shuffle: bool
    drop_last: bool
    streams: int
    placement: Literal["sticky", "global"]
    group_bytes: int | None
    window_bytes: int | None
    mixture: Any = None
    format: int = STATE_FORMAT

    def following(self, epoch: int) -> RunState:
        """Return the state at the beginning of another epoch of the run."""
        return replace(self, epoch=epoch, offset=0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint; JSON does not change them."""
        parts = [[part.dataset_id, part.version, part.fingerprint, part.selection] for part in self.parts]
        # Field by field: dataclasses.asdict copies each value deeply, which takes 60 us, and a state may be saved at
        # every step.
        values = {name: getattr(self, name) for name in _NAMES}
        return {**values, "parts": parts, "mixture": deepcopy(self.mixture)}

    @staticmethod
    def from_dict(state: Any) -> RunState:
        """Return the state that to_dict() saved.

        Raises:
            ValueError: The value is not a state of this loader, or one of its values is invalid.
            UnsupportedFormat: Another release saved the state.
        """
        if not isinstance(state, Mapping) or not _is_count(state.get("format")):
            found = f"it has the keys {sorted(state)}" if isinstance(state, Mapping) else f"it is {state!r}"
            raise ValueError(f"not a state of tiercache.DataLoader over a tiercache.Dataset: {found}")
        if state["format"] != STATE_FORMAT:
            what = "update tiercache" if state["format"] > STATE_FORMAT else "go on with the release that saved it"
            raise UnsupportedFormat(
                f"the state has format {state['format']}, this release reads {STATE_FORMAT}: {what}",
                url="state_dict",
                found=state["format"],
                supported=STATE_FORMAT,
            )
        if set(state) != set(_NAMES):
            raise ValueError(
                f"the state's keys are not those of format {STATE_FORMAT}: {sorted(set(_NAMES) ^ set(state))} differ"
            )
        _check_values(state)
        return RunState(**{**state, "parts": tuple(SourcePart(*part) for part in state["parts"])})


_NAMES = tuple(field.name for field in fields(RunState))


def _is_integer(value: Any, least: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def _is_count(value: Any) -> bool:
    return _is_integer(value, 0)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return value is None or _is_integer(value, 1)


def _is_part(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    dataset_id, version, fingerprint, selection = value
    texts = [dataset_id, fingerprint, "" if selection is None else selection]
    return _is_count(version) and all(isinstance(text, str) for text in texts)


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epoch": (_is_count, "an integer of 0 or more"),
    "offset": (_is_count, "an integer of 0 or more"),
    "streams": (lambda value: _is_integer(value, 1), "an integer of 1 or more"),
    "seed": (_is_integer, "an integer"),
    "shuffle": (_is_flag, "true or false"),
    "drop_last": (_is_flag, "true or false"),
    "group_bytes": (_is_size, "null or an integer of 1 or more"),
    "window_bytes": (_is_size, "null or an integer of 1 or more"),
    "placement": (lambda value: value in ("sticky", "global"), "'sticky' or 'global'"),
    "parts": (
        lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_part, value)),
        "a list of [data set, version, fingerprint, selection]",
    ),
}


def _check_values(state: Mapping[str, Any]) -> None:
    """Raise ValueError, with the name of the value, for an invalid value of a state."""
    for name, (fits, expected) in _CHECKS.items():
        if not fits(state[name]):
            raise ValueError(f"the state's {name} must be {expected}, got {state[name]!r}")


def reopen(source: Records, state: RunState) -> Records:
    """Return the source at the versions that the state names: the same data sets and the same selection.

    Raises:
        ObjectChanged: The state is of other data sets, of another selection, or of a version whose contents differ.
    """
    if [part.dataset_id for part in state.parts] != [part.dataset_id for part in source.parts]:
        raise ObjectChanged(
            "the state is of another data set",
            url=source.url,
            expected=", ".join(part.dataset_id for part in state.parts),
            found=", ".join(part.dataset_id for part in source.parts),
        )
    versions = [part.version for part in state.parts]
    reopened = source if versions == [part.version for part in source.parts] else source.at_versions(versions)
    for expected, part in zip(state.parts, reopened.parts, strict=True):
        if part.fingerprint != expected.fingerprint:
            raise ObjectChanged(
                f"version {part.version} is not the one that the state was saved on",
                url=source.url,
                expected=expected.fingerprint,
                found=part.fingerprint,
            )
        if part.selection != expected.selection:
            raise ObjectChanged(
                "the state is of another selection of the data set's records, or of documents packed in another way",
                url=source.url,
                expected=expected.selection or "all records",
                found=part.selection or "all records",
            )
    return reopened
