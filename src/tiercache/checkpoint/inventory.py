"""Which checkpoints exist: the objects of each tier, their manifests and pins; and to which run a local folder belongs.

A tier of checkpoints is a store: "local" (a folder of this machine) or "remote" (the URL). A scan lists each store
once; a manifest is immutable, so that a process reads it once.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal, TypeAlias

from tiercache.checkpoint.layout import (
    MANIFEST_NAME,
    RUN_NAME,
    Manifest,
    checkpoint_objects,
    did_you_mean,
    key_of,
    manifest_key,
    name_of_metrics,
    parse_choice,
    parse_manifest,
    parse_name,
    written_order,
)
from tiercache.errors import CorruptCheckpoint, NotFound, StoreError, UnsupportedFormat
from tiercache.keep import PIN_NAME, UNREADABLE_PIN, encode_pin, parse_pin
from tiercache.model import OWN_FOLDER, ObjectInfo
from tiercache.store import LocalFolder, Store
from tiercache.store.placement import is_archived

CheckpointTier: TypeAlias = str
"""Name of a tier: "local", "remote", or a tier of a rule file to which the tier engine has moved checkpoints."""
CheckpointState: TypeAlias = Literal["complete", "saving", "failed", "incomplete", "archived", "moved"]

_THREADS = 16
_AT = "at "  # of the id of a folder whose store did not answer

logger = logging.getLogger("tiercache")


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointCopy:
    """The objects of one checkpoint in one tier.

    Attributes:
        tier: "local", "remote", or the tier of the rule file to which the checkpoint was moved.
        store: Store of the tier.
        name: Name of the checkpoint.
        objects: Objects in the checkpoint's folder by path.
        manifest: Manifest; None if there is none, or if it cannot be read.
        problem: Reason why the copy is not complete: a file is missing, or has another size; "" for a complete copy.
        pin: Reason of its pin in this tier, "" without one; None: it is not pinned here.
        is_archived: Whether the manifest must be restored before it can be read.
        is_unseen: Whether the tier could not be asked: only the placement states that the checkpoint is there.
    """

    tier: CheckpointTier
    store: Store
    name: str
    objects: Mapping[str, ObjectInfo]
    manifest: Manifest | None
    problem: str
    pin: str | None = None
    is_archived: bool = False
    is_unseen: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether the checkpoint is committed in this tier, and all its files exist with their sizes."""
        return self.manifest is not None and not self.problem

    @property
    def is_committed(self) -> bool:
        """Whether the tier has a manifest of the checkpoint, readable or not."""
        return MANIFEST_NAME in self.objects

    @property
    def url(self) -> str:
        """URL of the checkpoint's folder."""
        return f"{self.store.url}/{self.name}"


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint as `Checkpoints.list()` describes it.

    Attributes:
        name: Name of the checkpoint.
        step: Step of the training run.
        created_s: Time at which the save began, in seconds since the Unix epoch.
        state: "complete" (committed in one tier or more), "saving", "failed" (its save ended with an error),
            "incomplete" (an unfinished save of another process, or a corrupt checkpoint), "archived" (it must be
            restored before it can be read) or "moved" (to a tier that cannot be asked now).
        tiers: Tiers that have a complete copy: "local", "remote", and those to which the tier engine has moved it.
        n_bytes: Size of all files; 0 if unknown.
        metrics: Metrics by name.
        is_pinned: Whether the checkpoint is pinned.
        why_pinned: Reason of the pin.
        kept_by: Rules that keep it in each tier, as text.
        note: JSON value of the user.
        error: Reason of the state "failed", "incomplete", "archived" or "moved"; "" otherwise.
    """

    name: str
    step: int
    created_s: float
    state: CheckpointState
    tiers: tuple[CheckpointTier, ...] = ()
    n_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_pinned: bool = False
    why_pinned: str = ""
    kept_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    note: Any = None
    error: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """One listing of all tiers.

    Attributes:
        copies: Copies of each checkpoint folder by name, written first to last; the nearest tier comes first.
        departed: Checkpoints that were at the URL, and that another program has moved or deleted: only their metrics
            are left there.
        url: URL of the farthest tier.
        hint: What else is stored there if there are no checkpoints.
        kept_metrics: Metrics, by name, of checkpoints whose manifest cannot be read now.
        unasked: Reason why there may be further checkpoints: which tier could not be asked; "" if there are none.
    """

    copies: Mapping[str, Sequence[CheckpointCopy]]
    departed: frozenset[str] = frozenset()
    url: str = ""
    hint: str = ""
    kept_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unasked: str = ""

    def complete(self, name: str) -> list[CheckpointCopy]:
        """Return the complete copies of a checkpoint, the nearest first."""
        return [copy for copy in self.copies.get(name, ()) if copy.is_complete]

    def problems_after(self, name: str) -> list[str]:
        """Return why committed checkpoints that were written after this one cannot be loaded, one text for each."""
        later = [other for other in self.copies if written_order(other) > written_order(name)]
        return [
            f"{copy.url}: {copy.problem or 'its manifest cannot be read'}"
            for other in later
            if other not in self.loadable_names
            for copy in self.copies[other][:1]
            if copy.is_committed
        ]

    def manifest(self, name: str) -> Manifest | None:
        """Return the manifest of a checkpoint from any of its tiers; None if none can be read."""
        return next((copy.manifest for copy in self.copies.get(name, ()) if copy.manifest is not None), None)

    def metrics(self, name: str) -> Mapping[str, float] | None:
        """Return the metrics of a checkpoint; None if they are not known."""
        manifest = self.manifest(name)
        return self.kept_metrics.get(name) if manifest is None else manifest.metrics

    def pin(self, name: str) -> str | None:
        """Return the reason of the pin of a checkpoint, in whichever tier; None if it is not pinned."""
        found = [copy.pin for copy in self.copies.get(name, ()) if copy.pin is not None]
        return max(found, key=len, default=None)

    @property
    def complete_names(self) -> list[str]:
        """Names of the checkpoints that are complete in some tier, written first to last."""
        return [name for name in self.copies if self.complete(name)]

    @property
    def loadable_names(self) -> list[str]:
        """Names of the checkpoints that are complete in some tier, or that are archived or unseen in one, in order."""
        return [
            name
            for name, copies in self.copies.items()
            if any(copy.is_complete or copy.is_archived or copy.is_unseen for copy in copies)
        ]


class CheckpointStores:
    """The stores that have the checkpoints of one run. Thread-safe: the lock guards the manifests that were read.

    Args:
        tiers: Store of each tier, the nearest first.
        manifests: Manifests that are known already, by tier and name of the checkpoint; those that are read are added.
    """

    def __init__(
        self, tiers: Mapping[CheckpointTier, Store], manifests: dict[tuple[str, str], Manifest] | None = None
    ) -> None:
        self.tiers = dict(tiers)
        self._manifests = {} if manifests is None else manifests
        self._lock = Lock()

    def scan(self) -> Scan:
        """List all tiers, and read the pins, and the manifests that are not known yet."""
        found: dict[str, list[CheckpointCopy]] = {}
        departed: set[str] = set()
        url, hint = "", ""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="tiercache-checkpoints") as pool:
            for tier, store in self.tiers.items():
                listed = list(store.list())
                folders = checkpoint_objects(listed)
                departed = {name for info in listed if (name := name_of_metrics(info.key))} - folders.keys()
                url, hint = store.url, _foreign_objects(store.url, listed)
                with self._lock:
                    for gone in [key for key in self._manifests if key[0] == tier and key[1] not in folders]:
                        del self._manifests[gone]
                read = [pool.submit(self._copy, tier, name, objects) for name, objects in folders.items()]
                for copy in (future.result() for future in read):
                    found.setdefault(copy.name, []).append(copy)
        ordered = {name: found[name] for name in sorted(found, key=written_order)}
        return Scan(ordered, frozenset(departed), url, "" if ordered else hint)

    def _copy(self, tier: CheckpointTier, name: str, objects: Mapping[str, ObjectInfo]) -> CheckpointCopy:
        store, manifest, pin, archived = self.tiers[tier], None, None, False
        problem = "it has no manifest: its save is not finished"
        if MANIFEST_NAME in objects:
            try:
                manifest = self.manifest(tier, name)
                problem = missing_file(manifest, objects)
            except (CorruptCheckpoint, UnsupportedFormat) as error:
                problem = error.message
            except NotFound:
                problem = "it was deleted just now"
            except StoreError as error:
                if not is_archived(error):
                    raise
                problem, archived = "it is archived: it must be restored before it can be read", True
        if PIN_NAME in objects:
            try:
                pin = parse_pin(store.get(f"{name}/{PIN_NAME}"))
            except NotFound:
                pass
            except StoreError as error:
                if not is_archived(error):
                    raise
                pin = UNREADABLE_PIN
        return CheckpointCopy(tier, store, name, objects, manifest, problem, pin, is_archived=archived)

    def manifest(self, tier: CheckpointTier, name: str) -> Manifest:
        """Return the manifest of a checkpoint in a tier; it is read once."""
        with self._lock:
            known = self._manifests.get((tier, name))
        if known is not None:
            return known
        store = self.tiers[tier]
        key = manifest_key(name)
        found = parse_manifest(store.get(key), f"{store.url}/{key}")
        if found.name != name:
            raise CorruptCheckpoint(f"it is the manifest of {found.name}", url=f"{store.url}/{key}", part="manifest")
        with self._lock:
            self._manifests[tier, name] = found
        return found

    @staticmethod
    def set_pin(scan: Scan, name: str, why: str | None) -> None:
        """Pin a checkpoint in every tier that has it, or unpin it. why: Reason of the pin; None: it is removed.

        Raises:
            StoreError: A tier could not be written; the others may have the change already.
        """
        for copy in scan.copies[name]:
            if copy.is_committed and (why is not None or copy.pin is not None):
                copy.store.put(f"{name}/{PIN_NAME}", encode_pin(why))


def check_run(local: LocalFolder, remote: Store) -> None:
    """Raise ValueError if a local folder has copies of other checkpoints, which would be loaded and deleted.

    Ids are compared, and not URLs, so that store and folder may be moved or mounted elsewhere. Raises StoreError if the
    store cannot be asked now.
    """
    mine = _run_id(local)
    if mine in ("", _id_without_store(remote)):
        return
    theirs = _run_id(remote)
    # A store that has checkpoints and no id is the right one: a rule of tiers has moved the file.
    if mine != theirs and (theirs or mine.startswith(_AT) or not checkpoint_objects(remote.list())):
        raise ValueError(
            f"local={str(local.root)!r} has local copies of other checkpoints than those at {remote.url}: give each run"
            f" a local folder of its own. If these are its copies, because the checkpoints at the URL were deleted,"
            f" delete {local.root / RUN_NAME}"
        )


def take_run(local: LocalFolder, remote: Store) -> bool:
    """Give a store and its local folder the same id. While the store does not answer, its URL is the id of the folder.

    Returns:
        Whether both have the id.

    Raises:
        ValueError: The folder has copies of other checkpoints.
        StoreError: The folder could not be written.
    """
    mine = _run_id(local)
    try:
        check_run(local, remote)
        theirs = secrets.token_hex(16) if mine in ("", _id_without_store(remote)) else mine
        if not remote.put_if_absent(RUN_NAME, _run_text(theirs)):
            theirs = _run_id(remote)
    except StoreError as error:
        logger.warning("%s does not answer, and has no id in common with its local folder yet: %s", remote.url, error)
        if not mine:
            local.put(RUN_NAME, _run_text(_id_without_store(remote)))
        return False
    if mine != theirs:
        local.put(RUN_NAME, _run_text(theirs))
    check_run(local, remote)
    return True


def _id_without_store(remote: Store) -> str:
    return f"{_AT}{remote.url}"


def _run_text(run: str) -> bytes:
    return json.dumps({"id": run}).encode("ascii")


def _run_id(store: Store) -> str:
    """Return the id of the run whose checkpoints a store has; "" if it has none. Raises StoreError."""
    try:
        return str(json.loads(store.get(RUN_NAME))["id"])
    except (NotFound, ValueError, KeyError, TypeError):
        return ""


def missing_file(manifest: Manifest, objects: Mapping[str, ObjectInfo]) -> str:
    """Return which file of a checkpoint is missing or has another size than the manifest states; "" if none is.

    objects: Objects in the checkpoint's folder by path.
    """
    for file in manifest.files:
        key, info = key_of(manifest.name, file.path), objects.get(file.path)
        if file.path.startswith("../"):  # outside the folder: load() and verify() look for it
            continue
        if info is None:
            return f"{key} is missing"
        if info.n_bytes != file.n_bytes:
            return f"{key} has {info.n_bytes} bytes, and the manifest states {file.n_bytes}"
    return ""


def _foreign_objects(url: str, listed: Sequence[ObjectInfo]) -> str:
    """Return what is stored at a URL without checkpoints, for messages: the URL of a checkpoint, runs, or others."""
    if parse_name(url.rpartition("/")[2]) is not None and any(info.key == MANIFEST_NAME for info in listed):
        return f"this is the URL of a checkpoint; that of its run is {url.rpartition('/')[0]}"
    paths = [info.key.rsplit("/", 2) for info in listed if info.key.endswith(f"/{MANIFEST_NAME}")]
    runs = sorted({path[0] for path in paths if len(path) == 3 and parse_name(path[1]) is not None})
    if runs:
        more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
        return f"there are runs in folders below this URL: {', '.join(runs[:3])}{more}"
    own = (RUN_NAME, OWN_FOLDER)
    other = next((info.key for info in listed if not info.key.startswith(own)), None)
    if other is not None:
        return f"there are only other objects, such as {other}; `tiercache ckpt ls URL` lists those of other libraries"
    return ""


def resolve(scan: Scan, which: str | int) -> str:
    """Return the name of the checkpoint that `which` refers to.

    Args:
        scan: Listing of the checkpoints.
        which: "latest", the checkpoint written last; "best:METRIC" or "best:METRIC:max"; a step (of several checkpoints
            of one step, the one written last); or a name.

    Raises:
        NotFound: There is no such complete checkpoint; the message lists what there is.
        StoreError: Which one it is cannot be known: a tier could not be asked, or metrics are not known.
        ValueError, TypeError: `which` is none of these.
    """
    names = scan.loadable_names
    metrics = sorted({metric for name in names for metric in scan.metrics(name) or ()})
    try:
        choice = parse_choice(which)
    except ValueError as error:
        options = ["latest", *(f"best:{metric}" for metric in metrics), *names]
        raise ValueError(f"{error}{did_you_mean(str(which), options)}") from None
    if scan.unasked and not (choice.kind == "name" and choice.text in names):
        raise StoreError(f"which checkpoint is {str(which)!r} cannot be known: {scan.unasked}", url=scan.url)
    if choice.kind == "latest":
        found, what = names, ""
    elif choice.kind == "step":
        found, what = [name for name in names if _step(name) == choice.step], f" of step {choice.step}"
    elif choice.kind == "best":
        found, what = _best(scan, names, choice.text, choice.mode), f" with the metric {choice.text!r}"
        what += did_you_mean(choice.text, metrics)
    else:
        found, what = [name for name in names if name == choice.text], f" called {choice.text}"
        what += did_you_mean(choice.text, names)
    if not found:
        raise NotFound(f"no complete checkpoint{what}; {_listed(scan, metrics)}", url=scan.url)
    return found[-1]


def _best(scan: Scan, names: Iterable[str], metric: str, mode: str) -> list[str]:
    """Return the complete checkpoints with the metric, the best last; of equal values, the one written last."""
    sign = 1 if mode == "max" else -1
    scored = []
    for number, name in enumerate(names):
        metrics = scan.metrics(name)
        if metrics is None:
            problem = next((copy.problem for copy in scan.copies[name] if copy.problem), "")
            raise StoreError(
                f"which checkpoint has the best {metric!r} cannot be known: the metrics of {name} are not known"
                f" ({problem}); restore it, or load a checkpoint by its step or name",
                url=scan.url,
            )
        value = metrics.get(metric)
        if value is not None and value == value:  # NaN is no score
            scored.append((sign * value, number, name))
    return [name for *_, name in sorted(scored)]


def _step(name: str) -> int:
    parsed = parse_name(name)
    return -1 if parsed is None else parsed[0]


def _listed(scan: Scan, metrics: Sequence[str]) -> str:
    names = scan.loadable_names
    if not names and scan.copies:
        name = [*scan.copies][-1]
        return f"there are only incomplete ones ({len(scan.copies)}): the last, {name}: {scan.copies[name][0].problem}"
    if not names:
        expected = f"expected folders step-.../ with a {MANIFEST_NAME}, which save() writes"
        return f"there are no checkpoints at this URL: {scan.hint or expected}"
    steps = ", ".join(str(_step(name)) for name in names[-5:])
    return f"the last of {len(names)} have the steps {steps}" + (f", metrics: {', '.join(metrics)}" if metrics else "")
