"""Which checkpoints of a run exist: the objects of each tier, their manifests and pins; and whose a local folder is.

A tier of checkpoints is a store: "local" (a folder of this machine), "remote" (the URL), or a tier to which the tier
engine has moved checkpoints. A scan lists each store once; a manifest is immutable, so that a process reads it once.
"""

from __future__ import annotations

import json
import logging
import operator
import os
import secrets
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any, Literal, TypeAlias

from tiercache.checkpoint.format import (
    MANIFEST_NAME,
    RUN_NAME,
    Manifest,
    checkpoint_objects,
    manifest_key,
    metrics_key,
    name_of_metrics,
    parse_manifest,
    parse_metrics,
    parse_name,
    written_order,
)
from tiercache.checkpoint.writer import in_parallel
from tiercache.errors import ArchivedShards, CorruptCheckpoint, CorruptShard, NotFound, StoreError, UnsupportedFormat
from tiercache.keep import PIN_NAME, UNREADABLE_PIN, parse_pin
from tiercache.model import OWN_FOLDER, ObjectInfo
from tiercache.store import LocalFolder, Store, open_store, redact
from tiercache.store.placement import (
    FileLocator,
    FolderTiers,
    archived_file_error,
    is_archived,
    is_remote,
    is_same_service,
    options_of,
)

CheckpointTier: TypeAlias = str
"""Name of a tier: "local", "remote", or a tier of a rule file to which the tier engine has moved checkpoints."""

_THREADS = 16
_OWN_TIERS = ("local", "remote")
_AT = "at "  # of the id of a folder whose store did not answer

