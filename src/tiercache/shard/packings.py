"""Records of a packing in its target: what has been finished, so that the same command continues after a kill.

::

    _tiercache/packing/<key>/start-<1>.json    the packing's id, and the newest version of each data set at its start
    _tiercache/packing/<key>/<id>/<task>.json  the shards of a finished task
    _tiercache/packing/<key>/<id>/bad/<task>   its bad records, if it has any: lines of JSON
    _tiercache/packing/<key>/<pass>/...        shards and records of an earlier pass (packer/rearrange.py)

The key is a hash of the source and the options, so that the same command finds its records. The id is the nonce of the
versions that the packing commits, so a packing that was killed after its commit is recognised, and never commits again.
The id is random, or the key if the packing makes new data sets: these are recognised after the records were removed.
Records are put if absent: if two processes run one packing, each task and each commit counts once.
A shard that is listed here belongs to no version yet, and must not be removed before these records are.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from tiercache._native.checksum import crc32c
from tiercache.crash_points import crash_point
from tiercache.errors import NotFound
from tiercache.model import ObjectInfo, ShardInfo
from tiercache.shard.versions import PACKINGS_FOLDER, Version, list_versions, read_version
from tiercache.store.contract import Store
from tiercache.store.numbered_log import NumberedLog

_KEY = re.compile(re.escape(PACKINGS_FOLDER) + "([0-9a-f]{32})/(?:([0-9a-f]{32})/)?")

# Shards of one task by the name of the part that they belong to; "" if the packing has one data set.
TaskShards: TypeAlias = Mapping[str, Sequence[ShardInfo]]


@dataclass(frozen=True)
class Packing:
    """A packing that has begun. Stateless and thread-safe. Methods raise StoreError.

    bases: Number of the newest version of each part when the packing began; 0 for none.
    """

    store: Store
    key: str
    id: str
    bases: Mapping[str, int]

    @property
    def _tasks(self) -> NumberedLog:
        return NumberedLog(self.store, f"{PACKINGS_FOLDER}{self.key}/{self.id}/", ".json")

    def finished(self) -> dict[int, TaskShards]:
        """Return the shards of the finished tasks, by task. A damaged record is removed: its task runs again."""
        found: dict[int, TaskShards] = {}
        for number in self._tasks.numbers():
            shards = _parsed(self._tasks.get(number))
            if shards is None:
                self._tasks.delete([number])
            else:
                found[number - 1] = {part: [ShardInfo(**info) for info in infos] for part, infos in shards.items()}
        return found

    def finish(self, task: int, shards: TaskShards) -> bool:
        """Record the shards of a task. Return False if another process has recorded it with other shards."""
        infos = {part: [asdict(info) for info in of_part] for part, of_part in shards.items()}
        return self._tasks.put(task + 1, _text(infos))

    def bad_key(self, task: int) -> str:
        """Return the key of the object that has the bad records of a task."""
        return f"{PACKINGS_FOLDER}{self.key}/{self.id}/bad/{task}"

    def bad_records(self, task: int) -> bytes:
        """Return the lines of the bad records of a task; b"" if it has none."""
        return _get(self.store, self.bad_key(task)) or b""

    def forget(self, task: int) -> None:
        """Remove the record of a task."""
        self._tasks.delete([task + 1])

    def committed(self, store: Store, part: str) -> Version | None:
        """Return the version that this packing has committed in the store of a part; None before the commit."""
        for number in list_versions(store):
            if number > self.bases[part] and (version := read_version(store, number)).nonce == self.id:
                return version
        return None

    def is_empty(self) -> bool:
        """Return whether there are no records but the first."""
        start = _start_of(self.store, self.key).key(1)
        return all(info.key == start for info in self.store.list(f"{PACKINGS_FOLDER}{self.key}/"))

    def remove(self) -> None:
        """Remove all records. The first one is removed last, because it finds the version of a killed packing."""
        start = _start_of(self.store, self.key)
        prefix = f"{PACKINGS_FOLDER}{self.key}/"
        self.store.delete([info.key for info in self.store.list(prefix) if info.key != start.key(1)])
        crash_point("packing.tasks_removed")
        start.delete([1])


def find_packing(store: Store, key: str) -> Packing | None:
    """Return the packing with this key that has begun, if there is one."""
    found = _parsed(_start_of(store, key).get(1))
    return None if found is None else Packing(store, key, found["id"], found["bases"])


def begin_packing(store: Store, key: str, bases: Mapping[str, int]) -> Packing:
    """Begin a packing, and return it; or the one with this key that has begun before."""
    start = _start_of(store, key)
    if start.get(1) is not None and find_packing(store, key) is None:
        start.delete([1])  # damaged: nothing is known of its tasks
    packing_id = secrets.token_hex(16) if any(bases.values()) else key
    if not start.put(1, _text({"id": packing_id, "bases": dict(bases)})) and (text := start.get(1)):
        store.put(start.key(1), text)  # its age begins anew, so that gc knows that the packing goes on
    packing = find_packing(store, key)
    if packing is None:
        raise NotFound("the packing was finished by another process meanwhile: run the command again", url=store.url)
    return packing


def pass_folder(key: str, name: str) -> str:
    """Return where an earlier pass of a packing keeps its shards and records, which are removed with the packing's."""
    return f"{PACKINGS_FOLDER}{key}/{name}"


@dataclass(frozen=True, slots=True)
class PackingRecords:
    """All records of the packings with one key: their objects, and the shards that they name, by part."""

    key: str
    objects: tuple[ObjectInfo, ...]
    shards: tuple[tuple[str, ShardInfo], ...]

    @property
    def modified_s(self) -> float:
        """Time of the newest record, by the store's clock; 0 if the store does not report it."""
        return max((info.modified_s or 0.0 for info in self.objects), default=0.0)


def list_packings(store: Store) -> Iterator[PackingRecords]:
    """Yield the records of the packings into the data set, or the data sets of a split, below the store's URL."""
    objects: dict[str, list[ObjectInfo]] = {}
    for info in store.list(PACKINGS_FOLDER):
        if match := _KEY.match(info.key):
            objects.setdefault(match[1], []).append(info)
    for key, infos in sorted(objects.items()):
        shards = []
        for info in infos:
            if (match := _KEY.match(info.key)) and match[2]:
                parts = _parsed(_get(store, info.key)) or {}
                shards += [(part, ShardInfo(**one)) for part, of_part in parts.items() for one in of_part]
        yield PackingRecords(key, tuple(infos), tuple(shards))


def _start_of(store: Store, key: str) -> NumberedLog:
    return NumberedLog(store, f"{PACKINGS_FOLDER}{key}/start-", ".json")


def _get(store: Store, key: str) -> bytes | None:
    try:
        return store.get(key)
    except NotFound:
        return None


def _text(value: Mapping[str, Any]) -> bytes:
    data = json.dumps(value, sort_keys=True).encode()
    return b"%08x %s\n" % (crc32c(data), data)


def _parsed(text: bytes | None) -> Any:
    """Return what _text() was given; None if the record is missing or damaged."""
    if text is None:
        return None
    stated, _, data = text.rstrip(b"\n").partition(b" ")
    return json.loads(data) if stated == b"%08x" % crc32c(data) else None
