"""Checkpoints in the local folder of a run: whose they are, and those whose upload has not ended.

The store and the local folder have the same random id, in the file run.json of each. A local checkpoint has a mark, the
file not-uploaded.json, from its commit until its upload has ended. So the uploads that a failure or a kill has left
undone are known, and are repeated after the next save.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from tiercache.checkpoint.inventory import CheckpointStores
from tiercache.checkpoint.layout import (
    MANIFEST_NAME,
    NOT_UPLOADED_NAME,
    RUN_NAME,
    Manifest,
    checkpoint_objects,
    manifest_key,
    written_order,
)
from tiercache.checkpoint.retention import Retention
from tiercache.checkpoint.writer import CheckpointWriter, TaskThread, may_be_committed
from tiercache.crash_points import crash_point
from tiercache.errors import CommitConflict, CorruptCheckpoint, NotFound, StoreError
from tiercache.keep import PIN_NAME
from tiercache.store import LocalFolder, Store

logger = logging.getLogger("tiercache")


class LocalCopies:
    """The local copies of the checkpoints of one run.

    Args:
        store: Store of the local folder.
        remote_store: Store of the run's URL.
    """

    def __init__(self, store: LocalFolder, remote_store: Store) -> None:
        self.store, self.remote_store = store, remote_store

    def check(self) -> None:
        """Raise ValueError if the folder has copies of other checkpoints, which would be loaded and deleted.

        The ids are compared, and not URLs, so that store and folder may be moved or mounted elsewhere. Raises
        StoreError if the store cannot be asked now.
        """
        mine = _run_id(self.store)
        theirs = _run_id(self.remote_store) if mine else ""
        # A store that has checkpoints and no id is the right one: a rule of tiers has moved the file.
        if mine != theirs and (theirs or not checkpoint_objects(self.remote_store.list())):
            root = self.store.root
            raise ValueError(
                f"local={str(root)!r} has local copies of other checkpoints than those at {self.remote_store.url}: "
                f"give each run a local folder of its own. If these are its copies, because the checkpoints at the "
                f"URL were deleted, delete {root / RUN_NAME}"
            )

    def take(self) -> None:
        """Give the store and the folder the same id, and check it. Raises ValueError as check().

        A full disk, or a store that fails, is not an error here, because the save itself reports it.
        """
        with suppress(StoreError):
            self.check()
            text = json.dumps({"id": _run_id(self.store) or secrets.token_hex(16)}).encode("ascii")
            if not self.remote_store.put_if_absent(RUN_NAME, text):
                text = self.remote_store.get(RUN_NAME)
            self.store.put_if_absent(RUN_NAME, text)
            self.check()

    def mark(self, name: str) -> None:
        """Mark a checkpoint, before its local commit, as one whose upload has not ended. Raises StoreError."""
        # The folder has no id yet if the store could not be reached: then the URL stands for the run.
        run = _run_id(self.store) or self.remote_store.url
        self.store.put(_mark_key(name), json.dumps({"id": run}).encode("ascii"))
        crash_point("checkpoint_upload.marked")

    def unmark(self, name: str) -> None:
        """Remove the mark of a checkpoint, which is at the store, or which nobody shall upload."""
        with suppress(StoreError):  # the next look for marks finds the checkpoint at the store
            self.store.delete([_mark_key(name)])

    def find_marked(self, is_wanted: Callable[[str], bool]) -> set[str]:
        """Return the names of the checkpoints of this run that are committed in the folder and have a mark.

        Args:
            is_wanted: Function of a name that says whether it counts.

        Raises:
            ValueError: The folder has copies of other checkpoints.
            StoreError: A store failed.
        """
        marked = {
            name
            for name, objects in checkpoint_objects(self.store.list()).items()
            if MANIFEST_NAME in objects and NOT_UPLOADED_NAME in objects and is_wanted(name)
        }
        if marked:
            self.take()
            run = _run_id(self.store)
            ids = (run, self.remote_store.url) if run and run == _run_id(self.remote_store) else ()
            marked = {name for name in marked if _run_id(self.store, _mark_key(name)) in ids}
        return marked

    def upload(self, manifest: Manifest, writer: CheckpointWriter, commit: Callable[[Manifest], None]) -> None:
        """Upload a checkpoint that is committed in the folder, commit it at the store, and remove its mark.

        If this fails, the files that are at the store stay: a later upload writes them again, or they are collected.

        Args:
            manifest: Manifest of the checkpoint.
            writer: Writer of files to the store.
            commit: The writer's commit, or its commit_late if later checkpoints exist.

        Raises:
            StoreError, CorruptCheckpoint, CommitConflict: See CheckpointWriter. NotFound: it was deleted meanwhile.
        """
        try:
            writer.upload(manifest, self.store)
            pin_key = f"{manifest.name}/{PIN_NAME}"
            with suppress(NotFound):  # pinned since it was saved
                self.remote_store.put(pin_key, self.store.get(pin_key))
            # NotFound: it was deleted meanwhile, and must not come back
            self.store.head(manifest_key(manifest.name))
            commit(manifest)
        except BaseException as error:
            if not may_be_committed(error):
                writer.shared.release(manifest.name)
            raise
        self.unmark(manifest.name)
        crash_point("checkpoint_upload.unmarked")


@dataclass(frozen=True, slots=True)
class LateUpload:
    """A late upload that runs now, among the unfinished saves of a process."""

    name: str
    error: None = None


class LateUploads:
    """Uploads of marked checkpoints that have no running save: one at a time, in a thread, so that no save waits.

    `current` is set and cleared in the housekeeping thread only.

    Args:
        copies: Local copies of the run.
        writer: Writer of files to the store.
        stores: Stores of the checkpoints.
        retention: Rules of the run: what they do not keep at the store is not uploaded.
        housekeeping: Housekeeping thread.
        on_upload: Function of the name, which the housekeeping thread calls after each upload.

    Attributes:
        current: Upload that runs now; None: there is none.
    """

    def __init__(
        self,
        copies: LocalCopies,
        writer: CheckpointWriter,
        stores: CheckpointStores,
        retention: Retention,
        housekeeping: TaskThread,
        on_upload: Callable[[str], None],
    ) -> None:
        self._copies, self._writer, self._stores, self._retention = copies, writer, stores, retention
        self._housekeeping, self._on_upload = housekeeping, on_upload
        self._uploading = TaskThread("tiercache-checkpoint-late-upload")
        self._n_failures: Counter[str] = Counter()  # by name: one that always fails must not stop the others
        self.current: LateUpload | None = None

    def join(self) -> None:
        """Wait until no upload runs and none follows."""
        while self.current is not None:
            self._uploading.join()
            self._housekeeping.join()

    def begin(self, saving: Collection[str], newest: tuple[float, str]) -> None:
        """Begin to upload the oldest marked checkpoint that the rules keep at the store, unless one is uploaded now.

        Of several, one whose upload has failed less often comes first.

        Its files at the store are overwritten, so no collection may delete them meanwhile as leftovers. Therefore the
        housekeeping thread calls this, after a collection: what is left at the store is younger than the age of
        collection, and from now on the checkpoint is one of the unfinished saves.

        Args:
            saving: Names of the checkpoints that a save writes or uploads now.
            newest: written_order() of the checkpoint committed last: only older ones are uploaded, so a failed upload
                is repeated after the next save, which has raised its error.

        Raises:
            StoreError: A store failed.
            ValueError: The local folder has copies of other checkpoints.
        """
        if self.current is not None:
            return
        marked = self._copies.find_marked(lambda name: name not in saving and written_order(name) < newest)
        if not marked:
            return
        scan = self._stores.scan()
        copies = [copy for name in marked for copy in scan.copies.get(name, ())]
        at_store = {copy.name for copy in copies if copy.tier == "remote" and copy.is_committed}
        for name in at_store:  # the process was killed after the commit
            self._copies.unmark(name)
        for name in sorted(self._retention.plan(scan).missing, key=lambda one: self._n_failures[one]):
            copy = scan.complete(name)[0]
            if name in marked - at_store and copy.tier == "local" and copy.manifest is not None:
                self.current = LateUpload(name)
                try:
                    self._uploading.submit(partial(self._upload, copy.manifest))
                except RuntimeError:  # no thread can be started: the next commit tries again
                    self.current = None
                return

    def _upload(self, manifest: Manifest) -> None:
        name, is_uploaded = manifest.name, False
        try:
            self._copies.upload(manifest, self._writer, self._writer.commit_late)
            is_uploaded = True
        except Exception as error:  # noqa: BLE001 -- top of a thread
            url = self._copies.remote_store.url
            logger.warning("%s: the earlier checkpoint %s was not uploaded: %s", url, name, error)
            self._n_failures[name] += 1
            if isinstance(error, CorruptCheckpoint | CommitConflict):
                self._copies.unmark(name)  # it would fail each time
        try:
            self._housekeeping.submit(partial(self._end, name, is_uploaded=is_uploaded))
        except RuntimeError:  # no thread can be started
            self.current = None

    def _end(self, name: str, *, is_uploaded: bool) -> None:
        self.current = None
        if is_uploaded:  # else the next commit tries again
            self._on_upload(name)


def _mark_key(name: str) -> str:
    return f"{name}/{NOT_UPLOADED_NAME}"


def _run_id(store: Store, key: str = RUN_NAME) -> str:
    """Return the random id of the run whose checkpoints a store has; "" if it has none. Raises StoreError."""
    try:
        return str(json.loads(store.get(key))["id"])
    except (NotFound, ValueError, KeyError, TypeError):
        return ""
