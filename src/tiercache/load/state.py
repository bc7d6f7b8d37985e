"""The state of a run: a few hundred bytes of JSON-able values, equal on every rank, from which the order follows."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from tiercache.errors import ObjectChanged, UnsupportedFormat
from tiercache.model import Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.load.source import Source

# 2: streams, several data sets, selections. The order of format 1 (one stream, keyed otherwise) is no longer known.
STATE_FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run stands.

    Attributes:
        parts: what is read, by data set.
        seed, is_seed_drawn: Seed of the order, and whether it was drawn for this epoch alone. False: all epochs of the
            run share the seed, and the epoch's number enters the order's keys beside it.
        epoch, offset: records of that epoch that all ranks together were served; the rest names the order.
        group_bytes, window_bytes: None for "all".
        mixture: how the parts are mixed, as plain values; None: they are not.
    """

    parts: tuple[Part, ...]
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
    is_seed_drawn: bool = False
    format: int = STATE_FORMAT

    @property
    def key_epoch(self) -> int:
        """Number of the epoch in the keys of its order: 0 under a drawn seed, so that equal seeds give equal epochs."""
        return 0 if self.is_seed_drawn else self.epoch

    def following(self, epoch: int) -> RunState:
        """State at the beginning of another epoch of the run.

        Under a drawn seed it holds a substitute for the seed, which nobody knows before iter() draws it. A run that
        does not draw again (several ranks have no common random numbers) uses the substitute.
        """
        seed = self.seed + epoch - self.epoch if self.is_seed_drawn else self.seed
        return replace(self, epoch=epoch, offset=0, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint: as they are after a way through JSON."""
        parts = [[part.dataset_id, part.version, part.fingerprint, part.selection] for part in self.parts]
        # Field by field: dataclasses.asdict copies each value deeply, 60 us of a state that may be taken at every step.
        values = {name: getattr(self, name) for name in _NAMES}
        return {**values, "parts": parts, "mixture": deepcopy(self.mixture)}

    @staticmethod
    def from_dict(state: Any) -> RunState:
        """Read to_dict() back.

        Raises:
            ValueError: not a state of this loader, or a value that cannot be.
            UnsupportedFormat: of another release.
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
        state = {"is_seed_drawn": False, **state}  # states of earlier releases lack the key
        if set(state) != set(_NAMES):
            raise ValueError(
                f"the state's keys are not those of format {STATE_FORMAT}: {sorted(set(_NAMES) ^ set(state))} differ"
            )
        _check_values(state)
        return RunState(**{**state, "parts": tuple(Part(*part) for part in state["parts"])})


_NAMES = tuple(field.name for field in fields(RunState))


def _check_values(state: Mapping[str, Any]) -> None:
    """Raise ValueError, by its name, for a value of a state that cannot be."""
    for name in ("epoch", "offset"):
        _expect(name, state[name], "an integer of 0 or more", _is_count(state[name]))
    _expect(
        "streams", state["streams"], "an integer of 1 or more", _is_count(state["streams"]) and state["streams"] > 0
    )
    seed = state["seed"]
    _expect("seed", seed, "an integer", isinstance(seed, int) and not isinstance(seed, bool))
    for name in ("shuffle", "drop_last", "is_seed_drawn"):
        _expect(name, state[name], "true or false", isinstance(state[name], bool))
    for name in ("group_bytes", "window_bytes"):
        size = state[name]
        _expect(name, size, "null or an integer of 1 or more", size is None or (_is_count(size) and size > 0))
    placement = state["placement"]
    _expect("placement", placement, "'sticky' or 'global'", placement in ("sticky", "global"))
    parts = state["parts"]
    fits = isinstance(parts, list | tuple) and len(parts) > 0 and all(map(_is_part, parts))
    _expect("parts", parts, "a list of [data set, version, fingerprint, selection]", fits)


def _expect(name: str, value: object, what: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"the state's {name} must be {what}, got {value!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_part(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    dataset_id, version, fingerprint, selection = value
    return (
        isinstance(dataset_id, str)
        and _is_count(version)
        and isinstance(fingerprint, str)
        and (selection is None or isinstance(selection, str))
    )


def reopen(source: Source, state: RunState) -> Source:
    """What the state names: the same data sets and choice, of the state's versions.

    Raises:
        ObjectChanged: other data sets, a version that is not the one that was read, or another selection of it.
    """
    if [part.dataset_id for part in state.parts] != [part.dataset_id for part in source.parts]:
        raise ObjectChanged(
            "the state is of another data set",
            url=source.url,
            expected=_listed([part.dataset_id for part in state.parts]),
            found=_listed([part.dataset_id for part in source.parts]),
        )
    versions = [part.version for part in state.parts]
    found = source if versions == [part.version for part in source.parts] else source.at_versions(versions)
    for expected, part in zip(state.parts, found.parts, strict=True):
        if part.fingerprint != expected.fingerprint:
            raise ObjectChanged(
                f"version {part.version} is not the one that the state was saved on",
                url=source.url,
                expected=expected.fingerprint,
                found=part.fingerprint,
            )
        if part.selection != expected.selection:
            raise ObjectChanged(
                "the state is of another selection of the data set's records",
                url=source.url,
                expected=expected.selection or "all records",
                found=part.selection or "all records",
            )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
