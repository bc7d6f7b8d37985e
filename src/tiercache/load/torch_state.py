"""Conversion of torchdata's states between loaders with different numbers of worker processes.

torchdata writes two kinds of state. Without workers it is flat. With workers it holds a snapshot of the sampler and a
snapshot of the data set for each worker, taken some batches before. Over a map-style data set both name the same
position: the sampler, and how many of its batches were handed out. Over an iterable data set each worker has its own
position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

    Args:
        state: Value that a loader's state_dict() returned.
        n_workers: Number of worker processes of the loader that loads it.
        base_seed: Seed of the workers' random numbers, if the state has none.
        is_iterable: Whether the data set is an iterable one.

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
    found = [part.get(_DATASET) for part in parts if part is not None]
    found += [(part.get(_FETCHER) or {}).get("dataset_iter_state") for part in parts if part is not None]
    return any(one is not None for one in found)


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
