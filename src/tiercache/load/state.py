"""The state of a run: plain values, equal on all ranks, that determine the order; and conversion of torchdata's states.

torchdata writes two kinds of state. Without workers it is flat. With workers it holds a snapshot of the sampler and a
snapshot of the data set for each worker. state_for_workers() converts one into the other.
"""

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
        seed: Seed of the order.
        is_seed_drawn: Whether the seed was drawn for this epoch alone. False: all epochs of the run share the seed, and
            the epoch's number enters the order's keys beside it.
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
    is_seed_drawn: bool = False
    format: int = STATE_FORMAT

    @property
    def key_epoch(self) -> int:
        """Number of the epoch in the keys of its order: 0 under a drawn seed, so that equal seeds give equal epochs."""
        return 0 if self.is_seed_drawn else self.epoch

    def following(self, epoch: int) -> RunState:
        """Return the state at the beginning of another epoch of the run.

        Under a drawn seed it holds a substitute for the seed, because the seed is unknown until iter() draws it. A run
        that does not draw again (several ranks have no common random numbers) uses the substitute.
        """
        seed = self.seed + epoch - self.epoch if self.is_seed_drawn else self.seed
        return replace(self, epoch=epoch, offset=0, seed=seed)

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
        state = {"is_seed_drawn": False, **state}  # States of earlier releases lack the key.
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
    "is_seed_drawn": (_is_flag, "true or false"),
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


# torchdata's keys of a state without workers, and of the snapshot's sampler.
_SHARED = (
    "_index_sampler_state",
    "_sampler_iter_state",
    "_sampler_iter_yielded",
    "_IterableDataset_len_called",
    "_shared_seed",
)
_N_YIELDED, _FETCHER, _DATASET = "_num_yielded", "fetcher_state", "dataset_state"
_FLAT = (*_SHARED, _N_YIELDED, _FETCHER, _DATASET)
# torchdata's keys of a state with workers.
_SNAPSHOT, STEPS_SINCE = "_snapshot", "_steps_since_snapshot"
_STEP, _LAST_WORKER, _MAIN, _WORKERS = (
    "_snapshot_step",
    "_last_yielded_worker_id",
    "_main_snapshot",
    "_worker_snapshots",
)
_N_WORKERS, _BASE_SEED = "_num_workers", "_base_seed"
_FINISHED = "_iterator_finished"


def state_for_workers(state: Mapping[str, Any], n_workers: int, base_seed: int, *, is_iterable: bool) -> dict[str, Any]:
    """Return the state in the form that a loader with n_workers loads; a state of neither form is returned unchanged.

    Returns:
        The state. {}, i.e. a loader that has not begun, for a state at the end of an epoch that holds nothing else.
        Without workers it may have STEPS_SINCE: number of batches to skip after it is loaded.

    Raises:
        ValueError: The state holds a position for each worker.
    """
    has_workers = _SNAPSHOT in state
    if not has_workers and _N_YIELDED not in state:
        return dict(state)
    n_saved = state[_SNAPSHOT][_MAIN][_N_WORKERS] if has_workers else 0
    if n_saved == n_workers:
        return dict(state)
    has_data_set_state = _has_data_set_state(state)
    if is_iterable and state[_FINISHED] and not has_data_set_state:
        return {}
    if is_iterable or has_data_set_state:
        kind = "a data set with a state of its own" if has_data_set_state else "an iterable data set"
        otherwise = "" if has_data_set_state else ", or save the state at the end of an epoch"
        raise ValueError(
            f"the state was saved with num_workers={n_saved} over {kind}, in which each worker has its own position: "
            f"it cannot be loaded with num_workers={n_workers}; make the loader with num_workers={n_saved}{otherwise}"
        )
    if has_workers:
        flat = _flat(state)
        return flat if n_workers == 0 else _with_workers(flat, n_workers, state[_SNAPSHOT][_MAIN][_BASE_SEED])
    return _with_workers(state, n_workers, base_seed)


def _has_data_set_state(state: Mapping[str, Any]) -> bool:
    parts = state[_SNAPSHOT][_WORKERS].values() if _SNAPSHOT in state else [state]
    states = [part.get(_DATASET) for part in parts if part is not None]
    states += [(part.get(_FETCHER) or {}).get("dataset_iter_state") for part in parts if part is not None]
    return any(one is not None for one in states)


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state without workers. It has STEPS_SINCE if the snapshot precedes the last batch handed out."""
    snapshot = state[_SNAPSHOT]
    flat = {key: value for key, value in state.items() if key not in (_SNAPSHOT, STEPS_SINCE)}
    flat |= {key: snapshot[_MAIN][key] for key in _SHARED}
    flat |= {_N_YIELDED: snapshot[_STEP], _FETCHER: None, _DATASET: None}
    return {**flat, STEPS_SINCE: state[STEPS_SINCE]} if state[STEPS_SINCE] else flat


def _with_workers(flat: Mapping[str, Any], n_workers: int, base_seed: int) -> dict[str, Any]:
    others = {key: value for key, value in flat.items() if key not in _FLAT}
    worker_states = {f"worker_{i}": {"worker_id": i, _DATASET: None, _FETCHER: None} for i in range(n_workers)}
    snapshot = {
        _STEP: flat[_N_YIELDED],
        _LAST_WORKER: (flat[_N_YIELDED] - 1) % n_workers,
        _MAIN: {_N_WORKERS: n_workers, **{key: flat[key] for key in _SHARED}, _BASE_SEED: base_seed},
        _WORKERS: worker_states,
    }
    return {STEPS_SINCE: 0, **others, _SNAPSHOT: snapshot}