logger = logging.getLogger("tiercache")


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointCopy:
    """The objects of one checkpoint in one tier.

    Attributes:
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
        return self.manifest is not None and not self.problem

    @property
    def is_committed(self) -> bool:
        """Whether the tier has a manifest of the checkpoint, readable or not."""
        return MANIFEST_NAME in self.objects

    @property
    def url(self) -> str:
        return f"{self.store.url}/{self.name}"


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


class RunStores:
    """The stores that have the checkpoints of one run. Thread-safe: the lock guards the manifests that were read.

    The other tiers, to which the tier engine has moved checkpoints, are those of the rule file that applies to the
    working folder, and those that the placement names: that of the home above the URL, or of the home to which a marker
    of the URL's tier leads.

    Args:
        tiers: Store of each own tier, the nearest first; the last one is that of the URL. The caller closes them.
        options: Options of the URL's store; None: not known, so that no store of another tier is opened with them.
    """

    def __init__(self, tiers: Mapping[CheckpointTier, Store], options: Mapping[str, Any] | None = None) -> None:
        self.tiers = dict(tiers)
        self.nearest, *_, self.remote = *tiers.values(), *tiers.values()
        url = self.remote.url
        self._url = url if "://" in url else os.path.abspath(url)  # noqa: PTH100 - resolve() would follow links
        self._options = None if options is None else dict(options)
        self._locator = FileLocator(self._open)
        self._manifests: dict[tuple[str, str], Manifest] = {}
        self._lock = Lock()

    def close(self) -> None:
        self._locator.close()

    def scan(self) -> Scan:
        """List the own tiers, and read the pins, and the manifests that are not known yet."""
        return self._scan(self.tiers)

    def scan_to_load(self, which: str | int) -> Scan:
        """Return the checkpoints of all tiers; only the local ones, with a warning, if the store cannot be reached."""
        try:
            scan = self.scan()
        except StoreError as error:
            if self.nearest is self.remote:
                raise
            scan = self._scan({"local": self.nearest})
            if not scan.complete_names:
                raise
            message = f"{self.remote.url}: cannot be listed ({error}); only local checkpoints are considered"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            return scan
        if isinstance(which, str) and scan.complete(which):  # by its name
            return scan
        return self.with_other_tiers(scan, which)

    def with_other_tiers(self, scan: Scan, which: str | int | None = None) -> Scan:
        """Add the checkpoints in other tiers to a scan. which: Choice for which it is made; None: all are described."""
        others, unasked = self._find_other_tiers()
        placed: dict[str, set[str]] = {}  # names of the checkpoints that the placement states to be at each URL
        for key, url in others.placed.items():
            placed.setdefault(url, set()).add(key.partition("/")[0])
        copies = {name: [*found] for name, found in scan.copies.items()}
        for tier, url in others.urls.items():
            try:
                found = self._list_tier(tier, self._store_at(url))[0]
            except StoreError as error:
                problem = f"the tier {tier} could not be asked: {error}"
                names = sorted(filter(parse_name, placed.get(url, ())))
                unseen = partial(CheckpointCopy, tier, self.remote, objects={}, manifest=None, problem=problem)
                found = [unseen(name=name, is_unseen=True) for name in names]
                if others.home in (None, url):  # no placement states what is there
                    unasked = unasked or problem
            for copy in found:
                copies.setdefault(copy.name, []).append(copy)
        copies = {name: copies[name] for name in sorted(copies, key=written_order)}
        merged = replace(scan, copies=copies, unasked=unasked, hint="" if copies else scan.hint)
        if which is None or (isinstance(which, str) and which.startswith("best:")):
            unread = [name for name in merged.loadable_names if merged.manifest(name) is None]
            kept = in_parallel([partial(self._kept_metrics, name) for name in unread], _THREADS)
            known = {name: some for name, some in zip(unread, kept, strict=True) if some is not None}
            merged = replace(merged, kept_metrics=known)
        return merged

    def open_copy(self, scan: Scan, name: str) -> tuple[Manifest, Store]:
        """Return manifest and store of the nearest complete copy. The caller closes the store of another tier."""
        for copy in scan.copies[name]:
            if copy.manifest is not None and copy.is_complete:
                if copy.store is self.remote:
                    return copy.manifest, copy.store
                return copy.manifest, self._open(self._find_other_tiers()[0].urls[copy.tier])
        for copy in scan.copies[name]:
            if copy.is_archived:
                raise archived_error(copy)
        raise StoreError(scan.copies[name][0].problem, url=f"{self.remote.url}/{name}")

    def _scan(self, tiers: Mapping[CheckpointTier, Store]) -> Scan:
        found: dict[str, list[CheckpointCopy]] = {}
        listed: list[ObjectInfo] = []
        for tier, store in tiers.items():
            copies, listed = self._list_tier(tier, store)
            for copy in copies:
                found.setdefault(copy.name, []).append(copy)
        departed = {name for info in listed if (name := name_of_metrics(info.key))} - checkpoint_objects(listed).keys()
        ordered = {name: found[name] for name in sorted(found, key=written_order)}
        url = [*tiers.values()][-1].url
        return Scan(ordered, frozenset(departed), url, "" if ordered else _foreign_objects(url, listed))

    def _list_tier(self, tier: CheckpointTier, store: Store) -> tuple[list[CheckpointCopy], list[ObjectInfo]]:
        listed = list(store.list())
        folders = checkpoint_objects(listed)
        with self._lock:
            for gone in [key for key in self._manifests if key[0] == tier and key[1] not in folders]:
                del self._manifests[gone]
        return in_parallel([partial(self._copy, tier, store, *one) for one in folders.items()], _THREADS), listed

    def _copy(self, tier: CheckpointTier, store: Store, name: str, objects: Mapping[str, ObjectInfo]) -> CheckpointCopy:
        manifest, pin, archived = None, None, False
        problem = "it has no manifest: its save is not finished"
        if MANIFEST_NAME in objects:
            try:
                manifest = self._read_manifest(tier, store, name)
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

    def _read_manifest(self, tier: CheckpointTier, store: Store, name: str) -> Manifest:
        with self._lock:
            known = self._manifests.get((tier, name))
        if known is not None:
            return known
        url = f"{store.url}/{manifest_key(name)}"
        found = parse_manifest(store.get(manifest_key(name)), url)
        if found.name != name:
            raise CorruptCheckpoint(f"it is the manifest of {found.name}", url=url, part="manifest")
        with self._lock:
            self._manifests[tier, name] = found
        return found

    def _kept_metrics(self, name: str) -> Mapping[str, float] | None:
        """Return the metrics of a checkpoint whose manifest cannot be read; None if they are not known."""
        try:
            return parse_metrics(self.remote.get(metrics_key(name)))
        except StoreError as error:
            if isinstance(error, NotFound) or is_archived(error):
                return None
            raise

    # -- other tiers

    def _find_other_tiers(self) -> tuple[FolderTiers, str]:
        """Return the other tiers that may have checkpoints, and why the placement could not be read ("": it was)."""
        follows, problem = self._options is not None or not is_remote(self._url), ""
        try:
            found = self._locator.find_tiers(self._url, follows_placement=follows)
        except (StoreError, CorruptShard, UnsupportedFormat, ValueError) as error:
            problem = f"the placement of moved checkpoints cannot be read: {error}"
            found = self._locator.find_tiers(self._url, follows_placement=False)
        urls = {redact(url) if name in _OWN_TIERS else name: url for name, url in found.urls.items()}
        return replace(found, urls=urls), problem

    def _open(self, url: str) -> Store:
        own = self._options if self._options and is_same_service(url, self._url) else {}
        return open_store(url, **(own | options_of(url)))

    def _store_at(self, url: str) -> Store:
        """Return the store of a folder in another tier, opened once. Raises StoreError if it cannot be opened."""
        try:
            return self._locator.store(url)
        except ValueError as error:
            raise StoreError(f"its store cannot be opened: {error}", url=redact(url)) from error


def archived_error(copy: CheckpointCopy) -> ArchivedShards:
    return archived_file_error(copy.url, sum(info.n_bytes for info in copy.objects.values()))


def missing_file(manifest: Manifest, objects: Mapping[str, ObjectInfo]) -> str:
    """Return which file of a checkpoint is missing or has another size than the manifest states; "" if none is.

    objects: Objects in the checkpoint's folder by path.
    """
    for file in manifest.files:
        key, info = f"{manifest.name}/{file.path}", objects.get(file.path)
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


# -- to which run a local folder belongs -------------------------------------------------------------------------------


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
    try:
        return str(json.loads(store.get(RUN_NAME))["id"])
    except (NotFound, ValueError, KeyError, TypeError):
        return ""


# -- which checkpoint of a run -----------------------------------------------------------------------------------------

_CHOICES = "a checkpoint is 'latest', 'best:METRIC', a step or a name"


@dataclass(frozen=True, slots=True)
class Choice:
    kind: Literal["latest", "best", "step", "name"]
    text: str = ""
    step: int = -1
    mode: Literal["min", "max"] = "min"


def parse_choice(which: str | int) -> Choice:
    """Return the choice that "latest", "best:METRIC", "best:METRIC:max", a step (also as text) or a name states."""
    if not isinstance(which, str):
        try:
            if isinstance(which, bool):
                raise TypeError
            return Choice("step", step=operator.index(which))
        except TypeError:
            hint = ": objects to fill are the argument into=" if isinstance(which, Mapping) else ""
            raise TypeError(f"{_CHOICES}, got the {type(which).__name__} {which!r:.60}{hint}") from None
    if which == "latest":
        return Choice("latest")
    if which.startswith("best:"):
        metric, _, mode = which.removeprefix("best:").partition(":")
        if not metric or mode not in ("", "min", "max"):
            raise ValueError(f"expected best:METRIC or best:METRIC:max, as in 'best:val_loss', got {which!r}")
        return Choice("best", metric, mode="max" if mode == "max" else "min")
    if which.isascii() and which.isdecimal():
        return Choice("step", step=int(which))
    if parse_name(which) is not None:
        return Choice("name", which)
    raise ValueError(f"{_CHOICES}, got {which!r}")


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
    choice = parse_choice(which)
    if scan.unasked and not (choice.kind == "name" and choice.text in names):
        raise StoreError(f"which checkpoint is {str(which)!r} cannot be known: {scan.unasked}", url=scan.url)
    if choice.kind == "latest":
        found, what = names, ""
    elif choice.kind == "step":
        found, what = [name for name in names if _step(name) == choice.step], f" of step {choice.step}"
    elif choice.kind == "best":
        found, what = _best(scan, names, choice.text, choice.mode), f" with the metric {choice.text!r}"
    else:
        found, what = [name for name in names if name == choice.text], f" called {choice.text}"
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
